"""Sums that the Triton kernels keep for each element of a tile: what is not finite in them, and numbers far from 0."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch
from conftest import INTERPRETER_ERROR

from cellops import depthwise_conv2d, group_conv1x1
from cellops.ops.group_conv1x1 import group_conv1x1_batch_norm
from cellops.testing import forward_and_gradients

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETER_ERROR is not None and not torch.cuda.is_available(), reason=str(INTERPRETER_ERROR)),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("height", [1, 4, 5, 9])
def test_weights_of_maps_see_no_rows_below_the_image(height: int, kernel: int) -> None:
    """Threads go by strips of rows: an infinity reaches the taps of the pixels that there are alone."""
    from cellops.triton.spatial_attention import _grad_map_weight

    generator = torch.Generator().manual_seed(0)
    width, half = 3, kernel // 2
    source = torch.randn(2, 2, height, width, generator=generator)
    grad = torch.rand(2, height, width, generator=generator) + 0.5
    source[0, 1, height - 1, 1] = torch.inf
    padded = torch.nn.functional.pad(source, (half,) * 4)
    wanted = torch.stack(
        [
            (padded[:, :, i : i + height, j : j + width] * grad).sum((1, 2, 3))
            for i in range(kernel)
            for j in range(kernel)
        ],
        1,
    )
    found = _grad_map_weight(source.to(DEVICE), grad.to(DEVICE), kernel)
    torch.testing.assert_close(found.cpu().reshape(2, -1), wanted, rtol=1e-5, atol=1e-5)
    assert torch.isinf(wanted).any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("given", ["input", "weight"])
def test_products_in_parts_keep_infinities(given: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Gradients of float32 are multiplied in two parts: the second, mostly 0 here, times infinity would be NaN."""
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "input": torch.randn(2, 6, 5, 7, generator=generator).to(dtype).contiguous(memory_format=layout),
        "weight": torch.randn(4, 3, 1, 1, generator=generator).to(dtype),
    }
    arguments[given][0, 0, 0, 0] = torch.inf
    # The reference on the CPU: on a GPU PyTorch's own convolutions of float32 are TF32's.
    found, wanted = (
        forward_and_gradients(
            functools.partial(group_conv1x1, groups=2, backend=backend),
            {name: tensor.to(device) for name, tensor in arguments.items()},
        )
        for backend, device in (("triton", DEVICE), ("reference", "cpu"))
    )
    assert any(torch.isinf(tensor).any() for name, tensor in wanted.items() if name != "output")
    for name in ("output", "input", "weight"):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[name].cpu(), wanted[name], rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_statistics_of_a_grouped_convolution_far_from_zero(layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    input = 1000 + torch.randn(4, 2, 19, 20, generator=generator)  # 1520 pixels: the last tile is not full
    weight = torch.ones(2, 1, 1, 1)
    given = input.to(DEVICE).contiguous(memory_format=layout)
    _, mean, variance = group_conv1x1_batch_norm(given, weight.to(DEVICE), groups=2, backend="triton")
    wanted = input.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.cpu().double(), wanted.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.cpu().double(), wanted.var(1, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_taps_see_no_outputs_beyond_the_image(layout: torch.memory_format) -> None:
    """Lanes go by strips: an infinity in the last corner reaches the four taps of pixels that there are alone."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(1, 2, 5, 5, generator=generator).contiguous(memory_format=layout)
    input[:, :, -1, -1] = torch.inf
    weight = torch.rand(2, 1, 3, 3, generator=generator, device="cpu").to(DEVICE).requires_grad_()
    depthwise_conv2d(input.to(DEVICE), weight, backend="triton").sum().backward()
    assert torch.equal(
        weight.grad[:, 0].isfinite().cpu(), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 0]]).bool().expand(2, 3, 3)
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_long_strips_and_parts_of_several_blocks(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """What large batches have: a small one has it, too, on a device of one multiprocessor and with fewer threads."""
    from cellops.ops.frelu import frelu_batch_norm
    from cellops.triton import _depthwise

    monkeypatch.setattr(_depthwise, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(_depthwise, "THREADS", 8)
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "input": 3 + torch.randn(26, 12, 5, 2, generator=generator).contiguous(memory_format=layout),
        "weight": torch.randn(12, 1, 3, 3, generator=generator),
        "gamma": torch.rand(12, generator=generator) + 0.5,
        "beta": torch.randn(12, generator=generator),
        "eps": 1e-3,
    }
    strips = _depthwise.strips(arguments["input"], 3)
    assert strips.rows == 5
    assert strips.part_strips > strips.block_p

    def given(dtype: torch.dtype) -> dict[str, object]:
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        return {**arguments, **{name: tensor.to(DEVICE, dtype) for name, tensor in tensors.items()}}

    wanted = forward_and_gradients(functools.partial(frelu_batch_norm, backend="reference"), given(torch.float64))
    found = forward_and_gradients(functools.partial(frelu_batch_norm, backend="triton"), given(torch.float32))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-4, atol=2e-4, msg=name)
