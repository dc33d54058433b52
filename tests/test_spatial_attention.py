"""`spatial_attention` where cases drawn at random do not reach: ties, NaN, and the modules it stands in for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cellops
from cellops import SpatialAttention, _native, spatial_attention

each_layout = pytest.mark.parametrize(
    "layout", [pytest.param(torch.contiguous_format, id="nchw"), pytest.param(torch.channels_last, id="channels_last")]
)
each_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(_native.error is not None, reason=str(_native.error))),
        "reference",
    ],
)
each_dtype = pytest.mark.parametrize("dtype", list(_native.DTYPE_CODES), ids=str)


@each_backend
@each_layout
@each_dtype
@pytest.mark.parametrize("channels", [3, 40])
def test_the_gradient_of_a_maximum_is_shared_by_ties(
    channels: int, dtype: torch.dtype, layout: torch.memory_format, backend: str
) -> None:
    """Two of the channels reach the maximum at one pixel, every one at another, one at the third.

    The weights let the maximum through at the pixel itself, and the scale is 1/2 there: with grad_output 1 a pixel's
    logit has the gradient sum(x) / 4, and half, all or one of the channels share it.
    """
    input = torch.zeros(1, channels, 1, 3, dtype=dtype)
    input[0, :, 0, 1] = 4.0
    input[0, 0, 0, 0] = input[0, channels - 1, 0, 0] = input[0, channels - 1, 0, 2] = 4.0
    input[0, 1, 0, 0] = -4.0
    weight = torch.zeros(1, 2, 3, 3, dtype=dtype)
    weight[0, 0, 1, 1] = 1.0
    bias = torch.full((1,), -4.0, dtype=dtype)
    leaf = input.contiguous(memory_format=layout).requires_grad_()
    output = spatial_attention(leaf, weight, bias, "pool", backend=backend)
    assert torch.equal(output.detach(), input / 2)
    output.backward(torch.ones_like(input))
    wanted = torch.full_like(input, 0.5)
    wanted[0, 0, 0, 0] += 0.5  # 4 / 4, for two
    wanted[0, channels - 1, 0, 0] += 0.5
    wanted[0, :, 0, 1] += 1.0  # 4 * channels / 4, for all
    wanted[0, channels - 1, 0, 2] += 1.0
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-6, atol=1e-6)


@each_backend
@each_layout
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channel", [0, 18])
@pytest.mark.parametrize(("mode", "kernel"), [("conv", 1), ("conv", 3), ("pool", 1), ("pool", 3)])
def test_nan_and_infinity_are_where_eager_has_them(
    mode: str, kernel: int, channel: int, value: float, layout: torch.memory_format, backend: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 19, 6, 21, generator=generator)
    input[1, channel, 2, 3] = value
    weight = torch.randn(1, 19 if mode == "conv" else 2, kernel, kernel, generator=generator)
    source = input if mode == "conv" else torch.cat((input.amax(1, keepdim=True), input.mean(1, keepdim=True)), 1)
    wanted = input * nn.functional.conv2d(source, weight, padding=kernel // 2).sigmoid()
    found = spatial_attention(input.contiguous(memory_format=layout), weight, None, mode, backend=backend)
    torch.testing.assert_close(found, wanted, equal_nan=True)
    assert found.isfinite().sum() < found.numel()


@each_backend
@pytest.mark.parametrize("logit", [-1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 200.0, 1e30])
def test_gates_of_all_sizes(logit: float, backend: str) -> None:
    input = torch.randn(2, 5, 3, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight, bias = torch.zeros(1, 5, 1, 1, requires_grad=True), torch.full((1,), logit, requires_grad=True)
    output = spatial_attention(input, weight, bias, backend=backend)
    torch.testing.assert_close(output, input * torch.tensor(logit).sigmoid(), rtol=1e-6, atol=1e-37)
    output.square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (input, weight, bias))


@each_layout
@pytest.mark.parametrize("mode", ["conv", "pool"])
@pytest.mark.parametrize("kernel_size", [None, 1, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_module_is_the_plain_composition(
    mode: str, kernel_size: int | None, bias: bool, layout: torch.memory_format
) -> None:
    module = SpatialAttention(24, kernel_size, mode).to(memory_format=layout)
    assert module.conv.kernel_size == ((kernel_size or {"conv": 1, "pool": 7}[mode]),) * 2
    assert list(module.state_dict()) == ["conv.weight", "conv.bias"]
    if not bias:
        module.conv.bias = None

    def composed(input: torch.Tensor) -> torch.Tensor:
        source = input if mode == "conv" else torch.cat((input.amax(1, keepdim=True), input.mean(1, keepdim=True)), 1)
        return input * module.conv(source).sigmoid()

    input = torch.randn(3, 24, 9, 20).contiguous(memory_format=layout)
    results = []
    for function in (module, composed):
        leaf = input.detach().requires_grad_()
        output = function(leaf)
        gradients = torch.autograd.grad(output.square().sum(), (leaf, *module.parameters()))
        results.append((output, *gradients))
    assert results[0][0].is_contiguous(memory_format=layout)
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@each_layout
def test_pool_is_timms_with_the_channels_of_its_weight_swapped(layout: torch.memory_format) -> None:
    """timm stacks the mean before the maximum and has a BatchNorm of one channel, here folded."""
    cbam = pytest.importorskip("timm.layers.cbam")
    theirs = cbam.SpatialAttn().eval()
    norm = theirs.conv.bn
    nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias)
    ours = SpatialAttention(mode="pool")
    with torch.no_grad():
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        ours.conv.weight.copy_(theirs.conv.conv.weight.flip(1) * factor)
        ours.conv.bias.copy_(norm.bias - norm.running_mean * factor)
    leaves = [torch.randn(2, 20, 9, 8).contiguous(memory_format=layout).requires_grad_() for _ in range(2)]
    leaves[1].data.copy_(leaves[0].data)
    outputs = [module(leaf) for module, leaf in zip((ours, theirs), leaves, strict=True)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_errors() -> None:
    input = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match="mode must be one of 'conv', 'pool', got 'max'"):
        spatial_attention(input, torch.randn(1, 4, 1, 1), mode="max")
    for shape in [(1, 4, 2, 2), (2, 4, 1, 1), (1, 2, 3, 3), (1, 4, 3, 1), (1, 4, 3)]:
        with pytest.raises(ValueError, match=r"weight must have shape \(1, 4, k, k\) with an odd k, got"):
            spatial_attention(input, torch.randn(shape))
    with pytest.raises(ValueError, match=r"weight must have shape \(1, 2, k, k\) with an odd k, got \(1, 4, 7, 7\)"):
        spatial_attention(input, torch.randn(1, 4, 7, 7), mode="pool")
    with pytest.raises(ValueError, match=r"bias must have shape \(1,\), got \(4,\)"):
        spatial_attention(input, torch.randn(1, 4, 1, 1), torch.randn(4))


def test_errors_of_the_module() -> None:
    with pytest.raises(ValueError, match="mode must be one of 'conv', 'pool', got 'max'"):
        SpatialAttention(4, mode="max")
    with pytest.raises(ValueError, match="channels must be given for mode='conv', got None"):
        SpatialAttention()
    for kernel_size in (4, 0, -1):
        with pytest.raises(ValueError, match=f"kernel_size must be odd and at least 1, got {kernel_size}"):
            SpatialAttention(4, kernel_size)
    assert repr(cellops.SpatialAttention(mode="pool")).startswith("SpatialAttention(\n  mode='pool'")
