"""Loads the compiled library `cellops._C` once; where it cannot be loaded, keeps the reason and raises it at first use.

The library knows no torch: the helpers here turn tensors into what it takes (addresses, dtype codes, layout flags).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import struct
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch  # before _C: both name libgomp.so.1, and one OpenMP runtime (torch's) must serve both
from torch import Tensor

from cellops import _source_tree
from cellops._version import __version__

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The library's code of each storage dtype that it has kernels for."""


def _load() -> ModuleType:
    library = _source_tree.library() if _source_tree.is_source_tree() else None
    if library is None or library.parent == _source_tree.PACKAGE:
        spec = importlib.util.find_spec("cellops._C")
        if spec is None:
            raise ImportError(_not_found())
        if spec.origin is not None:
            _expect_whole(Path(spec.origin))
        return importlib.import_module("cellops._C")
    _expect_whole(library)
    spec = importlib.util.spec_from_file_location("cellops._C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["cellops._C"] = module
    return module


def _expect_whole(library: Path) -> None:
    """Raise ImportError for a file that was cut off: its pages are mapped, and the missing ones end Python.

    What ELF's header says of a 64-bit file is compared with the file's size; other files are left to the loader, and so
    are those that cannot be read.
    """
    try:
        file = library.open("rb")
    except OSError:
        return
    with file:
        size, header = os.fstat(file.fileno()).st_size, file.read(64)
        if header[:5] != b"\x7fELF\x02" or len(header) < 64:
            return
        order = "<" if header[5] == 1 else ">"
        programs, sections, program_size, program_count, section_size, section_count = struct.unpack_from(
            f"{order}32xQQ6xHHHH", header
        )
        ends = [programs + program_size * program_count, sections + section_size * section_count]
        file.seek(programs)
        table = file.read(program_size * program_count)
        for start in range(0, len(table) - 55, max(program_size, 56)):
            offset, length = struct.unpack_from(f"{order}8xQ16xQ", table, start)  # in the file, of a segment
            ends.append(offset + length)
    if size < max(ends):
        raise ImportError(
            f"the compiled library {library} was cut off: it has {size} of at least {max(ends)} bytes. "
            "Copy or install it again"
        )


def _not_found() -> str:
    if _source_tree.is_source_tree():
        where = f"in the source tree {_source_tree.PACKAGE}, nor in an installed cellops"
        remedy = "`pip install .` or `pip install -e .` builds it"
    else:
        where = f"in the installed package {_source_tree.PACKAGE}"
        remedy = "`pip install .` in a clone of cellops, by this Python's pip, builds it"
    return f"the compiled library cellops._C for {sys.implementation.cache_tag} is not {where}; {remedy}"


def _warn_if_other_version(module: ModuleType) -> None:
    built = module.build_info()["version"]
    if built != __version__:
        warnings.warn(
            f"cellops {__version__} at {_source_tree.PACKAGE} uses the compiled library of version {built} at "
            f"{module.__file__}. Rebuild it: `pip install .`",
            stacklevel=2,
        )


_C: ModuleType | None = None
error: ImportError | None = None
"""Why the library could not be loaded; None where it was."""

try:
    _C = _load()
except ImportError as reason:
    if "CELLOPS_ISA" in os.environ and "CELLOPS_ISA" in str(reason):
        raise  # asked for explicitly: never answered by the reference
    error = reason
else:
    _warn_if_other_version(_C)


def library() -> ModuleType:
    """The compiled module `cellops._C`.

    Raises:
        ImportError: with the recorded reason, where it could not be loaded.
    """
    if _C is None:
        raise ImportError(f"cellops runs without its compiled library: {error}") from error
    return _C


def library_path() -> Path | None:
    """The file that `_C` was loaded from, or None."""
    return None if _C is None or _C.__file__ is None else Path(_C.__file__)


def pointer(tensor: Tensor | None) -> int:
    """The address of the tensor's first element; 0 stands for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a 4-D tensor has its channels innermost, as slices of channels_last do too; not if both orders agree."""
    return (
        not tensor.is_contiguous()
        and tensor.stride(1) == 1
        and tensor.shape[1] > 1
        and (tensor.shape[2] > 1 or tensor.shape[3] > 1)
    )


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The format that an output keeps from this 4-D tensor."""
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format


def dense(tensor: Tensor) -> Tensor:
    """The 4-D tensor itself if it is dense in one of the two layouts the library reads, else a copy that is."""
    return tensor.contiguous(memory_format=memory_format(tensor))


def threads() -> int:
    """How many threads a kernel may use, as the user set it for torch."""
    return torch.get_num_threads()
