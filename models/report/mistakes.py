"""The worst mistakes: the images whose wrong class got the most probability, each with its Grad-CAM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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


def grad_cam(model: Any, images: Tensor, labels: Tensor) -> np.ndarray | None:
    """Where the network looks for a class (Selvaraju et al. 2017), on the maps before its head.

    Args:
        model: with `forward_features` and `forward_head`.
        images: [N, 3, H, W].
        labels: [N], the class that is asked for; with a single logit class 0 is its negative.

    Returns:
        [N, H, W] from 0 to 1, or None where the network has no feature maps.
    """
    model.eval()
    with torch.enable_grad():
        with torch.no_grad():
            features = model.forward_features(images)
        if not isinstance(features, Tensor) or features.dim() != 4:
            return None
        features = features.float().requires_grad_()
        logits = model.forward_head(features)
        if logits.shape[1] == 1:
            score = (logits[:, 0] * (2 * labels - 1)).sum()
        else:
            score = logits.gather(1, labels[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, features)
    maps = functional.relu((gradient.mean((2, 3), keepdim=True) * features.detach()).sum(1, keepdim=True))
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
