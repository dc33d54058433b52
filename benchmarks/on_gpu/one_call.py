"""Forward and backward of an op's small cases with every kernel that it has on a device, for compute-sanitizer.

python benchmarks/on_gpu/one_call.py deform_conv2d cuda
"""

from __future__ import annotations

import functools
import sys

import torch

from cellops import _backend
from cellops.testing import cases, forward_and_gradients

SHOWN = {
    "deform_conv2d": ("plain", "depthwise_multiplier", "crossed_groups"),
    "offset_sample2d": ("offset_basic", "offset_interleaved"),
    "spatial_attention": ("spatial_basic", "spatial_pool3"),
}
"""The cases that take every kernel of their op; of the other ops their first."""


def main(op: str, device: str, small: bool) -> None:
    chosen = [case for case in cases(op, "small") if case.name in SHOWN.get(op, (cases(op, "small")[0].name,))]
    dtypes = (torch.float32,) if small else (torch.float32, torch.float16)
    backends = [name for name in _backend.OPS[op] if _backend.why_not(name, op, device, torch.float32) is None]
    for backend in backends:
        for case in chosen[:1] if small else chosen:
            for dtype in dtypes:
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    for deterministic in (False, True):
                        torch.use_deterministic_algorithms(deterministic, warn_only=True)
                        function = functools.partial(case.function, backend=backend)
                        forward_and_gradients(function, case.make(dtype, device, memory_format))
                        if device == "cuda":
                            torch.cuda.synchronize()
                        mode = "deterministic" if deterministic else "as it comes"
                        print("called", backend, case, dtype, memory_format, mode)


if __name__ == "__main__":
    main(*sys.argv[1:3], small="--small" in sys.argv)
