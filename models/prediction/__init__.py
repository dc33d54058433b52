"""Trained networks on images without labels: in Python, as a command that can be killed and resumed, and on Ray."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellops.models.prediction.job import predict_images
    from cellops.models.prediction.predictor import Prediction, Predictor

_HOMES = {"Prediction": "predictor", "Predictor": "predictor", "predict_images": "job"}

__all__ = ["Prediction", "Predictor", "predict_images"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
