"""FReLU beside the composition of PyTorch's modules that it stands for, and its values where both sides tie."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from compositions import assert_same, called_children, each_layout
from torch import Tensor, nn

import cellops
from cellops import FReLU, frelu
from cellops.ops.frelu import frelu_batch_norm


class OfficialFReLU(nn.Module):
    """The funnel activation as its authors compose it; the source of the parameters' names."""

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv_frelu = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.bn_frelu = nn.BatchNorm2d(channels)

    def forward(self, input: Tensor) -> Tensor:
        return torch.maximum(input, self.bn_frelu(self.conv_frelu(input)))


def pair(channels: int = 12, kernel_size: int = 3, change: Callable[[nn.Module], object] = lambda module: None) -> list:
    """Ours and the composition with the same random parameters, changed alike."""
    torch.manual_seed(0)
    theirs = OfficialFReLU(channels, kernel_size)
    for tensor in (*theirs.parameters(), theirs.bn_frelu.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(theirs.bn_frelu.running_var, 0.5, 2.0)
    ours = FReLU(channels, kernel_size)
    ours.load_state_dict(theirs.state_dict())
    for module in (ours, theirs):
        change(module)
    return [ours, theirs]


def cumulative(module: nn.Module) -> None:
    module.bn_frelu.momentum = None


def without_affine(module: nn.Module) -> None:
    module.bn_frelu = nn.BatchNorm2d(12, affine=False)


def without_buffers(module: nn.Module) -> None:
    module.bn_frelu = nn.BatchNorm2d(12, track_running_stats=False)


def untracked(module: nn.Module) -> None:
    module.bn_frelu.track_running_stats = False


def frozen(module: nn.Module) -> None:
    module.bn_frelu.eval()


CHANGES = {
    "plain": lambda module: module,
    "eval": nn.Module.eval,
    "frozen": frozen,
    "cumulative": cumulative,
    "without_affine": without_affine,
    "without_affine_eval": lambda module: (without_affine(module), module.eval()),
    "without_buffers": without_buffers,
    "without_buffers_eval": lambda module: (without_buffers(module), module.eval()),
    "untracked": untracked,
}


@each_layout
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("change", list(CHANGES))
def test_same_as_the_composition(change: str, kernel_size: int, layout: torch.memory_format) -> None:
    assert_same(*pair(kernel_size=kernel_size, change=CHANGES[change]), layout)


def test_children_that_were_changed_or_are_watched_are_called() -> None:
    input = torch.randn(2, 12, 5, 5)
    assert called_children(FReLU(12), input) == 0

    seen: list[int] = []
    ours, theirs = pair()
    for module in (ours, theirs):
        module.bn_frelu.register_forward_hook(lambda *_: seen.append(1))
    assert_same(ours, theirs, torch.contiguous_format, steps=1)
    assert len(seen) == 2

    class Frozen(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False)

    def freeze(module: nn.Module) -> None:
        state = module.bn_frelu.state_dict()
        module.bn_frelu = Frozen(12)
        module.bn_frelu.load_state_dict(state)

    ours, theirs = pair(change=freeze)
    assert called_children(ours, input) == 2
    assert_same(ours, theirs, torch.contiguous_format, steps=1)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(FReLU(12)).eval()
    assert called_children(converted, input) == 2

    calls: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    try:
        FReLU(12)(input)
    finally:
        handle.remove()
    assert calls == ["Conv2d", "BatchNorm2d", "FReLU"]


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
        assert module(torch.randn(0, 12, 4, 4)).shape == (0, 12, 4, 4)
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, dict(theirs.named_buffers())[name]), name


def test_without_norm_the_bias_alone_is_added() -> None:
    module = FReLU(12, norm=False)
    input = torch.randn(2, 12, 6, 5)
    torch.testing.assert_close(module(input), torch.maximum(input, module.conv_frelu(input)))
    assert list(module.state_dict()) == ["conv_frelu.weight", "conv_frelu.bias"]


def test_keys_and_initial_weights() -> None:
    module = FReLU(64)
    assert list(module.state_dict()) == list(OfficialFReLU(64).state_dict())
    assert 0.007 < float(module.conv_frelu.weight.detach().std()) < 0.013
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        FReLU(4, kernel_size=2)


@each_layout
@pytest.mark.parametrize("training", [True, False])
def test_half_types_keep_running_statistics_in_float32(training: bool, layout: torch.memory_format) -> None:
    """Under autocast, as `nn.BatchNorm2d`: half activations beside float32 parameters."""
    ours, theirs = (module.train(training) for module in pair())
    input = torch.randn(3, 12, 9, 7).contiguous(memory_format=layout)
    wanted = theirs(input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ours(input.bfloat16())
    assert output.dtype == torch.bfloat16 and ours.bn_frelu.running_var.dtype == torch.float32
    torch.testing.assert_close(output.float(), wanted, rtol=0.05, atol=0.05)
    torch.testing.assert_close(ours.bn_frelu.running_var, theirs.bn_frelu.running_var, rtol=0.02, atol=0.02)
    ours.bfloat16()(input.bfloat16()).sum().backward()
    assert ours.conv_frelu.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training: bool) -> None:
    ours, theirs = (module.train(training) for module in pair())
    assert_same(torch.compile(ours, fullgraph=True), torch.compile(theirs), torch.contiguous_format, steps=2)


def test_ties_share_the_gradient() -> None:
    input = torch.tensor([1.0, 2.0, -3.0]).reshape(1, 1, 1, 3).requires_grad_()
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1.0  # the convolution is the input itself
    weight.requires_grad_()
    frelu(input, weight).sum().backward()
    assert input.grad.flatten().tolist() == [1.0, 1.0, 1.0]
    assert weight.grad[0, 0, 1].tolist() == [0.5 * (1 + 2), 0.0, 0.5 * (2 - 3)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@each_layout
def test_a_value_that_is_not_finite_stays_in_its_window(value: float, layout: torch.memory_format) -> None:
    """Gradients too: what lies between the rows of a block must not carry it to another row's end."""
    generator = torch.Generator().manual_seed(2)
    for width in (5, 20):
        for column in (0, width - 1):
            input = torch.randn(2, 18, 6, width, generator=generator)
            input[1, 3, 2, column] = value
            arguments = {
                "input": input.contiguous(memory_format=layout),
                "weight": torch.randn(18, 1, 3, 3, generator=generator),
                "scale": torch.randn(18, generator=generator),
                "shift": torch.randn(18, generator=generator),
            }
            found, wanted = (
                cellops.testing.forward_and_gradients(lambda b=b, **kw: frelu(backend=b, **kw), arguments)
                for b in (None, "reference")
            )
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


@each_layout
def test_variance_of_values_far_from_zero(layout: torch.memory_format) -> None:
    """A mean a thousand deviations away: sums of squares in float32 would leave nothing of the variance."""
    input = (torch.randn(4, 20, 30, 31) + 1000).contiguous(memory_format=layout)
    weight = torch.zeros(20, 1, 3, 3)
    weight[:, 0, 1, 1] = 1.0
    mean, var = frelu_batch_norm(input, weight)[1:]
    torch.testing.assert_close(mean.double(), input.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), input.double().var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)
