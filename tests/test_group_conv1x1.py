"""Grouped 1x1 convolution beside the composition of PyTorch's modules that it stands for, and values at the edges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compositions import assert_same, called_children, each_layout
from torch import Tensor, nn
from torch.nn import functional as F

import cellops
from cellops import GroupConv1x1, _native, group_conv1x1, testing
from cellops.nn import _onednn
from cellops.ops.group_conv1x1 import group_conv1x1_batch_norm
from cellops.reference import group_conv1x1 as reference

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
    """The modules one after the other, with the children's names of `GroupConv1x1`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        norm: bool = True,
        activation: str = "relu",
        shuffle: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.activation = ACTIVATIONS[activation]
        self.shuffle = nn.ChannelShuffle(groups) if shuffle else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return self.shuffle(self.activation(self.bn(self.conv(input))))


def pair(change: Callable[[nn.Module], object] = lambda module: None, **options: Any) -> list[nn.Module]:
    """Ours and the composition, 12 channels to 18 in 3 groups, with the same random parameters, changed alike."""
    torch.manual_seed(0)
    theirs = Composition(12, 18, 3, **options)
    for tensor in theirs.parameters():
        nn.init.normal_(tensor)
    if isinstance(theirs.bn, nn.BatchNorm2d):
        nn.init.normal_(theirs.bn.running_mean)
        nn.init.uniform_(theirs.bn.running_var, 0.5, 2.0)
    ours = GroupConv1x1(12, 18, 3, **options)
    ours.load_state_dict(theirs.state_dict())
    for module in (ours, theirs):
        change(module)
    return [ours, theirs]


def cumulative(module: nn.Module) -> None:
    module.bn.momentum = None


def without_affine(module: nn.Module) -> None:
    module.bn = nn.BatchNorm2d(18, affine=False)


def without_buffers(module: nn.Module) -> None:
    module.bn = nn.BatchNorm2d(18, track_running_stats=False)


def untracked(module: nn.Module) -> None:
    module.bn.track_running_stats = False


CHANGES = {
    "plain": lambda module: module,
    "eval": nn.Module.eval,
    "frozen": lambda module: module.bn.eval(),
    "cumulative": cumulative,
    "without_affine": without_affine,
    "without_affine_eval": lambda module: (without_affine(module), module.eval()),
    "without_buffers": without_buffers,
    "without_buffers_eval": lambda module: (without_buffers(module), module.eval()),
    "untracked": untracked,
}


