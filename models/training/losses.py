"""Losses of the papers, on logits, for class indices and for soft targets of mixup and cutmix.

One rule for class weights in all of them: the weighted terms are divided by the sum of the weights of the targets, be
they indices or probabilities. `F.cross_entropy(weight=)` does so for indices but divides by the batch size for
probabilities, so that switching mixup on would change the scale of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def soft(targets: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Targets as probabilities [N, K]: one-hot for indices [N], else as they are.

    Raises:
        ValueError: neither [N] of integers nor [N, num_classes] of floats.
    """
    if targets.ndim == 1 and not targets.is_floating_point():
        return F.one_hot(targets, num_classes).to(dtype)
    if targets.ndim == 2 and targets.shape[1] == num_classes and targets.is_floating_point():
        return targets.to(dtype)
    raise ValueError(
        f"targets must be [N] integers or [N, {num_classes}] floats, got {targets.dtype} {list(targets.shape)}"
    )


class Weighted(nn.Module):
    """What the losses of single images share.

    Args:
        num_classes: K, at least 2; 1 only where the loss takes a single logit.
        class_weights: [K], or [2] with one logit.
        label_smoothing: share of each target that is spread evenly over the classes.
    """

    needs_features = False
    class_weights: Tensor | None

    def __init__(self, num_classes: int, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def smoothed(self, wanted: Tensor) -> Tensor:
        """Targets with a share of them spread over the classes; [N, K], or [N, 1] for one of two."""
        return wanted * (1 - self.label_smoothing) + self.label_smoothing / max(self.num_classes, 2)

    def mean(self, terms: Tensor, wanted: Tensor) -> Tensor:
        """The mean over images of the terms [N, K] of all classes by the smoothed targets, and by the class weights.

        Args:
            terms: the loss of each class if it were the target.
            wanted: the targets as probabilities [N, K].
        """
        if self.class_weights is None:
            return (self.smoothed(wanted) * terms).sum(1).mean()
        weights = self.class_weights.to(terms.dtype)
        return (self.smoothed(wanted) * weights * terms).sum() / (wanted * weights).sum()


class CrossEntropy(Weighted):
    """Softmax cross-entropy with class weights and label smoothing.

    For indices it equals `F.cross_entropy`; for one-hot probabilities it gives the same value.
    """

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        """Logits [N, K] and targets [N] or [N, K] to a scalar."""
        if targets.ndim == 1:
            weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)
            return F.cross_entropy(logits, targets, weights, label_smoothing=self.label_smoothing)
        return self.mean(-logits.log_softmax(1), soft(targets, self.num_classes, logits.dtype))


class BinaryCrossEntropy(Weighted):
    """Each class against the rest by a sigmoid, on one-hot or soft targets; the mean over classes and batch.

    With one logit the targets are 0 and 1, or the probability of 1 as [N, 1], smoothed over the two classes. A sample
    counts by the class weight of its target.
    """

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        """Logits [N, K] (or [N] with one logit) and targets [N] or [N, K] to a scalar."""
        if self.num_classes == 1:
            logits = logits.reshape(-1, 1)
            wanted = targets.reshape(-1, 1).to(logits.dtype)
            belongs = torch.cat([1 - wanted, wanted], 1)
        else:
            wanted = belongs = soft(targets, self.num_classes, logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, self.smoothed(wanted), reduction="none").mean(1)
        if self.class_weights is None:
            return losses.mean()
        weights = (belongs * self.class_weights.to(logits.dtype)).sum(1)
        return (losses * weights).sum() / weights.sum()


