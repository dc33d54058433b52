"""Recipes and what runs them. The names are imported at their first use, so that reading recipes needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellops.models.training.recipe import RecipeError, load_recipe, recipe_names
    from cellops.models.training.run import Run, prepare, train
    from cellops.models.training.settings import Recipe

_HOMES = {
    "Recipe": "settings",
    "RecipeError": "recipe",
    "Run": "run",
    "load_recipe": "recipe",
    "prepare": "run",
    "recipe_names": "recipe",
    "train": "run",
}

__all__ = ["Recipe", "RecipeError", "Run", "load_recipe", "prepare", "recipe_names", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
