"""Registers the FLOP formulas as soon as torch's counter is imported, and not before: it imports triton."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

COUNTER = "torch.utils.flop_counter"
FORMULAS = "cellops._flops"


class CounterFinder:
    """Finds torch's counter as the other finders do, once, and adds a step behind its execution."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(CounterFinder)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(FORMULAS)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register the formulas now if the counter is there, else once it is imported."""
    if COUNTER in sys.modules:
        importlib.import_module(FORMULAS)
    elif CounterFinder not in sys.meta_path:
        sys.meta_path.insert(0, CounterFinder)  # type: ignore[arg-type]
