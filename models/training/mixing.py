"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) for batches of any size, odd ones included."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cellops.models.training.losses import soft
from cellops.models.training.settings import MixingSettings


def mix(
    images: Tensor, targets: Tensor, classes: int, settings: MixingSettings, draw: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Mix every image of a batch with the one at the mirrored place; in an odd batch the middle one stays itself.

    Args:
        images: [N, C, H, W].
        targets: [N] class numbers.
        classes: K.
        settings: what to draw.
        draw: seed, epoch and number of the batch; the only source of randomness.

    Returns:
        The mixed images and their targets [N, K]; the targets are probabilities also where this batch is not mixed.
    """
    wanted = soft(targets, classes, torch.float32)
    generator = np.random.default_rng(draw)
    if generator.random() >= settings.probability:
        return images, wanted
    cut = settings.cutmix > 0 and (settings.mixup <= 0 or generator.random() < settings.switch)
    alpha = settings.cutmix if cut else settings.mixup
    keep = float(generator.beta(alpha, alpha))
    if cut:
        height, width = images.shape[-2:]
        side = math.sqrt(1 - keep)
        rows, columns = int(height * side), int(width * side)
        row, column = int(generator.integers(height)), int(generator.integers(width))
        top, bottom = max(row - rows // 2, 0), min(row + rows // 2, height)
        left, right = max(column - columns // 2, 0), min(column + columns // 2, width)
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
        keep = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = torch.lerp(images.flip(0), images, keep)
    return mixed, wanted * keep + wanted.flip(0) * (1 - keep)
