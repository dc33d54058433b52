"""Settings that every test runs under, and the devices there are."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is imported, so before cellops

import numpy

import cellops
from cellops import _native

INTERPRETER_ERROR = (
    "the interpreter of Triton 3.6 needs numpy < 2.4: it makes integers of arrays with one element"
    if find_spec("triton") is not None
    and version("triton").startswith("3.6.")
    and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
    else None
)
"""Why Triton's interpreter cannot run here, or None."""

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_report_header() -> list[str]:
    """Which cellops is tested."""
    library = str(_native.error or f"isa {_native.library().isa()}, {_native.library_path()}")
    return [f"cellops {cellops.__version__} from {os.path.dirname(cellops.__file__)}", f"library: {library}"]


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Fresh memory of torch holds NaN, so that an element no kernel wrote shows; the thread count is put back."""
    threads = torch.get_num_threads()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device that this machine has."""
    return torch.device(request.param)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=20, metavar="N", help="examples of each op in tests/test_fuzz.py")


@pytest.fixture
def fuzz_examples(request: pytest.FixtureRequest) -> int:
    """How many examples of each op to draw."""
    return request.config.getoption("fuzz")


@pytest.fixture
def spare_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks that a test registers are gone after it, from timm's registry too."""
    from timm.models import _registry as of_timm

    from cellops.models import list_models, registry

    list_models()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    tables = (of_timm._model_entrypoints, of_timm._model_to_module)
    before = [set(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        for name in set(table) - known:
            del table[name]
