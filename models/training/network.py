"""A model as the loop and the evaluation call it: logits, pooled features where the loss wants them, probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellops.models.training.randomness import random_state, set_random_state
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
    """Names of the tensors that depend on the number of classes; empty where no classifier is known.

    The classifier is what the network's `default_cfg` names, one module or several, or what `get_classifier()` returns.
    Of several layers only the last one with a row of weights for each class counts, and what follows it with as many
    values, such as a normalisation of the logits.
    """
    config = getattr(model, "default_cfg", None) or {}
    named = config.get("classifier") or ()
    modules = dict(model.named_modules())
    names = [name for name in ((named,) if isinstance(named, str) else named) if name in modules]
    if not names and hasattr(model, "get_classifier"):
        found = model.get_classifier()
        own = found if isinstance(found, (tuple, list)) else (found,)
        names = [name for name, module in modules.items() if any(module is one for one in own)]
    classes = getattr(model, "num_classes", None) or config.get("num_classes")
    return {tensor for name in names for tensor in _class_layer(modules[name], name, classes)}


def _class_layer(module: nn.Module, name: str, classes: int | None) -> set[str]:
    """Names of a classifier's tensors that have a value for each class."""

    def tensors(of: nn.Module, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.{key}": value for key, value in of.state_dict().items()}

    if next(module.parameters(recurse=False), None) is not None:
        return set(tensors(module, name))
    after: set[str] = set()
    for key, child in reversed(list(module.named_children())):
        own = tensors(child, f"{name}.{key}")
        if any(value.dim() > 1 and len(value) == classes for value in own.values()):
            return _class_layer(child, f"{name}.{key}", classes) | after
        if any(value.dim() == 1 and len(value) == classes for value in own.values()):
            after |= set(own)
    return set()


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


def unused_parameters(
    network: WithFeatures, criterion: nn.Module, size: Sequence[int], classes: int, device: torch.device
) -> list[str]:
    """Names of the parameters that want a gradient and get none from a trial batch of four images of noise.

    A gradient is missing where no operation leads from the parameter to the loss, whatever the images. Gradients are
    None afterwards; buffers and random numbers are as before.

    Args:
        network: on the device.
        criterion: `forward(logits, targets, features)`, a scalar.
        size: height and width of the images.
        classes: K.
        device: of the network.

    Raises:
        RecipeError: forward or backward pass fail.
    """
    images = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.arange(4, device=device) // 2 % classes
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    random, training = random_state(), network.training
    try:
        logits, features = network.train()(images)
        criterion(logits.float(), targets, None if features is None else features.float()).backward()
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"model.name: the network does not train on 4 images of {size[0]} x {size[1]}: {error}"
        ) from None
    named = list(network.model.named_parameters())
    missing = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
    network.zero_grad(set_to_none=True)
    network.train(training)
    for buffer, value in buffers:
        buffer.copy_(value)
    set_random_state(random)
    return missing


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
