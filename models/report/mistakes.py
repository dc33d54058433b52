"""The worst mistakes: the images whose wrong class got the most probability, each with its Grad-CAM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from cellops.models.training.checkpoint import write_atomically, write_text
from cellops.models.training.evaluate import Predictions
from cellops.models.training.network import place

if TYPE_CHECKING:
    from cellops.models.training.parts import Part
    from cellops.models.training.run import Run

SIDE = 160
FOLDER = "mistakes"
LEAST = 7


def deepest_maps(model: nn.Module, images: Tensor) -> nn.Module | None:
    """The last module to give maps of at least LEAST positions a side, or the last to give any; None without maps.

    Maps that the logits do not depend on, as those of a head for training alone, have no gradient to show.
    """
    found: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, arguments: object, output: object) -> None:
        if _is_map(output):
            found.append((module, output))

    handles = [module.register_forward_hook(note) for module in model.modules() if module is not model]
    try:
        with torch.enable_grad():
            logits = model(images[:1].detach().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return None
    gradients = torch.autograd.grad(logits.sum(), [output for _, output in found], allow_unused=True)
    used = [pair for pair, gradient in zip(found, gradients, strict=True) if gradient is not None]
    return used[_deepest([output for _, output in used])][0] if used else None


def _is_map(output: object) -> TypeGuard[Tensor]:
    """Whether a layer gave maps whose gradient can be asked for."""
    if not isinstance(output, Tensor) or not output.requires_grad:
        return False
    return output.dim() == 4 and output.shape[1] > 1 and output.shape[-1] > 1


def _deepest(maps: Sequence[Tensor]) -> int:
    """The index of the last maps of at least LEAST positions a side, or the last index."""
    fine = [index for index, output in enumerate(maps) if min(output.shape[-2:]) >= LEAST]
    return fine[-1] if fine else len(maps) - 1


def grad_cam(model: nn.Module, images: Tensor, labels: Tensor) -> np.ndarray | None:
    """Where the network looks for a class (Selvaraju et al. 2017).

    On the maps of the deepest layer that still has some resolution: small images leave 2 x 2 positions at the end.

    Args:
        model: gives logits.
        images: [N, 3, H, W].
        labels: [N], the class that is asked for; with a single logit class 0 is its negative.

    Returns:
        [N, H, W] from 0 to 1, or None where the network has no maps.
    """
    model.eval()
    layer = deepest_maps(model, images)
    if layer is None:
        return None
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(
        lambda module, arguments, output: kept.append(output) if _is_map(output) else None
    )
    try:
        with torch.enable_grad():
            logits = model(images.detach().requires_grad_())
            if logits.shape[1] == 1:
                score = (logits[:, 0] * (2 * labels - 1)).sum()
            else:
                score = logits.gather(1, labels[:, None]).sum()
            gradients = torch.autograd.grad(score, kept, allow_unused=True)
    finally:
        handle.remove()
    # Of all calls of the layer the one that it was chosen for: a network may have a single ReLU.
    used = [(gradient, output) for gradient, output in zip(gradients, kept, strict=True) if gradient is not None]
    gradient, output = used[_deepest([output for _, output in used])]
    maps = functional.relu((gradient.mean((2, 3), keepdim=True) * output.detach()).sum(1, keepdim=True)).float()
    maps = functional.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    peak = maps.flatten(1).amax(1).clamp_min(1e-12)[:, None, None]
    return (maps / peak).cpu().numpy()


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A heat map [H, W] from 0 to 1 laid over an image uint8 [H, W, 3], the stronger the less transparent."""
    colors = mpl.colormaps["turbo"](heat)[..., :3]
    opacity = 0.15 + 0.45 * heat[..., None]
    return np.clip((1 - opacity) * image + opacity * 255 * colors, 0, 255).astype(np.uint8)


def worst(predictions: Predictions, count: int) -> np.ndarray:
    """Places of the mistakes, the most confident first."""
    wrong = np.flatnonzero(predictions.found != predictions.targets)
    of_truth = predictions.probabilities[np.arange(len(predictions.targets)), predictions.targets]
    surplus = predictions.probabilities.max(1) - of_truth
    return wrong[np.argsort(-surplus[wrong], kind="stable")][:count]


def save_mistakes(run: Run, part: Part, model: nn.Module, predictions: Predictions, indices: Sequence[int]) -> None:
    """Write mistakes/NN.png (the image beside its Grad-CAM) and mistakes/mistakes.json of a part.

    Args:
        run: gives the images.
        part: where they go.
        model: the network that made them.
        predictions: of the held-out images.
        indices: of these images in the data set.
    """
    folder = part.folder / FOLDER
    for old in folder.glob("*.png"):
        old.unlink()
    chosen = worst(predictions, run.recipe.evaluation.worst)
    listed: list[dict[str, Any]] = []
    if len(chosen):
        shown = [indices[number] for number in chosen.tolist()]
        images = place(run.batches.images(shown), run.ranks.device, run.recipe.training.channels_last)
        labels = torch.as_tensor(predictions.found[chosen], device=run.ranks.device)
        heats = grad_cam(model, images, labels) if run.recipe.evaluation.grad_cam else None
        pixels = (255 * run.batches.images(shown, normalised=False).permute(0, 2, 3, 1)).round().byte().numpy()
        for number, spot in enumerate(chosen.tolist()):
            views = [pixels[number]]
            if heats is not None:
                views.append(overlay(pixels[number], heats[number]))
            scale = SIDE / max(views[0].shape[:2])
            size = (round(views[0].shape[1] * scale), round(views[0].shape[0] * scale))
            views = [np.asarray(Image.fromarray(view).resize(size, Image.Resampling.BICUBIC)) for view in views]
            picture = Image.fromarray(np.concatenate(views, 1))
            name = f"{number + 1:02}.png"
            write_atomically(folder / name, lambda file, picture=picture: picture.save(file, "PNG", optimize=True))
            row = predictions.probabilities[spot]
            listed.append(
                {
                    "file": name,
                    "image": predictions.ids[spot],
                    "truth": predictions.classes[predictions.targets[spot]],
                    "predicted": predictions.classes[int(row.argmax())],
                    "confidence": float(row.max()),
                    "truth_probability": float(row[predictions.targets[spot]]),
                    "grad_cam": heats is not None,
                }
            )
    write_text(folder / "mistakes.json", json.dumps(listed, indent=1, ensure_ascii=False))
