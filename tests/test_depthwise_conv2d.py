"""Depthwise convolution beside the composition of PyTorch's modules that it stands for, and values at the edges."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compositions import CHANNELS, assert_same, called_children, each_layout
from torch import Tensor, nn
from torch.nn import functional as F

import cellops
from cellops import DepthwiseConv2d, depthwise_conv2d
from cellops.ops.depthwise_conv2d import depthwise_conv2d_batch_norm
from cellops.testing import forward_and_gradients, to_dtype

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
each_activation = pytest.mark.parametrize("activation", list(ACTIVATIONS))


class Composition(nn.Module):
    """The modules one after the other, with the children's names of `DepthwiseConv2d`."""

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        norm: bool = True,
        activation: str = "relu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, stride, kernel_size // 2, groups=channels, bias=bias)
        self.bn = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.activation = ACTIVATIONS[activation]

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(input)))


def pair(change: Callable[[nn.Module], object] = lambda module: None, **options: Any) -> list[nn.Module]:
    """Ours and the composition with the same random parameters, changed alike."""
    torch.manual_seed(0)
    theirs = Composition(CHANNELS, **options)
    for tensor in theirs.parameters():
        nn.init.normal_(tensor)
    if isinstance(theirs.bn, nn.BatchNorm2d):
        nn.init.normal_(theirs.bn.running_mean)
        nn.init.uniform_(theirs.bn.running_var, 0.5, 2.0)
    ours = DepthwiseConv2d(CHANNELS, **options)
    ours.load_state_dict(theirs.state_dict())
    for module in (ours, theirs):
        change(module)
    return [ours, theirs]


def without_affine(module: nn.Module) -> None:
    module.bn = nn.BatchNorm2d(CHANNELS, affine=False)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "plain": lambda module: module,
    "eval": nn.Module.eval,
    "frozen": lambda module: module.bn.eval(),
    "cumulative": lambda module: setattr(module.bn, "momentum", None),
    "without_affine": without_affine,
    "without_affine_eval": lambda module: (without_affine(module), module.eval()),
    "untracked": lambda module: setattr(module.bn, "track_running_stats", False),
}


