"""Where a module gives its place to PyTorch's own ops under `torch.compile`: Inductor makes faster code of them.

A call of an op costs about 25 µs in a compiled program, and what stands before and after it cannot be fused with it:
a normalisation or a sum is one reading and one writing of the map more. In inference, where an op saves less than that,
it stands back. The rule looks at one image, not at the batch, which would cost a graph for some batch sizes; and for
the same reason at sizes that are known while compiling, not at dynamic ones.
docs/compile.md has the figures, benchmarks/bench_compile.py takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEWEST: dict[str, tuple[int, int]] = {
    "squeeze_excite": (262_144, 262_144),
    "eca": (262_144, 262_144),
    "frelu": (16_384, 65_536),
    "depthwise_conv2d": (262_144, 262_144),
    "group_conv1x1": (8_192, 8_192),
    "spatial_attention conv": (0, 262_144),
    "spatial_attention pool": (262_144, 524_288),
}
"""From how many numbers in an image on an op is called, in NCHW and in channels_last; others always are.

Behind an op's name may stand a mode of it.
"""


def stands_back(op: str, input: Tensor, *others: Tensor | nn.Module | None) -> bool:
    """Whether the composition of PyTorch's ops is to be compiled in place of an op.

    Only in float32 inference on a CPU, where it was measured; never where a program is exported, which runs without
    Inductor. Under autocast and with other types among its arguments the op is called: it converts, or raises.

    Args:
        op: its name, a key of `FEWEST`.
        input: [N, C, H, W].
        others: the op's other tensors, or modules that hold them.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or op not in FEWEST:
        return False
    if torch.is_grad_enabled() or input.device.type != "cpu" or torch.is_autocast_enabled("cpu") or input.dim() != 4:
        return False
    for other in others:
        for one in other.parameters() if isinstance(other, nn.Module) else (other,):
            if one is not None and (one.dtype != torch.float32 or one.device != input.device):
                return False
    if input.dtype != torch.float32:
        return False
    if 0 in input.shape[1:]:  # some ops refuse empty images
        return False
    channels_last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
    return _is_known(input.shape[1] * input.shape[2] * input.shape[3] < FEWEST[op][channels_last])


def _is_known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; False where they are dynamic and some do not meet it.

    Asking would split a compiled program there: networks of many maps would have more programs than torch allows, each
    for some resolutions.
    """
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, which a compiler has

    return statically_known_true(condition)
