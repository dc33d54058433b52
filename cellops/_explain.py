"""What was compiled, the versions at work, and which backend each op takes where, and why not the others."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from cellops import _backend, _native, _source_tree
from cellops._version import __version__

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Row:
    """The backend that one op takes without `backend=` on one device, for the dtypes that share the answer."""

    op: str
    device: str
    dtypes: tuple[str, ...]
    backend: str
    reasons: dict[str, str]  # of each backend not taken


@dataclass(frozen=True)
class Explanation:
    """What `cellops.explain()` found; prints as a table.

    Attributes:
        versions: of python, cellops, torch, triton and numpy; "not installed" where one is missing.
        library: "file", "version", "compiler", "cuda" and "isa" (the instruction-set variant in use) of the compiled
            library, or "missing" with the reason.
        isa_variants: each compiled variant, and whether this CPU can run it; empty without the library.
        gpu: the name of the first CUDA device, or why there is none.
        rows: the backends.
    """

    versions: dict[str, str]
    library: dict[str, str]
    isa_variants: dict[str, bool]
    gpu: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        facts = {"versions": ", ".join(f"{name} {text}" for name, text in self.versions.items())}
        if "missing" in self.library:
            facts["library"] = "missing: " + self.library["missing"]
        else:
            facts["library"] = "{file} (version {version}, {compiler})".format(**self.library)
            facts["isa"] = f"{self.library['isa']} in use; compiled: " + ", ".join(
                name if supported else f"{name} (not on this CPU)" for name, supported in self.isa_variants.items()
            )
            facts["cuda kernels"] = self.library["cuda"]
        facts["gpu"] = self.gpu
        cells = [("op", "device", "dtypes", "backend")]
        cells += [(row.op, row.device, ", ".join(row.dtypes), row.backend) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [f"{name:<14}{text}" for name, text in facts.items()] + [""]
        for cell, row in zip(cells, (None, *self.rows), strict=True):
            lines.append("  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip())
            if row is not None:
                lines += [f"    not {name}: {reason}" for name, reason in row.reasons.items() if name != "reference"]
        return "\n".join(lines)

    __repr__ = __str__


def explain() -> Explanation:
    """Say what was compiled, the versions, and which backend each op takes on each device and why not the others."""
    rows = tuple(row for op in _backend.OPS for device in DEVICES for row in _rows(op, device))
    if _native.error is None:
        module = _native.library()
        library = {"file": str(_native.library_path()), "isa": module.isa(), **module.build_info()}
        variants = dict(module.isa_variants())
    else:
        library, variants = {"missing": str(_native.error)}, {}
    return Explanation(_versions(), library, variants, _gpu(), rows)


def _rows(op: str, device: str) -> list[Row]:
    answers: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for dtype in DTYPES:
        choice = _backend.preferred(op, device, dtype)
        key = (choice.name, tuple(choice.reasons.items()))
        answers.setdefault(key, []).append(str(dtype).removeprefix("torch."))
    return [Row(op, device, tuple(names), taken, dict(reasons)) for (taken, reasons), names in answers.items()]


def _versions() -> dict[str, str]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    source = " (source tree)" if _source_tree.is_source_tree() else ""
    return {
        "python": platform.python_version(),
        "cellops": __version__ + source,
        "torch": torch.__version__,
        "triton": of("triton"),
        "numpy": of("numpy"),
    }


def _gpu() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return "none: torch was built without CUDA" if torch.version.cuda is None else "none: torch sees no CUDA device"