class Focal(Weighted):
    """Softmax focal loss (Lin et al. 2017): the mean of -alpha (1 - p)^gamma log p, p that of the target.

    Args:
        num_classes: K, at least 2.
        gamma: how strongly easy samples are played down; 0 is cross-entropy.
        alpha: one factor, or one for each class; it is not divided out again.
        class_weights: [K], divided out as in cross-entropy; not together with a list of alpha.
        label_smoothing: as in cross-entropy.

    Raises:
        ValueError: `alpha` has another length, or comes with class weights.
    """

    alpha: Tensor

    def __init__(
        self,
        num_classes: int,
        gamma: float = 2.0,
        alpha: float | Sequence[float] = 1.0,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes, class_weights, label_smoothing)
        factors = torch.as_tensor(alpha, dtype=torch.float32)
        if factors.ndim and len(factors) != num_classes:
            raise ValueError(f"loss alpha has {len(factors)} factors for {num_classes} classes")
        if factors.ndim and class_weights is not None:
            raise ValueError("loss alpha for each class and class weights would weight twice: give one of them")
        self.gamma = gamma
        self.register_buffer("alpha", factors, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        """Logits [N, K] and targets [N] or [N, K] to a scalar."""
        log_p = logits.log_softmax(1)
        # 1 - p as the sum of the others would lose digits; expm1 keeps them where p is near 1.
        terms = -self.alpha.to(logits.dtype) * (-torch.expm1(log_p)).clamp_min(1e-12) ** self.gamma * log_p
        return self.mean(terms, soft(targets, self.num_classes, logits.dtype))


def squared_distances(features: Tensor) -> Tensor:
    """Squared Euclidean distances between rows [N, C]: [N, N], exactly 0 on the diagonal.

    By differences, since |a|^2 + |b|^2 - 2ab loses the small distances of long features.
    """
    return (features[:, None] - features[None]).square().sum(-1)


def same_class(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which of [N] targets are of one class: [N, N], and the same without each one with itself."""
    same = targets[:, None] == targets[None]
    return same, same & ~torch.eye(len(targets), dtype=torch.bool, device=targets.device)


def triplet_batch_all(features: Tensor, targets: Tensor, margin: float) -> Tensor:
    """Mean of max(d(a, p) - d(a, n) + margin, 0) over all valid triplets; 0 without one.

    Args:
        features: [N, C].
        targets: [N] class indices.
        margin: added to each difference.
    """
    distance = squared_distances(features)
    same, positive = same_class(targets)
    valid = positive[:, :, None] & ~same[:, None, :]
    losses = F.relu(distance[:, :, None] - distance[:, None, :] + margin)
    return torch.where(valid, losses, 0).sum() / valid.sum().clamp_min(1)


def triplet_batch_hard(features: Tensor, targets: Tensor, margin: float) -> Tensor:
    """Mean over anchors of max(farthest positive - nearest negative + margin, 0); 0 without a triplet.

    Anchors without a positive or a negative do not count.

    Args:
        features: [N, C].
        targets: [N] class indices.
        margin: added to each difference.
    """
    distance = squared_distances(features)
    same, positive = same_class(targets)
    usable = positive.any(1) & (~same).any(1)
    farthest = torch.where(positive, distance, 0).amax(1) if len(targets) else distance.sum(1)
    nearest = torch.where(same, torch.finfo(distance.dtype).max, distance).amin(1) if len(targets) else distance.sum(1)
    losses = F.relu(farthest - torch.where(usable, nearest, 0) + margin)
    return torch.where(usable, losses, 0).sum() / usable.sum().clamp_min(1)


class HybridTriplet(nn.Module):
    """Cross-entropy plus `weight` times a triplet loss on raw features (Chen et al. 2022, eq. 1 to 4).

    Squared Euclidean distances of features that are not normalised; maps [N, C, H, W] are averaged over places.

    Args:
        num_classes: K, at least 2.
        margin: between the distances to a positive and to a negative.
        weight: of the triplet term.
        mining: "all" for every valid triplet of the batch, "hard" for the hardest of each anchor.
        class_weights: [K], of the cross-entropy.
        label_smoothing: of the cross-entropy.
    """

    needs_features = True
    MINING: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
        "all": triplet_batch_all,
        "hard": triplet_batch_hard,
    }

    def __init__(
        self,
        num_classes: int,
        margin: float = 1.0,
        weight: float = 1.0,
        mining: str = "all",
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if mining not in self.MINING:
            raise ValueError(f"loss mining must be one of {', '.join(self.MINING)}, got {mining!r}")
        self.cross_entropy = CrossEntropy(num_classes, class_weights, label_smoothing)
        self.margin = margin
        self.weight = weight
        self.triplet = self.MINING[mining]

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        """Logits [N, K], targets [N] and features [N, C] or [N, C, H, W] to a scalar.

        Raises:
            ValueError: no features, or soft targets, of which no two are of one class.
        """
        if features is None:
            raise ValueError("the hybrid triplet loss needs the network's features")
        if targets.ndim != 1:
            raise ValueError("the hybrid triplet loss needs class indices: switch mixup and cutmix off")
        if features.ndim == 4:
            features = features.mean((2, 3))
        # Half precision overflows at a squared distance of 65,504.
        triplet = self.triplet(features.float(), targets, self.margin)
        return self.cross_entropy(logits, targets) + self.weight * triplet


Loss = CrossEntropy | BinaryCrossEntropy | Focal | HybridTriplet

# Name in a recipe -> class and the keys it takes.
LOSSES: dict[str, tuple[type[nn.Module], set[str]]] = {
    "cross_entropy": (CrossEntropy, {"label_smoothing"}),
    "soft_target": (CrossEntropy, {"label_smoothing"}),
    "bce": (BinaryCrossEntropy, {"label_smoothing"}),
    "focal": (Focal, {"label_smoothing", "gamma", "alpha"}),
    "hybrid_triplet": (HybridTriplet, {"label_smoothing", "margin", "weight", "mining"}),
}


def build_loss(
    config: Mapping[str, Any], num_classes: int, class_weights: Sequence[float] | Tensor | None = None
) -> nn.Module:
    """The loss of a recipe: `loss(logits, targets, features=None)` to a scalar, with `needs_features`.

    Args:
        config: `name` and the keys of that loss: `label_smoothing`; `gamma`, `alpha` (focal); `margin`, `weight`,
            `mining` (hybrid_triplet).
        num_classes: width of the logits; 1 only with bce.
        class_weights: one weight for each class (two with a single logit), above 0.

    Raises:
        ValueError: the name or a key is unknown, a value is out of range, or the widths do not fit.
    """
    options = dict(config)
    name = options.pop("name", "cross_entropy")
    if name not in LOSSES:
        raise ValueError(f"loss name must be one of {', '.join(LOSSES)}, got {name!r}")
    kind, known = LOSSES[name]
    unknown = set(options) - known
    if unknown:
        raise ValueError(f"loss {name} has no {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    if num_classes < 1 or (num_classes == 1 and name != "bce"):
        raise ValueError(
            f"loss {name} needs at least {1 if name == 'bce' else 2} logits, got {num_classes}; one logit takes bce"
        )
    for key, low, high in (("label_smoothing", 0, 1), ("gamma", 0, 100), ("margin", 0, 1e6), ("weight", 0, 1e6)):
        if key in options and not low <= options[key] <= high:
            raise ValueError(f"loss {key} must be from {low} to {high:g}, got {options[key]}")
    weights = None
    if class_weights is not None:
        weights = torch.as_tensor(class_weights, dtype=torch.float32)
        if weights.shape != (max(num_classes, 2),) or (weights <= 0).any():
            raise ValueError(f"class_weights must be {max(num_classes, 2)} numbers above 0, got {weights.tolist()}")
    return kind(num_classes, class_weights=weights, **options)
