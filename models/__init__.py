"""Models, training and tools on top of the ops of `cellops`.

The names of the model zoo are imported at their first use, so that `cellops doctor` runs without the [models] extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellops.models.prediction.predictor import Predictor
    from cellops.models.registry import create_model, list_models, model_source, register_network

__all__ = ["Predictor", "create_model", "list_models", "model_source", "register_network"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Predictor":
        from cellops.models.prediction.predictor import Predictor

        return Predictor
    from cellops.models import registry

    return getattr(registry, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
