"""A model as the loop and the evaluation call it: logits, pooled features where the loss wants them, probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellops.models.training.recipe import RecipeError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TURNS = {
    "none": [(0, False)],
    "flips": [(0, False), (0, True), (2, False), (2, True)],
    "dihedral": [(quarter, flipped) for quarter in range(4) for flipped in (False, True)],
}


class WithFeatures(nn.Module):
    """A model that also returns what its last convolution found, averaged over the positions.

    timm's GhostNet and MobileNetV3 have that convolution behind the pooling, in `forward_head`. There its dropout is
    taken over by this module, which needs the features as they are before it.

    Args:
        model: has `forward_features` and `forward_head`.
        wanted: whether features are returned, else None.
    """

    def __init__(self, model: Any, wanted: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.wanted = wanted
        self.behind_pooling = wanted and hasattr(model, "conv_head") and model.head_hidden_size != model.num_features
        self.dropout = 0.0
        if self.behind_pooling:
            self.dropout, model.drop_rate = model.drop_rate, 0.0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.wanted:
            return self.model(images), None
        features = self.model.forward_features(images)
        if self.behind_pooling:
            features = self.model.forward_head(features, pre_logits=True)
            return self.model.get_classifier()(F.dropout(features, self.dropout, self.training)), features
        return self.model.forward_head(features), features.mean((2, 3)) if features.dim() == 4 else features


class Logits(nn.Module):
    """The logits alone of a `WithFeatures`, however it is wrapped."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def classifier_tensors(model: Any) -> set[str]:
    """Names of the tensors that depend on the number of classes, as the network's `default_cfg` says; else none."""
    named = (getattr(model, "default_cfg", None) or {}).get("classifier") or ()
    modules = (named,) if isinstance(named, str) else tuple(named)
    return {name for name in model.state_dict() if name.rpartition(".")[0] in modules}


def try_out(model: nn.Module, name: str, images: Tensor, outputs: int) -> None:
    """Call a network once, so that one that does not fit shows before it is trained.

    Args:
        model: in evaluation.
        name: of the network.
        images: [N, 3, H, W].
        outputs: width of the logits.

    Raises:
        RecipeError: it does not take the images, or gives something else than logits [N, outputs].
    """
    try:
        with torch.no_grad():
            found = model(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        height, width = images.shape[2:]
        raise RecipeError(f"data.input_size: {name} does not take images of {height} x {width}: {error}") from None
    wanted = [len(images), outputs]
    if not isinstance(found, Tensor) or list(found.shape) != wanted:
        told = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise RecipeError(f"model.name: {name} must return one tensor, logits {wanted} for one image; it gave {told}")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Mixed precision of a recipe's name."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "float32")


def place(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """A batch on the device, in the layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True).contiguous(memory_format=layout)


def probabilities(logits: Tensor, activation: str) -> Tensor:
    """Class probabilities [N, K] in float64.

    Args:
        logits: [N, K], or [N, 1] for the second of two classes.
        activation: "softmax", or "sigmoid" for networks trained with one binary loss a class; scaled to the sum 1.
    """
    logits = logits.double()
    if logits.shape[1] == 1:
        second = logits.sigmoid()
        return torch.cat([1 - second, second], 1)
    if activation == "sigmoid":
        scores = logits.sigmoid().clamp_min(1e-12)
        return scores / scores.sum(1, keepdim=True)
    return logits.softmax(1)


def predict_batches(
    model: nn.Module,
    batches: Iterable,
    device: torch.device,
    activation: str,
    tta: str = "none",
    precision: str = "float32",
    channels_last: bool = False,
    each: Callable[[], object] = lambda: None,
    sharded: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of every image, averaged over the views of test-time augmentation.

    Args:
        model: gives logits.
        batches: of `Batch`.
        device: where the model is.
        activation: see `probabilities`.
        tta: a key of TURNS.
        precision: of the forward pass.
        channels_last: layout of the images.
        each: called after every batch.
        sharded: whether weights are spread over processes; put together in inference mode they could not train on.

    Returns:
        The indices of the images [N] and their probabilities [N, K].
    """
    training = model.training
    model.eval()
    indices, found = [], []
    with torch.no_grad() if sharded else torch.inference_mode():
        for batch in batches:
            images = place(batch.images, device, channels_last)
            mean: Any = 0
            for quarter, flipped in TURNS[tta]:
                view = images.rot90(quarter, (2, 3)) if quarter else images
                with autocast(device, precision):
                    logits = model(view.flip(3) if flipped else view)
                mean = mean + probabilities(logits.float(), activation)
            found.append((mean / len(TURNS[tta])).cpu().numpy())
            indices.append(batch.index.numpy())
            each()
    model.train(training)
    if not found:
        return np.empty(0, dtype=np.int64), np.empty((0, 0))
    return np.concatenate(indices), np.concatenate(found)