@pytest.fixture
def always_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the module would be compared with itself where it stands back in training."""
    monkeypatch.setattr("cellops.nn.group_conv1x1._plain_is_faster", lambda *arguments: False)


@pytest.mark.usefixtures("always_fused")
@each_layout
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_same_as_the_composition(change: str, bias: bool, layout: torch.memory_format) -> None:
    assert_same(*pair(CHANGES[change], bias=bias, shuffle=True), layout)


@each_activation
@pytest.mark.parametrize("shuffle", [False, True], ids=["", "shuffle"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_activation_and_shuffle(norm: bool, shuffle: bool, activation: str) -> None:
    ours, theirs = pair(activation=activation, shuffle=shuffle, norm=norm, bias=not norm)
    assert_same(ours, theirs, torch.contiguous_format)


NCHW, ROWS = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ("sizes", "pixels", "layout", "dtype", "calls"),
    [  # children that are called in training, in evaluation, and there without gradients
        ((12, 18, 3), 5, NCHW, torch.float32, (0, 0, 0)),
        ((1024, 32, 2), 3, NCHW, torch.float32, (2, 2, 2)),
        ((512, 32, 2), 3, NCHW, torch.float32, (0, 0, 0)),
        ((512, 32, 2), 3, ROWS, torch.float32, (0, 0, 0)),
        ((20, 40, 1), 5, ROWS, torch.float32, (2, 0, 0)),
        ((12, 18, 3), 5, ROWS, torch.float32, (0, 0, 0)),
        ((32, 96, 1), 5, ROWS, torch.float32, (2, 0, 0)),
        ((32, 96, 1), 5, NCHW, torch.float32, (0, 0, 0)),
        ((32, 96, 2), 1, NCHW, torch.float32, (0, 0, 0)),
        ((96, 32, 2), 5, NCHW, torch.bfloat16, (0, 0, 0)),
        ((24, 32, 2), 5, NCHW, torch.bfloat16, (0, 0, 0)),
        ((1024, 32, 2), 5, NCHW, torch.bfloat16, (2, 2, 2)),
        ((32, 96, 1), 5, NCHW, torch.bfloat16, (2, 2, 0)),
        ((64, 64, 2), 5, ROWS, torch.bfloat16, (0, 0, 0)),
        ((32, 96, 2), 5, ROWS, torch.bfloat16, (0, 0, 0)),
        ((24, 64, 2), 5, ROWS, torch.bfloat16, (2, 2, 0)),
        ((1024, 32, 2), 5, ROWS, torch.float16, (0, 0, 0)),
    ],
    ids=str,
)
def test_stands_back_where_plain_modules_are_faster(
    sizes: tuple[int, int, int],
    pixels: int,
    layout: torch.memory_format,
    dtype: torch.dtype,
    calls: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cellops.nn._onednn.multiplies_bfloat16", lambda: True)
    monkeypatch.setattr("cellops.nn._onednn.multiplies_in_tiles", lambda: False)
    input = torch.randn(2, sizes[0], pixels, pixels).contiguous(memory_format=layout)
    module = GroupConv1x1(*sizes)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        assert called_children(module, input) == calls[0]
        assert called_children(module.eval(), input) == calls[1]
        with torch.no_grad():
            assert called_children(module, input) == calls[2]
    module.to(dtype)
    assert called_children(module, input.to(dtype)) == calls[1]
    with pytest.raises(ValueError, match="weight must have shape"):
        module(input[:, : -sizes[2]].to(dtype))
    monkeypatch.setattr("cellops.nn._onednn.multiplies_bfloat16", lambda: False)
    if dtype != torch.float32:
        assert called_children(module, input.to(dtype)) == 0


@pytest.mark.parametrize(
    ("sizes", "layout", "calls"),
    [((64, 64, 2), ROWS, 2), ((96, 32, 2), NCHW, 2), ((24, 32, 2), NCHW, 0), ((32, 96, 1), NCHW, 2)],
    ids=str,
)
def test_leaves_deep_groups_to_tiles(
    sizes: tuple[int, int, int], layout: torch.memory_format, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("multiplies_bfloat16", "multiplies_in_tiles"):
        monkeypatch.setattr(f"cellops.nn._onednn.{name}", lambda: True)
    input = torch.randn(2, sizes[0], 5, 5).contiguous(memory_format=layout).bfloat16()
    assert called_children(GroupConv1x1(*sizes).bfloat16(), input) == calls


@pytest.mark.parametrize("shuffle", [False, True])
def test_shuffled_channels_are_ours(shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellops.nn._onednn.multiplies_bfloat16", lambda: True)
    monkeypatch.setattr("cellops.nn._onednn.multiplies_in_tiles", lambda: False)
    input = torch.randn(2, 24, 5, 5).contiguous(memory_format=ROWS).bfloat16()
    assert called_children(GroupConv1x1(24, 64, 2, shuffle=shuffle).bfloat16(), input) == (0 if shuffle else 2)


@each_layout
def test_same_where_it_stands_back(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellops.nn.group_conv1x1._plain_is_faster", lambda *arguments: True)
    assert_same(*pair(bias=True, shuffle=True), layout)


# The convolution that forward saves


def saved_call(dtype: torch.dtype, layout: torch.memory_format) -> tuple[list[Tensor], tuple[float, int, str, bool]]:
    torch.manual_seed(0)
    tensors = [torch.randn(3, 8, 7, 6), torch.randn(12, 4, 1, 1), torch.rand(12) + 0.5, torch.randn(12)]
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    return [tensor.to(dtype) for tensor in tensors], (1e-5, 2, "silu", True)


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.skipif(_native.error is not None, reason=f"no compiled library: {_native.error}")
def test_the_convolution_is_saved_and_may_be_missing(dtype: torch.dtype, layout: torch.memory_format) -> None:
    tensors, settings = saved_call(dtype, layout)
    op = torch.ops.cellops.group_conv1x1_batch_norm
    output, mean, var, convolution = torch.ops.cellops.group_conv1x1_batch_norm_for_backward(*tensors, *settings)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = F.channel_shuffle(F.conv2d(tensors[0].to(wide), tensors[1].to(wide), groups=2), 2)
    assert convolution.dtype == wide and convolution.shape == (output.numel() + 1,)
    torch.testing.assert_close(convolution[:-1], wanted.flatten())  # in planes, as channels are shuffled
    for one, other in zip(op(*tensors, *settings), (output, mean, var), strict=True):
        assert torch.equal(one, other)
    backward, wants = torch.ops.cellops.group_conv1x1_batch_norm_backward, [True] * 4
    given = (torch.randn_like(output), *tensors, mean, var)
    found = backward(*given, *settings, wants, None, convolution)
    for missing in ((), (None, None), ("cpu", convolution.new_empty(0))):
        for one, other in zip(backward(*given, *settings, wants, *missing), found, strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="convolution must have shape"):
        backward(*given, *settings, wants, None, convolution[:1])
    with pytest.raises(TypeError, match=f"convolution must be {wide}"):
        backward(*given, *settings, wants, None, convolution.to(torch.int32))
    with pytest.raises(ValueError, match="mean must have shape"):
        backward(*given[:-2], mean[:1], var, *settings, wants)


@pytest.mark.parametrize("other", [torch.contiguous_format, torch.channels_last], ids=str)
@each_layout
@pytest.mark.parametrize(
    ("sizes", "side"), [((64, 64, 2), 8), ((64, 64, 2), 3), ((24, 40, 2), 3), ((24, 40, 2), 9)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(_native.error is not None, reason=f"no compiled library: {_native.error}")
def test_what_is_saved_tells_its_order(
    dtype: torch.dtype, sizes: tuple[int, int, int], side: int, layout: torch.memory_format, other: torch.memory_format
) -> None:
    """As `save_on_cpu` with pinned memory does, a hook may return the input in another memory format."""
    torch.manual_seed(0)
    channels, outputs, groups = sizes
    input = torch.randn(5, channels, side, side).to(dtype).contiguous(memory_format=layout).requires_grad_()
    weight = (torch.randn(outputs, channels // groups, 1, 1) / 4).to(dtype).requires_grad_()
    grad_output = torch.randn(5, outputs, side, side).to(dtype)

    def gradients(**hooks: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(hooks.get("pack", Tensor.clone), lambda one: one):
            output = group_conv1x1_batch_norm(input, weight, None, None, 1e-5, groups, "silu", False)[0]
        return torch.autograd.grad(output, [input, weight], grad_output)

    def turned(one: Tensor) -> Tensor:
        return one.contiguous(memory_format=other) if one.shape == input.shape else one

    for found, wanted in zip(gradients(pack=turned), gradients(), strict=True):
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.skipif(_native.error is not None, reason=f"no compiled library: {_native.error}")
def test_autograd_saves_the_convolution_and_backward_reads_it() -> None:
    tensors, settings = saved_call(torch.float32, torch.contiguous_format)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    output, mean, var = group_conv1x1_batch_norm(*leaves, *settings)
    saved = [one for one in output.grad_fn.saved_tensors if one is not None and one.shape == (output.numel() + 1,)]
    assert len(saved) == 1
    given = (torch.ones_like(output), *(leaf.detach() for leaf in leaves), mean, var, *settings, [True] * 4, None)
    backward = torch.ops.cellops.group_conv1x1_batch_norm_backward
    found, other = backward(*given, saved[0]), backward(*given, saved[0] + 1)
    wanted = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
    assert not any(torch.allclose(one, two) for one, two in zip(found, other, strict=True))
    assert torch.autograd.grad(mean.sum() + output.sum(), leaves[0])[0].shape == leaves[0].shape


def test_which_variants_multiply_bfloat16() -> None:
    library = _native.error is None and _native.library()
    assert _onednn.multiplies_bfloat16() == (bool(library) and "bf16" in library.isa())
    assert _onednn.multiplies_in_tiles() == (bool(library) and "amx" in library.isa())


@each_layout
@pytest.mark.parametrize("shuffle", [False, True], ids=["", "shuffle"])
@pytest.mark.parametrize(("sizes", "side"), [((96, 128, 2), 56), ((128, 64, 4), 56), ((64, 256, 4), 14)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)], ids=str
)
def test_calls_larger_than_a_cache(
    dtype: torch.dtype, limit: float, sizes: tuple[int, int, int], side: int, shuffle: bool, layout: torch.memory_format
) -> None:
    """The kernels on the CPU fetch ahead then, and with half as much again write past the caches."""
    torch.manual_seed(0)
    channels, outputs, groups = sizes
    batch = 7 if side == 56 else 64
    input = torch.randn(batch, channels, side, side).contiguous(memory_format=layout).to(dtype)
    weight = (torch.randn(outputs, channels // groups, 1, 1) / 8).to(dtype)
    arguments = {"input": input, "weight": weight, "gamma": torch.rand(outputs) + 0.5, "beta": torch.randn(outputs)}
    settings = {"eps": 1e-5, "groups": groups, "activation": "silu", "shuffle": shuffle}
    found = testing.forward_and_gradients(group_conv1x1_batch_norm, {**arguments, **settings})
    assert torch.equal(group_conv1x1_batch_norm(**arguments, **settings)[0], found["output"])  # which saves nothing
    wide = {name: tensor.double() for name, tensor in arguments.items()}
    wanted = testing.forward_and_gradients(reference.group_conv1x1_batch_norm, {**wide, **settings}, grad_dtype=dtype)
    for name, tensor in found.items():
        error = (tensor.double() - wanted[name]).norm() / wanted[name].norm()
        assert error < limit, name


def test_other_backends_save_nothing() -> None:
    tensors, settings = saved_call(torch.float32, torch.contiguous_format)
    found = torch.ops.cellops.group_conv1x1_batch_norm_for_backward(*tensors, *settings, "reference")
    assert found[3].numel() == 0
    leaves = [tensor.requires_grad_() for tensor in tensors]
    wanted = torch.autograd.grad(group_conv1x1_batch_norm(*leaves, *settings)[0].square().sum(), leaves)
    raw = torch.ops.cellops.group_conv1x1_batch_norm_for_backward(*leaves, *settings)
    assert [one.requires_grad for one in raw] == [True, False, False, False]
    for one, other in zip(torch.autograd.grad(raw[0].square().sum(), leaves), wanted, strict=True):
        assert torch.equal(one, other)


def test_children_that_were_changed_or_are_watched_are_called() -> None:
    input = torch.randn(2, 12, 5, 5)
    assert called_children(GroupConv1x1(12, 18, 3), input) == 0

    for child in ("conv", "bn"):
        seen: list[int] = []
        ours, theirs = pair(shuffle=True, activation="gelu")
        for module in (ours, theirs):
            getattr(module, child).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert_same(ours, theirs, torch.contiguous_format, steps=1)
        assert len(seen) == 2

    class Frozen(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False)

    def freeze(module: nn.Module) -> None:
        state = module.bn.state_dict()
        module.bn = Frozen(18)
        module.bn.load_state_dict(state)

    ours, theirs = pair(freeze)
    assert called_children(ours, input) == 2
    assert_same(ours, theirs, torch.contiguous_format, steps=1)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(GroupConv1x1(12, 18, 3)).eval()
    assert called_children(converted, input) == 2


def test_one_value_per_channel_raises_as_batch_norm_does() -> None:
    ours, theirs = pair()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError) as expected:
        theirs(torch.randn(1, 12, 1, 1))
    with pytest.raises(ValueError) as found:
        ours(torch.randn(1, 12, 1, 1))
    assert str(found.value) == str(expected.value)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    ours.eval()(torch.randn(1, 12, 1, 1))


def test_empty_batch_leaves_the_running_statistics() -> None:
    ours, theirs = pair()
    for module in (ours, theirs):
        assert module(torch.randn(0, 12, 4, 4)).shape == (0, 18, 4, 4)
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, dict(theirs.named_buffers())[name]), name


def test_keys_copies_and_errors() -> None:
    module = GroupConv1x1(12, 18, 3, bias=True)
    assert list(module.state_dict()) == list(Composition(12, 18, 3, bias=True).state_dict())
    assert list(GroupConv1x1(12, 18, 3, norm=False).state_dict()) == ["conv.weight"]
    input = torch.randn(2, 12, 5, 4)
    assert torch.equal(copy.deepcopy(module)(input), module(input))
    assert "activation='relu', shuffle=False" in repr(module)
    with pytest.raises(ValueError, match="in_channels must be a multiple of groups = 5, got 12"):
        GroupConv1x1(12, 15, 5)
    with pytest.raises(ValueError, match="out_channels must be a multiple of groups = 4, got 18"):
        GroupConv1x1(12, 18, 4)
    with pytest.raises(ValueError, match=r"activation must be one of 'none', .*, got 'tanh'"):
        GroupConv1x1(12, 18, 3, activation="tanh")


def test_errors_of_the_op() -> None:
    input, weight = torch.randn(2, 12, 5, 4), torch.randn(18, 4, 1, 1)
    with pytest.raises(ValueError, match="groups must be a divisor of the input's 12 channels, got 5"):
        group_conv1x1(input, weight, groups=5)
    with pytest.raises(ValueError, match="groups must be a divisor of the input's 12 channels, got 0"):
        group_conv1x1(input, weight, groups=0)
    with pytest.raises(ValueError, match="groups must be a divisor of the weight's 16 output channels, got 3"):
        group_conv1x1(input, weight[:16], groups=3)
    with pytest.raises(ValueError, match=r"weight must have shape \(18, 6, 1, 1\), got \(18, 4, 1, 1\)"):
        group_conv1x1(input, weight, groups=2)
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'tanh'"):
        group_conv1x1(input, weight, groups=3, activation="tanh")
    with pytest.raises(ValueError, match=r"scale must have shape \(18,\), got \(12,\)"):
        group_conv1x1(input, weight, torch.ones(12), groups=3)
    with pytest.raises(ValueError, match=r"beta must have shape \(18,\), got \(1,\)"):
        group_conv1x1_batch_norm(input, weight, None, torch.ones(1), groups=3)
    with pytest.raises(TypeError, match=r"shift must be torch\.float32 like the input, got torch\.float64"):
        group_conv1x1(input, weight, None, torch.ones(18).double(), groups=3)


@pytest.mark.usefixtures("always_fused")
@each_layout
@pytest.mark.parametrize("training", [True, False])
def test_half_types_keep_running_statistics_in_float32(training: bool, layout: torch.memory_format) -> None:
    """Under autocast, as `nn.BatchNorm2d`: half activations beside float32 parameters."""
    ours, theirs = (module.train(training) for module in pair(shuffle=True))
    input = torch.randn(3, 12, 9, 7).contiguous(memory_format=layout)
    wanted = theirs(input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ours(input.bfloat16())
    assert output.dtype == torch.bfloat16 and ours.bn.running_var.dtype == torch.float32
    torch.testing.assert_close(output.float(), wanted, rtol=0.05, atol=0.05)
    torch.testing.assert_close(ours.bn.running_var, theirs.bn.running_var, rtol=0.02, atol=0.02)
    ours.bfloat16()(input.bfloat16()).sum().backward()
    assert ours.conv.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training: bool) -> None:
    ours, theirs = (module.train(training) for module in pair(activation="silu", shuffle=True))
    ours.compile(fullgraph=True)
    assert_same(ours, theirs, torch.contiguous_format, steps=2)


@each_layout
@each_activation
def test_values_and_slopes_at_kinks_and_far_out(activation: str, layout: torch.memory_format) -> None:
    """What PyTorch's activation gives, NaN, infinities and both kinks of relu6 and hardswish among them."""
    points = [-float("inf"), -1e30, -100.0, -10.0, -3.0, -1e-3, 0.0, 0.5, 3.0, 6.0, 90.0, 1e30, float("nan")]
    for channels in (1, 32):  # by channel, and whole vectors of channels by position
        values = torch.tensor(points).reshape(1, 1, 1, -1).repeat(1, channels, 1, 1).contiguous(memory_format=layout)
        weight = torch.ones(channels, 1, 1, 1) if channels == 1 else torch.eye(channels)[:, :, None, None]
        if channels > 1:
            values = values.nan_to_num(0.0, 0.0, 0.0)  # a dense product carries these to every channel
        ours, theirs = (values.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
        found, wanted = group_conv1x1(ours, weight, activation=activation), ACTIVATIONS[activation](theirs)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
        for output in (found, wanted):
            output.sum().backward()
        number = ~values.isnan()  # PyTorch's own relu6 passes a gradient at NaN or not, by its place in the tensor
        torch.testing.assert_close(ours.grad[number], theirs.grad[number], rtol=1e-5, atol=1e-6, equal_nan=True)


@each_layout
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [(4, 3), (32, 16)], ids=str)
def test_a_value_that_is_not_finite_stays_in_its_group_and_pixel(
    size: tuple[int, int], value: float, layout: torch.memory_format
) -> None:
    """Gradients too: what fills up a tile must not carry it elsewhere."""
    generator = torch.Generator().manual_seed(2)
    ins, outs = size
    for pixel in (0, 34):
        input = torch.randn(2, 2 * ins, 5, 7, generator=generator)
        input[1, ins - 1].view(-1)[pixel] = value
        arguments = {
            "input": input.contiguous(memory_format=layout),
            "weight": torch.randn(2 * outs, ins, 1, 1, generator=generator),
            "scale": torch.randn(2 * outs, generator=generator),
            "shift": torch.randn(2 * outs, generator=generator),
        }
        found, wanted = (
            cellops.testing.forward_and_gradients(
                lambda b=b, **kw: group_conv1x1(**kw, groups=2, activation="silu", backend=b), arguments
            )
            for b in (None, "reference")
        )
        assert found["output"].isfinite().sum() >= found["output"].numel() - outs
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


@each_layout
@pytest.mark.parametrize("channels", [5, 32])
def test_variance_of_values_far_from_zero(channels: int, layout: torch.memory_format) -> None:
    """A mean a thousand deviations away: sums of squares in float32 would leave nothing of the variance."""
    input = (torch.randn(4, channels, 30, 31) + 1000).contiguous(memory_format=layout)
    mean, var = group_conv1x1_batch_norm(input, torch.eye(channels)[:, :, None, None])[1:]
    torch.testing.assert_close(mean.double(), input.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), input.double().var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)
