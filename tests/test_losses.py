"""Each loss beside a NumPy formula or a library, and where its terms are missing."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from cellops.models import create_model
from cellops.models.training.losses import build_loss, squared_distances, triplet_batch_all, triplet_batch_hard
from cellops.models.training.network import WithFeatures

WEIGHTS = [0.5, 2.0, 1.0, 3.5]


def case(count: int = 12, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Logits in float64 and targets of every class."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.arange(count) % classes


def mixed(targets: Tensor, classes: int = 4, share: float = 0.3) -> Tensor:
    """Targets as mixup makes them."""
    one_hot = F.one_hot(targets, classes).double()
    return (1 - share) * one_hot + share * one_hot.roll(1, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("name", ["cross_entropy", "soft_target"])
def test_cross_entropy_as_torch(name: str, weights: list[float] | None, smoothing: float) -> None:
    logits, targets = case()
    loss = build_loss({"name": name, "label_smoothing": smoothing}, 4, weights).double()
    weight = None if weights is None else torch.tensor(weights).double()
    wanted = F.cross_entropy(logits, targets, weight, label_smoothing=smoothing)
    torch.testing.assert_close(loss(logits, targets), wanted)
    # Probabilities on one class each are the same targets: the scale must not change.
    torch.testing.assert_close(loss(logits, mixed(targets, share=0.0)), wanted)


def test_cross_entropy_of_mixed_targets() -> None:
    logits, targets = case()
    soft = mixed(targets)
    torch.testing.assert_close(build_loss({}, 4)(logits, soft), SoftTargetCrossEntropy()(logits, soft))
    smoothed = build_loss({"label_smoothing": 0.2}, 4)(logits, targets)
    torch.testing.assert_close(smoothed, LabelSmoothingCrossEntropy(0.2)(logits, targets))
    # With weights: between the two images, each counted by its share and its class's weight.
    weight = np.array(WEIGHTS)
    log_p = logits.log_softmax(1).numpy()
    wanted = -(soft.numpy() * weight * log_p).sum() / (soft.numpy() * weight).sum()
    assert float(build_loss({}, 4, WEIGHTS)(logits, soft)) == pytest.approx(wanted)


def test_mixup_does_not_change_the_scale_under_class_weights() -> None:
    """F.cross_entropy divides by the batch size for probabilities: with these weights its value doubles and more."""
    logits, targets = case()
    weights = [10.0, 20.0, 10.0, 40.0]
    plain = float(build_loss({}, 4, weights)(logits, targets))
    shares = [float(build_loss({}, 4, weights)(logits, mixed(targets, share=share))) for share in (1e-6, 0.5)]
    assert shares[0] == pytest.approx(plain, rel=1e-4)
    assert plain / 3 < shares[1] < plain * 3
    torchs = float(F.cross_entropy(logits, mixed(targets, share=1e-6), torch.tensor(weights).double()))
    assert torchs > 10 * plain


def test_bce_as_timm() -> None:
    logits, targets = case()
    for smoothing in (0.0, 0.1):
        loss = build_loss({"name": "bce", "label_smoothing": smoothing}, 4)
        theirs = BinaryCrossEntropy(smoothing=smoothing)
        if smoothing == 0:
            torch.testing.assert_close(loss(logits, targets), theirs(logits, targets))
            torch.testing.assert_close(loss(logits, mixed(targets)), theirs(logits, mixed(targets)))
        else:  # timm spreads smoothing / K over the others and keeps 1 - smoothing + smoothing / K, as here
            torch.testing.assert_close(loss(logits, targets), theirs(logits, targets))


def test_bce_with_one_logit() -> None:
    logits = torch.tensor([[0.5], [-2.0], [3.0]], dtype=torch.float64)
    targets = torch.tensor([1, 0, 0])
    p = 1 / (1 + np.exp(-logits.numpy()[:, 0]))
    terms = -np.log(np.array([p[0], 1 - p[1], 1 - p[2]]))
    loss = build_loss({"name": "bce"}, 1)
    assert float(loss(logits, targets)) == pytest.approx(terms.mean())
    assert float(loss(logits[:, 0], targets)) == pytest.approx(terms.mean())
    weighted = build_loss({"name": "bce"}, 1, [1.0, 4.0])
    assert float(weighted(logits, targets)) == pytest.approx((4 * terms[0] + terms[1] + terms[2]) / 6)
    half = build_loss({"name": "bce"}, 1)(logits, torch.tensor([[0.5], [0.5], [0.5]]))
    assert float(half) == pytest.approx((-0.5 * np.log(p) - 0.5 * np.log(1 - p)).mean())
    with pytest.raises(ValueError, match="one logit takes bce"):
        build_loss({"name": "cross_entropy"}, 1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [1.0, 0.25, WEIGHTS])
def test_focal_by_its_formula(alpha: Any, gamma: float) -> None:
    logits, targets = case()
    p = logits.softmax(1).numpy()[np.arange(12), targets]
    factor = np.array(alpha)[targets] if isinstance(alpha, list) else alpha
    wanted = (-factor * (1 - p) ** gamma * np.log(p)).mean()
    loss = build_loss({"name": "focal", "alpha": alpha, "gamma": gamma}, 4).double()
    assert float(loss(logits, targets)) == pytest.approx(wanted)
    assert float(loss(logits, mixed(targets, share=0.0))) == pytest.approx(wanted)


def test_focal_as_torchvision_and_as_cross_entropy() -> None:
    """With two classes a softmax is the sigmoid of the difference."""
    logits, targets = case(classes=2)
    theirs = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], targets.double(), alpha=-1, gamma=2, reduction="mean")
    torch.testing.assert_close(build_loss({"name": "focal", "gamma": 2}, 2).double()(logits, targets), theirs)
    logits, targets = case()
    for weights, smoothing in product([None, WEIGHTS], [0.0, 0.1]):
        focal = build_loss({"name": "focal", "gamma": 0, "label_smoothing": smoothing}, 4, weights).double()
        entropy = build_loss({"label_smoothing": smoothing}, 4, weights).double()
        if weights is None:
            torch.testing.assert_close(focal(logits, targets), entropy(logits, targets))
        torch.testing.assert_close(focal(logits, mixed(targets)), entropy(logits, mixed(targets)))


def test_focal_of_certain_predictions_has_finite_gradients() -> None:
    for gamma in (0.5, 2.0):
        logits = torch.tensor([[60.0, -60.0], [-60.0, 60.0]], requires_grad=True)
        build_loss({"name": "focal", "gamma": gamma}, 2)(logits, torch.tensor([0, 0])).backward()
        assert logits.grad is not None and logits.grad.isfinite().all()


def triplets(features: np.ndarray, targets: np.ndarray) -> list[tuple[int, float, float]]:
    """(anchor, d(a, p), d(a, n)) of every valid triplet, one by one."""
    count = len(targets)
    return [
        (a, float(((features[a] - features[p]) ** 2).sum()), float(((features[a] - features[n]) ** 2).sum()))
        for a, p, n in product(range(count), repeat=3)
        if a != p and targets[a] == targets[p] and targets[a] != targets[n]
    ]


@pytest.mark.parametrize("targets", [[0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 2, 3, 3], [5, 5, 5, 5, 5, 5, 1]])
def test_triplets_one_by_one(targets: list[int]) -> None:
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    all_of_them = triplets(features.numpy(), np.array(targets))
    wanted = np.mean([max(near - far + 1, 0) for _, near, far in all_of_them])
    found = triplet_batch_all(features, torch.tensor(targets), margin=1.0)
    assert float(found) == pytest.approx(wanted)
    hardest = []
    for anchor in range(7):
        own = [(near, far) for a, near, far in all_of_them if a == anchor]
        if own:
            hardest.append(max(max(near for near, _ in own) - min(far for _, far in own) + 1, 0))
    assert float(triplet_batch_hard(features, torch.tensor(targets), margin=1.0)) == pytest.approx(np.mean(hardest))


@pytest.mark.parametrize("triplet", [triplet_batch_all, triplet_batch_hard])
@pytest.mark.parametrize("targets", [[0, 1, 2], [3, 3, 3], [0], []], ids=["singles", "one class", "one image", "none"])
def test_no_triplet_is_zero_with_zero_gradients(triplet: Any, targets: list[int]) -> None:
    features = torch.randn(len(targets), 4, requires_grad=True)
    loss = triplet(features, torch.tensor(targets, dtype=torch.int64), 1.0)
    assert loss.item() == 0.0
    loss.backward()
    assert features.grad is not None and not features.grad.any() and features.grad.isfinite().all()


def test_triplet_gradients() -> None:
    targets = torch.tensor([0, 0, 1, 1, 2])
    features = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    for triplet in (triplet_batch_all, triplet_batch_hard):
        assert torch.autograd.gradcheck(lambda x, triplet=triplet: triplet(x, targets, 1.0), features)


def test_distances_of_long_features_keep_their_digits() -> None:
    near = torch.tensor([[1e4, 0.0], [1e4 + 0.125, 0.0]])
    assert squared_distances(near)[0, 1] == 0.125**2
    assert squared_distances(near).diagonal().tolist() == [0.0, 0.0]


def test_hybrid_is_the_sum() -> None:
    logits, targets = case()
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(3))
    config = {"name": "hybrid_triplet", "label_smoothing": 0.1, "margin": 2.0, "weight": 0.5}
    for mining, triplet in (("all", triplet_batch_all), ("hard", triplet_batch_hard)):
        loss = build_loss({**config, "mining": mining}, 4)
        assert loss.needs_features
        wanted = F.cross_entropy(logits, targets, label_smoothing=0.1) + 0.5 * triplet(features, targets, 2.0)
        torch.testing.assert_close(loss(logits, targets, features), wanted)
    maps = features[:, :, None, None] + torch.tensor([[-1.0, 1.0], [2.0, -2.0]])  # places that average out
    torch.testing.assert_close(loss(logits, targets, maps), loss(logits, targets, features))
    with pytest.raises(ValueError, match="needs the network's features"):
        loss(logits, targets)
    with pytest.raises(ValueError, match="switch mixup and cutmix off"):
        loss(logits, mixed(targets), features)


@pytest.mark.parametrize("mining", ["all", "hard"])
def test_hybrid_in_half_precision_is_finite(mining: str) -> None:
    features = 300 * torch.randn(6, 8, generator=torch.Generator().manual_seed(4)).half()
    loss = build_loss({"name": "hybrid_triplet", "mining": mining}, 2)
    assert loss(torch.zeros(6, 2), torch.tensor([0, 0, 0, 1, 1, 1]), features).isfinite()


@pytest.mark.parametrize(
    ("config", "classes", "weights", "message"),
    [
        ({"name": "hinge"}, 4, None, "loss name must be one of cross_entropy"),
        ({"name": "cross_entropy", "gamma": 2}, 4, None, "loss cross_entropy has no gamma; known: label_smoothing"),
        ({"name": "focal", "alpha": [1.0, 2.0]}, 4, None, "alpha has 2 factors for 4 classes"),
        ({"name": "focal", "alpha": WEIGHTS}, 4, WEIGHTS, "would weight twice"),
        ({"name": "hybrid_triplet", "mining": "soft"}, 4, None, "mining must be one of all, hard"),
        ({"label_smoothing": 1.5}, 4, None, "label_smoothing must be from 0 to 1"),
        ({}, 4, [1.0, 2.0], "class_weights must be 4 numbers above 0"),
        ({}, 4, [1.0, 2.0, 0.0, 1.0], "class_weights must be 4 numbers above 0"),
    ],
)
def test_wrong_settings_are_named(config: dict[str, Any], classes: int, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_loss(config, classes, weights)


def test_wrong_targets_are_named() -> None:
    logits, targets = case()
    for name in ("cross_entropy", "bce", "focal"):
        with pytest.raises(ValueError, match=r"targets must be \[N\] integers or \[N, 4\] floats"):
            build_loss({"name": name}, 4)(logits, targets[:, None].expand(12, 4))


@pytest.mark.parametrize(
    ("name", "width"),
    [("squeezenet1_1", 512), ("mobilenetv2_100", 1280), ("shufflenet_v2_x1_0", 1024), ("ghostnet_100", 1280)],
)
def test_features_of_the_last_convolution(name: str, width: int) -> None:
    """Of the four networks of the hybrid loss; GhostNet's last convolution lies behind its pooling."""
    model = create_model(name, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(images)
        network = WithFeatures(model, wanted=True).eval()
        logits, features = network(images)
        torch.testing.assert_close(logits, wanted)
        assert features is not None and features.shape == (2, width)
        if name == "ghostnet_100":
            torch.testing.assert_close(model.get_classifier()(features), logits)
            network.train()
            logits, features = network(images)
            assert not torch.allclose(model.get_classifier()(features), logits), "logits have dropout, features none"
