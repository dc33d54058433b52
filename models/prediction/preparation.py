"""From a decoded image to a network's input, as in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellops.models.data import build_augmentation
from cellops.models.data.augment import Augmentation
from cellops.models.data.store import RESIZES, resized
from cellops.models.training.settings import Recipe

UNCHANGED = {"mean": 0.0, "std": 1.0}
MOST = 8192  # pixels a side; a network's file that asks for more asks for all memory


@dataclass(frozen=True)
class Preparation:
    """Resizing, window and normalisation; called with uint8 [H, W, 3] it gives the input [3, height, width].

    Attributes:
        input_size: (height, width) of the network's input.
        store_size: (height, width) that an image is resized to first.
        resize: how; see `resized`.
        augmentation: of the recipe, of which only what counts in evaluation is used; see `build_augmentation`.

    Raises:
        ValueError: a size is not from 1 to MOST pixels.
    """

    input_size: tuple[int, int]
    store_size: tuple[int, int]
    resize: str = "squash"
    augmentation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, size in (("input_size", self.input_size), ("store_size", self.store_size)):
            if not all(1 <= side <= MOST for side in size):
                raise ValueError(f"{name} must be (height, width) of 1 to {MOST} pixels each, got {size}")

    @classmethod
    def of(cls, recipe: Recipe) -> Preparation:
        """That of a recipe."""
        height, width = recipe.data.input_size
        stored_height, stored_width = recipe.data.store_size or recipe.data.input_size
        return cls((height, width), (stored_height, stored_width), recipe.data.resize, dict(recipe.augmentation))

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Preparation:
        """What `values` gave.

        Raises:
            ValueError: a value is missing or of no use.
        """
        try:
            (height, width), (stored_height, stored_width) = values["input_size"], values["store_size"]
            resize, augmentation = values["resize"], dict(values["augmentation"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"input_size, store_size, resize and augmentation must be given: {error}") from None
        if resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {resize!r}")
        build_augmentation(augmentation, (int(height), int(width)), False)  # so that a wrong key shows now
        return cls((int(height), int(width)), (int(stored_height), int(stored_width)), resize, augmentation)

    def values(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "input_size": list(self.input_size),
            "store_size": list(self.store_size),
            "resize": self.resize,
            "augmentation": dict(self.augmentation),
        }

    def with_input_size(self, input_size: tuple[int, int]) -> Preparation:
        """The same for another size of the network's input.

        The stored size grows or shrinks with it, so that the same window is seen, from pixels that are there.
        """
        (height, width), (old_height, old_width) = input_size, self.input_size
        stored_height, stored_width = self.store_size
        stored = max(1, round(stored_height * height / old_height)), max(1, round(stored_width * width / old_width))
        return replace(self, input_size=input_size, store_size=stored)

    def without_normalisation(self) -> Preparation:
        """The same with values from 0 to 1, to be looked at."""
        return replace(self, augmentation={**self.augmentation, "normalise": UNCHANGED})

    @cached_property
    def _augmentation(self) -> Augmentation:
        return build_augmentation(self.augmentation, self.input_size, False)

    def __call__(self, image: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(resized(image, self.store_size, self.resize).copy()).permute(2, 0, 1)
        return self._augmentation(pixels, torch.Generator())
