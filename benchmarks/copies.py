"""Times a module that only moves memory beside its peers, in copies: `x.clone()` of its input in the same turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measure
import pytest
import torch
from torch import Tensor, nn

from cellops import _backend, testing

OURS, COPY = "cellops", "copy"
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
LARGEST_ERROR = {torch.float32: 1e-2, torch.bfloat16: 1e-1}
"""A peer's largest difference from ours, by its norm; eager's own gradients of a FReLU are 3e-3 from float64's."""


def rows(op: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: runs a test on the op's benchmark cases in both types, layouts and directions."""
    parametrize = pytest.mark.parametrize
    marks = (
        parametrize("case", testing.cases(op, "bench"), ids=lambda case: case.name),
        parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]),
        parametrize("layout", list(FORMATS)),
        parametrize("direction", ["forward", "forward+backward"]),
    )

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for mark in marks:
            test = mark(test)
        return test

    return decorate


def compare(
    case: testing.Case,
    modules: dict[str, Callable[[], nn.Module]],
    dtype: torch.dtype,
    layout: str,
    direction: str,
    benchmark: Any,
    record: Any,
) -> None:
    """Record one case.

    Args:
        case: gives the input and names the op.
        modules: ours as "cellops" and one peer that loads its weights; the peer is timed in eager mode and compiled.
        dtype, layout, direction: "forward" (evaluation, no gradients) or "forward+backward".
        benchmark, record: the fixtures.
    """
    assert _backend.preferred(case.op, "cpu", dtype).name == "cpu", (
        "the compiled library is what these figures are about"
    )
    torch.manual_seed(0)
    backward = direction == "forward+backward"
    built = {name: build().to(dtype).train(backward) for name, build in modules.items()}
    weights = built[OURS].state_dict()
    input = case.make(dtype, memory_format=FORMATS[layout])["input"]
    grad_output = torch.randn_like(input)
    variants: measure.Variants = {}
    for name, module in built.items():
        module.load_state_dict(weights)
        variants[name] = call_of(module, input, grad_output if backward else None)
        if name != OURS:
            compiled = torch.compile(module, dynamic=False)
            variants[f"compiled {name}"] = call_of(compiled, input, grad_output if backward else None)
    ours = variants[OURS]()
    skipped = {}
    for name, call in [*variants.items()]:
        found = call()
        if name.startswith("compiled") and any(bool(one.isnan().any()) for one in found):
            skipped[name] = "its results hold NaN, which those of the module that was compiled do not"
            del variants[name]
            continue
        error = largest_error(found, ours)
        assert error < LARGEST_ERROR[dtype], f"{name} differs from ours by {error:.1e} by its norm"
    variants[COPY] = input.clone
    timings = measure.compare(benchmark, OURS, variants)
    copy = timings[COPY]["median"]
    record(
        kind="copies",
        op=case.op,
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        direction=direction,
        variants=timings,
        skipped=skipped,
        copies={name: timing["median"] / copy for name, timing in timings.items()},
        copy_gigabytes_per_second=2 * input.numel() * input.element_size() / copy / 1e9,
    )


def largest_error(found: tuple[Tensor, ...], ours: tuple[Tensor, ...]) -> float:
    """The largest difference of a result by its norm: single elements may fall on another side of a kink.

    Gradients that are zero are left out: of a bias before a batch normalisation, say, where peers have rounding errors.
    """
    return max(
        float((one - other).double().norm() / other.double().norm())
        for one, other in zip(found, ours, strict=True)
        if other.count_nonzero()
    )


def call_of(module: Any, input: Tensor, grad_output: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    """Inference without `grad_output`; with it a forward and the gradients to input and parameters."""
    if grad_output is None:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (module(input),)

        return forward
    leaf = input.detach().requires_grad_()
    leaves = (leaf, *module.parameters())

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(leaf), leaves, grad_output)

    return forward_backward