@pytest.fixture
def always_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the module would be compared with itself where it stands back."""
    monkeypatch.setattr("cellops.nn.depthwise_conv2d._plain_is_faster", lambda *arguments: False)


@pytest.mark.usefixtures("always_fused")
@each_layout
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_same_as_the_composition(change: str, bias: bool, layout: torch.memory_format) -> None:
    ours, theirs = pair(CHANGES[change], bias=bias)
    assert called_children(ours, torch.randn(2, CHANNELS, 5, 5).contiguous(memory_format=layout)) == 0
    assert_same(ours, theirs, layout)


@pytest.mark.usefixtures("always_fused")
@each_layout
@each_activation
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_activations_and_sizes(norm: bool, activation: str, layout: torch.memory_format) -> None:
    for kernel_size in (1, 3, 5):
        assert_same(*pair(kernel_size=kernel_size, activation=activation, norm=norm, bias=not norm), layout, steps=1)


@each_layout
@pytest.mark.parametrize("side", [7, 16])
@pytest.mark.parametrize(("kernel_size", "inference"), [(3, 0), (5, 2)])
def test_stands_back_where_plain_modules_are_faster(
    kernel_size: int, inference: int, side: int, layout: torch.memory_format
) -> None:
    """How many children are called."""
    input = torch.randn(2, CHANNELS, side, side).contiguous(memory_format=layout)
    module = DepthwiseConv2d(CHANNELS, kernel_size)
    assert called_children(module, input) == 0
    with torch.no_grad():
        assert called_children(module.eval(), input) == inference


@pytest.mark.parametrize("multiplies", [False, True])
def test_stands_back_only_where_onednn_has_loops(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellops.nn._onednn.multiplies_bfloat16", lambda: multiplies)
    module, input = DepthwiseConv2d(CHANNELS, 5).eval(), torch.randn(2, CHANNELS, 6, 6)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert called_children(module, input) == 2 * multiplies
        assert called_children(module, input) == 2
        for dtype, calls in ((torch.float64, 0), (torch.float16, 0), (torch.bfloat16, 2 * multiplies)):
            assert called_children(module.to(dtype), input.to(dtype)) == calls


@each_layout
def test_same_where_it_stands_back(layout: torch.memory_format) -> None:
    input = torch.randn(3, CHANNELS, 9, 7).contiguous(memory_format=layout)
    ours, theirs = pair(kernel_size=5, bias=True, change=nn.Module.eval)
    with torch.no_grad():
        assert called_children(ours, input) == 2
        torch.testing.assert_close(ours(input), theirs(input), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [2, 3])
def test_a_stride_calls_the_children(stride: int) -> None:
    ours, theirs = pair(stride=stride)
    assert called_children(ours, torch.randn(2, CHANNELS, 9, 7)) == 2
    assert_same(ours, theirs, torch.contiguous_format)


def test_children_that_were_changed_or_are_watched_are_called() -> None:
    input = torch.randn(2, CHANNELS, 5, 5)
    for child in ("conv", "bn"):
        seen: list[int] = []
        ours, theirs = pair()
        for module in (ours, theirs):
            getattr(module, child).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert_same(ours, theirs, torch.contiguous_format, steps=1)
        assert len(seen) == 2
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(DepthwiseConv2d(CHANNELS)).eval()
    assert called_children(converted, input) == 2
    circular = DepthwiseConv2d(CHANNELS)
    circular.conv.padding_mode, circular.conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    assert called_children(circular, input) == 2


def test_one_value_per_channel_raises_as_batch_norm_does() -> None:
    ours, theirs = pair()
    with pytest.raises(ValueError) as expected:
        theirs(torch.randn(1, CHANNELS, 1, 1))
    with pytest.raises(ValueError) as found:
        ours(torch.randn(1, CHANNELS, 1, 1))
    assert str(found.value) == str(expected.value)
    ours.eval()(torch.randn(1, CHANNELS, 1, 1))


def test_keys_copies_and_errors() -> None:
    module = DepthwiseConv2d(CHANNELS, bias=True)
    assert list(module.state_dict()) == list(Composition(CHANNELS, bias=True).state_dict())
    assert list(DepthwiseConv2d(CHANNELS, norm=False).state_dict()) == ["conv.weight"]
    input = torch.randn(2, CHANNELS, 5, 4)
    assert torch.equal(copy.deepcopy(module)(input), module(input))
    assert "activation='relu'" in repr(module)
    with pytest.raises(ValueError, match="kernel_size must be odd and at least 1, got 4"):
        DepthwiseConv2d(CHANNELS, 4)
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        DepthwiseConv2d(CHANNELS, 3, 0)
    with pytest.raises(ValueError, match=r"activation must be one of 'none', .*, got 'tanh'"):
        DepthwiseConv2d(CHANNELS, activation="tanh")


def test_errors_of_the_op() -> None:
    input, weight = torch.randn(2, CHANNELS, 5, 4), torch.randn(CHANNELS, 1, 3, 3)
    with pytest.raises(ValueError, match=r"weight must have shape \(12, 1, 3, 3\), got \(12, 2, 3, 3\)"):
        depthwise_conv2d(input, torch.randn(CHANNELS, 2, 3, 3))
    with pytest.raises(ValueError, match=r"weight must have shape \(12, 1, k, k\) with an odd k, got \(12, 1, 2, 2\)"):
        depthwise_conv2d(input, torch.randn(CHANNELS, 1, 2, 2))
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'tanh'"):
        depthwise_conv2d(input, weight, activation="tanh")
    with pytest.raises(ValueError, match=r"scale must have shape \(12,\), got \(5,\)"):
        depthwise_conv2d(input, weight, torch.ones(5))
    with pytest.raises(ValueError, match=r"beta must have shape \(12,\), got \(1,\)"):
        depthwise_conv2d_batch_norm(input, weight, None, torch.ones(1))
    with pytest.raises(TypeError, match=r"shift must be torch\.float32 like the input, got torch\.float64"):
        depthwise_conv2d(input, weight, None, torch.ones(CHANNELS).double())
    with pytest.raises(RuntimeError, match="depthwise_conv2d has no cuda kernel"):
        depthwise_conv2d(input, weight, backend="cuda")


@pytest.mark.usefixtures("always_fused")
@each_layout
@pytest.mark.parametrize("training", [True, False])
def test_half_types_keep_running_statistics_in_float32(training: bool, layout: torch.memory_format) -> None:
    """Under autocast, as `nn.BatchNorm2d`: half activations beside float32 parameters."""
    ours, theirs = (module.train(training) for module in pair())
    input = torch.randn(3, CHANNELS, 9, 7).contiguous(memory_format=layout)
    wanted = theirs(input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ours(input.bfloat16())
    assert output.dtype == torch.bfloat16 and ours.bn.running_var.dtype == torch.float32
    torch.testing.assert_close(output.float(), wanted, rtol=0.05, atol=0.05)
    torch.testing.assert_close(ours.bn.running_var, theirs.bn.running_var, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("always_fused")
@pytest.mark.parametrize("training", [True, False])
def test_compiled(training: bool) -> None:
    ours, theirs = (module.train(training) for module in pair(activation="silu"))
    ours.compile(fullgraph=True)
    assert_same(ours, theirs, torch.contiguous_format, steps=2)


@each_layout
@each_activation
def test_values_and_slopes_at_kinks_and_far_out(activation: str, layout: torch.memory_format) -> None:
    """What PyTorch's activation gives, NaN, infinities and both kinks of relu6 and hardswish among them."""
    points = [-float("inf"), -1e30, -100.0, -10.0, -3.0, -1e-3, 0.0, 0.5, 3.0, 6.0, 90.0, 1e30, float("nan")]
    for channels in (1, 32):
        values = torch.tensor(points).reshape(1, 1, 1, -1).repeat(1, channels, 1, 1).contiguous(memory_format=layout)
        ours, theirs = (values.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
        found = depthwise_conv2d(ours, torch.ones(channels, 1, 1, 1), activation=activation)
        wanted = ACTIVATIONS[activation](theirs)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
        for output in (found, wanted):
            output.sum().backward()
        number = ~values.isnan()  # PyTorch's own relu6 passes a gradient at NaN or not, by its place in the tensor
        torch.testing.assert_close(ours.grad[number], theirs.grad[number], rtol=1e-5, atol=1e-6, equal_nan=True)


@each_layout
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_stays_within_its_window(value: float, layout: torch.memory_format) -> None:
    """Gradients too: the zeros around rows and blocks must not carry it elsewhere."""
    generator = torch.Generator().manual_seed(2)
    for row, column in ((0, 0), (4, 6), (2, 6)):
        input = torch.randn(2, CHANNELS, 5, 7, generator=generator)
        input[1, 3, row, column] = value
        arguments = {
            "input": input.contiguous(memory_format=layout),
            "weight": torch.randn(CHANNELS, 1, 3, 3, generator=generator),
            "scale": torch.randn(CHANNELS, generator=generator),
            "shift": torch.randn(CHANNELS, generator=generator),
        }
        found, wanted = (
            cellops.testing.forward_and_gradients(
                lambda b=b, **kw: depthwise_conv2d(**kw, activation="silu", backend=b), arguments
            )
            for b in (None, "reference")
        )
        assert found["output"].isfinite().sum() >= found["output"].numel() - 9
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


@each_layout
@pytest.mark.parametrize("channels", [5, 32])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_variance_of_values_far_from_zero(kernel_size: int, channels: int, layout: torch.memory_format) -> None:
    """A mean a thousand deviations away: sums of squares in float32 would leave nothing of the variance."""
    input = (torch.randn(4, channels, 30, 31) + 1000).contiguous(memory_format=layout)
    weight = torch.zeros(channels, 1, kernel_size, kernel_size)
    weight[:, :, kernel_size // 2, kernel_size // 2] = 1
    mean, var = depthwise_conv2d_batch_norm(input, weight)[1:]
    torch.testing.assert_close(mean.double(), input.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), input.double().var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)


LAST, PLANES = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("channels", "sizes", "threads", "layout"),
    [
        *(
            (channels, [(2, height, width) for height in range(1, 8) for width in (1, 2, 3)], 1, LAST)
            for channels in (16, 33)
        ),
        (17, [(1, 45, 40)], 3, LAST),  # the last vector's channels are partly another thread's
        (2, [(1, height, width) for height in (1, 2, 7) for width in (5, 8, 9, 15, 16, 17, 31, 32, 33, 48)], 1, PLANES),
        (1, [(1, 300, 120)], 3, PLANES),  # threads share a plane, and each has several blocks of its rows
        (45, [(2, height, width) for height in (1, 2, 7, 20) for width in (1, 3, 7, 24)], 1, PLANES),
        (16, [(1, 300, 20)], 3, PLANES),
    ],
)
def test_windows_of_narrow_and_shared_maps(
    channels: int, sizes: list[tuple[int, int, int]], threads: int, layout: torch.memory_format
) -> None:
    """Four, two and one row at a time: maps so narrow that windows miss a column or two, rows that end in a vector.

    And where the image does not lie as it is worked on: the planes of many channels with short rows are turned around.
    """
    generator = torch.Generator().manual_seed(3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch, height, width in sizes:
            image = torch.randn(batch, channels, height, width, generator=generator)
            arguments: dict[str, Any] = {
                "input": image.contiguous(memory_format=layout),
                "weight": torch.randn(channels, 1, 3, 3, generator=generator),
            }
            for op, settings in ((depthwise_conv2d, {}), (depthwise_conv2d_batch_norm, {"eps": 0.1})):
                call = functools.partial(op, activation="silu", **settings)
                found = forward_and_gradients(call, arguments)
                wanted = forward_and_gradients(
                    functools.partial(call, backend="reference"), to_dtype(arguments, torch.float64)
                )
                for name, tensor in found.items():
                    torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-4, atol=5e-4, msg=name)
    finally:
        torch.set_num_threads(before)


def test_rows_that_are_written_past_the_caches() -> None:
    """They are no whole lines: a plane's are written in one run."""
    input, weight = torch.randn(9, 131, 60, 61), torch.randn(131, 1, 3, 3)
    assert 2 * input.nbytes > 32 << 20
    wanted = torch.nn.functional.conv2d(input, weight, padding=1, groups=131)
    torch.testing.assert_close(depthwise_conv2d(input, weight), wanted, rtol=1e-5, atol=1e-5)
