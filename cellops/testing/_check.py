"""The tolerances a backend is held to, and a call with its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cellops.testing._case import Arguments

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-9, 1e-10)}
"""Per dtype: rtol, and atol of a sum of one term; atol grows with sqrt(terms). Half types are held to eager's error."""

STATISTICS = ("mean", "var")
"""What ops with batch statistics return after their output."""

BLOCK = 2**15
"""Elements compared at a time: temporaries stay in the cache, or a layer of real size takes longer to compare than to
compute."""

HALF_ERROR_RATIO = 2.0
"""A half type's largest error may be this many times that of the eager reference at the same dtype."""


def assert_close_to_reference(
    actual: Tensor, expected: Tensor, *, terms: int, eager: Tensor | None = None, what: str = "output"
) -> None:
    """Hold a result to the tolerance of its dtype.

    Args:
        actual: what a backend returned, float32, float64 or a half type.
        expected: the float64 reference on the same values.
        terms: products summed per element (`Case.terms`).
        eager: for half types, what the eager reference returns at that dtype; its largest error is the measure. To
            twice that comes half a unit in the last place of the largest expected value: a correctly rounded result
            always passes, also where eager is exact by luck, as it may be on a few elements.
        what: the tensor's name in the message.

    Raises:
        AssertionError: shape or a value is off.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    found, wanted = actual.detach().cpu(), expected.detach().double().cpu()
    if actual.dtype in TOLERANCES:
        rtol, atol = TOLERANCES[actual.dtype]
        atol *= max(terms, 1) ** 0.5
        blocks = zip(found.flatten().split(BLOCK), wanted.flatten().split(BLOCK), strict=True)
        if all(torch.allclose(one.double(), other, rtol, atol, equal_nan=True) for one, other in blocks):
            return
        torch.testing.assert_close(
            found.double(), wanted, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )
        return
    assert eager is not None, f"{what}: {actual.dtype} needs eager's result to compare with"
    found = found.double()
    assert torch.equal(found.isnan(), wanted.isnan()), f"{what}: NaN in other places than the reference"
    if found.numel() == 0:
        return
    error, eager_error = (
        (value - wanted).nan_to_num(0.0).abs().max() for value in (found, eager.detach().double().cpu())
    )
    half_unit = torch.finfo(actual.dtype).eps / 2 * wanted.nan_to_num(0.0).abs().max()
    limit = HALF_ERROR_RATIO * eager_error + half_unit
    assert error <= limit, f"{what}: largest error {error:.3e}, eager's is {eager_error:.3e}, the limit {limit:.3e}"


def forward_and_gradients(
    function: Callable[..., Tensor],
    arguments: Arguments,
    grad_output: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Run a call and its backward: "output" and, under its argument's name, the gradient to each floating-point tensor.

    Statistics that the call returns after its output come under "mean" and "var".

    Args:
        function: called with `arguments` as keywords.
        arguments: its tensors are detached and required to have a gradient.
        grad_output: gradient of the output, converted to its dtype and layout; None draws one from a fixed seed.
        grad_dtype: what the drawn one is rounded to first, so that a wider oracle sees the same values.
    """
    leaves = {key: value.detach().requires_grad_() for key, value in arguments.items() if isinstance(value, Tensor)}
    found: Any = function(**{**arguments, **leaves})
    output, *statistics = found if isinstance(found, tuple) else (found,)
    if grad_output is None:
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grad_output = grad_output.to(grad_dtype or output.dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), torch.empty_like(output).copy_(grad_output))
    named = dict(zip(STATISTICS, statistics, strict=False))
    return {"output": output.detach(), **named, **dict(zip(leaves, gradients, strict=True))}


def to_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same call with every tensor converted, its layout kept."""
    return {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in arguments.items()}
