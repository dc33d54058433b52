"""Modules call their children where those want it: hooks, adapters, pruning, another geometry; checkpoints, tracing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import cellops
from cellops.nn import _children

MODULES: dict[str, Callable[[], nn.Module]] = {
    "ConvOffset2d": lambda: cellops.ConvOffset2d(8),
    "DeformConv2dPack": lambda: cellops.DeformConv2dPack(8, 8, 3, padding=1),
    "DepthwiseConv2d": lambda: cellops.DepthwiseConv2d(8),
    "EfficientChannelAttention": lambda: cellops.EfficientChannelAttention(8),
    "FReLU": lambda: cellops.FReLU(8),
    "GroupConv1x1": lambda: cellops.GroupConv1x1(8, 8, 2),
    "SpatialAttention": lambda: cellops.SpatialAttention(8),
    "SpatialAttention, pool": lambda: cellops.SpatialAttention(mode="pool"),
    "SqueezeExcite": lambda: cellops.SqueezeExcite(8, rd_channels=4),
}
CONVOLUTIONS = {
    "DepthwiseConv2d": "conv",
    "EfficientChannelAttention": "conv",
    "FReLU": "conv_frelu",
    "GroupConv1x1": "conv",
    "SpatialAttention": "conv",
    "SpatialAttention, pool": "conv",
    "SqueezeExcite": "fc1",
}


class Adapter(nn.Module):
    """A convolution with an addition that learns, as adapters have it: its `weight` is not all there is."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.more = nn.Parameter(torch.full((), 0.5))

    @property
    def weight(self) -> Tensor:
        return self.conv.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.conv.bias  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input) + self.more


def image(size: int = 8) -> Tensor:
    return torch.randn(2, 8, size, size, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_checkpointed_gradients_are_the_same(name: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    module, found = MODULES[name](), []
    for call in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        x = image(20)
        module.zero_grad()
        call(x).square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_watched_convolution_is_called(name: str) -> None:
    module, calls = MODULES[name]().eval(), []
    x = image(20)
    wanted = module(x)
    module.get_submodule(CONVOLUTIONS[name]).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(module(x), wanted)
    assert calls == [1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_replaced_forward_is_called(name: str, training: bool) -> None:
    """As scripts for LoRA and `accelerate.cpu_offload` do it: the class and the weight stay what they were."""
    module, calls = MODULES[name]().train(training), []
    child, x = module.get_submodule(CONVOLUTIONS[name]), image(20)
    forward = child.forward
    child.forward = lambda input: calls.append(1) or 3 * forward(input)  # type: ignore[method-assign, func-returns-value]
    for function in (module, torch.compile(module, backend="eager", fullgraph=True)):
        calls.clear()
        function(x)
        assert calls == [1]


@pytest.mark.parametrize("name", MODULES)
def test_offloaded_modules_compute_the_same(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(MODULES[name]()).eval(), image(20)
    wanted = model(x)
    torch.testing.assert_close(accelerate.cpu_offload(model, execution_device=torch.device("cpu"))(x), wanted)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_adapter_is_called_and_learns(name: str) -> None:
    module, x = MODULES[name]().eval(), image(20)
    wanted = module(x)
    child = CONVOLUTIONS[name]
    adapter = Adapter(module.get_submodule(child))
    setattr(module, child, adapter)
    found = module(x)
    assert (found - wanted).abs().max() > 1e-3
    found.sum().backward()
    assert adapter.more.grad is not None and adapter.more.grad != 0


@pytest.mark.parametrize(
    "change", [lambda conv: prune.l1_unstructured(conv, "weight", 0.5), parametrizations.weight_norm]
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_pruned_and_parametrised_weights_train_on(name: str, change: Callable[[nn.Module], object]) -> None:
    """The second step once went back through the graph of the first one: a hook was to make the weight anew."""
    module = MODULES[name]()
    change(module.get_submodule(CONVOLUTIONS[name]))
    for _ in range(2):
        module(image(20)).square().sum().backward()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("FReLU", {"padding_mode": "reflect"}),
        ("FReLU", {"dilation": (2, 2), "padding": (2, 2)}),
        ("SpatialAttention, pool", {"dilation": (2, 2), "padding": (6, 6)}),
        ("GroupConv1x1", {"stride": (2, 2)}),
        ("DepthwiseConv2d", {"padding_mode": "circular"}),
        ("EfficientChannelAttention", {"padding_mode": "circular"}),
        ("SqueezeExcite", {"padding": (1, 1)}),
    ],
)
def test_a_convolution_of_another_geometry_is_called(name: str, change: dict[str, object]) -> None:
    module, x = MODULES[name]().eval(), image(20)
    old = module.get_submodule(CONVOLUTIONS[name])
    if name == "SqueezeExcite":
        change = {**change, "kernel_size": (3, 3)}
    kinds = {"kernel_size": old.kernel_size, "padding": old.padding, "groups": old.groups, "bias": old.bias is not None}
    new = type(old)(old.in_channels, old.out_channels, **{**kinds, **change})  # type: ignore[arg-type]
    calls: list[int] = []
    forward = new.forward
    new.forward = lambda input: calls.append(1) or forward(input)  # type: ignore[method-assign, func-returns-value]
    setattr(module, CONVOLUTIONS[name], new)
    module(x).sum().backward()
    assert calls == [1] and new.weight.grad is not None


def test_what_keeps_the_size() -> None:
    assert _children.keeps_size(nn.Conv2d(4, 4, 3, padding=1)) and _children.keeps_size(nn.Conv1d(1, 1, 5, padding=2))
    assert _children.keeps_size(nn.Conv2d(4, 4, 3, padding="same")) and _children.keeps_size(nn.Conv2d(4, 4, 1))
    assert _children.keeps_size(nn.Conv2d(4, 4, 1, padding="valid", dilation=2, padding_mode="reflect"))
    for wrong in (
        {"kernel_size": 3},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": (3, 5), "padding": (1, 2)},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 1, "padding": 1},
    ):
        assert not _children.keeps_size(nn.Conv2d(4, 4, **wrong)), wrong  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_traced_by_fx_they_go_on_in_either_mode(name: str, training: bool) -> None:
    torch.manual_seed(0)
    module, x = MODULES[name]().train(training), image(20).detach()
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(module)
        for mode in (False, True, False):  # running statistics are learned between
            torch.testing.assert_close(traced.train(mode)(x), module.train(mode)(x), msg=f"{name}, training={mode}")
            if mode:
                module.load_state_dict(traced.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_traced_by_jit_they_hold_the_op_and_train(name: str, grad: bool) -> None:
    """With gradients on, a Function was recorded, which the tracer's own check refused and nobody could save."""
    module, x = MODULES[name]().eval(), image(20)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, image(16))
    assert "PythonOp" not in str(traced.inlined_graph) and "cellops::" in str(traced.inlined_graph)
    wanted = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    found = torch.autograd.grad(traced(x).square().sum(), [x, *module.parameters()])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("build", [*MODULES.values(), lambda: cellops.DeformConv2dPack(8, 8, 1)], ids=[*MODULES, "1x1"])
def test_gradients_have_their_parameters_strides(build: Callable[[], nn.Module]) -> None:
    """In dimensions of size 1 too: DistributedDataParallel warned of each weight that was channels_last."""
    module = build().to(memory_format=torch.channels_last)
    input = image(20).detach().contiguous(memory_format=torch.channels_last)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(module(input).square().sum(), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert gradient.stride() == parameter.stride(), name


@pytest.mark.parametrize("name", MODULES)
def test_batched_gradients(name: str) -> None:
    """`is_grads_batched` and `vectorize=True`: many gradients at once, by another vmap than torch.func's."""
    module, x = MODULES[name]().double().eval(), image(5).detach().double()

    def sums(x: Tensor) -> Tensor:
        return module(x).sum((0, 2))

    one_by_one = torch.autograd.functional.jacobian(sums, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(sums, x, vectorize=True), one_by_one)


@pytest.mark.parametrize("conv", [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1, groups=2)])
def test_an_accelerated_sequence_takes_an_image_without_a_batch(conv: nn.Conv2d) -> None:
    network = nn.Sequential(conv, nn.ReLU()).eval()
    x = image(20)[0]
    wanted = network(x)
    assert cellops.accelerate(network).replaced
    torch.testing.assert_close(network(x), wanted)


def test_a_funnel_takes_an_image_without_a_batch_as_its_children_do() -> None:
    x = image(20)[0]
    funnel = cellops.FReLU(8, norm=False)
    torch.testing.assert_close(funnel(x), x.maximum(funnel.conv_frelu(x)))
    for training in (False, True):
        with pytest.raises(ValueError, match="expected 4D input"):
            cellops.FReLU(8).train(training)(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_a_trace_with_gradients_on_passes_the_check_without(kernel_size: int) -> None:
    """`torch.jit.trace` traces again under no_grad, where modules ran on small maps and with wide windows."""
    network = nn.Sequential(
        nn.Conv2d(8, 8, kernel_size, padding=kernel_size // 2, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    ).eval()
    assert cellops.accelerate(network).replaced
    traced = torch.jit.trace(network, image(12))
    for size in (5, 12, 30):
        torch.testing.assert_close(traced(image(size)), network(image(size)))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(128, 128, 1, groups=2)],
    ids=["depthwise", "grouped", "deep groups"],
)
def test_an_activation_inside_a_normalisation_is_applied_once(conv: nn.Conv2d, activation: type[nn.Module]) -> None:
    """timm's BatchNormAct2d: where modules were called in place of the op, its activation came a second time."""
    layers = pytest.importorskip("timm").layers
    plain = nn.Sequential(conv, layers.BatchNormAct2d(conv.out_channels, act_layer=activation))
    nn.init.normal_(plain[1].bias)
    network = copy.deepcopy(plain)
    assert cellops.accelerate(network).replaced
    # sizes, layouts and gradients choose between the op and the modules
    for training, grad, size in itertools.product((False, True), (False, True), (5, 9, 20)):
        x = torch.randn(2, conv.in_channels, size, size)
        traced = torch.fx.symbolic_trace(network.train(training))  # timm's normalisation is traced in its present mode
        for one, memory_format in itertools.product((network, traced), (torch.contiguous_format, torch.channels_last)):
            with torch.set_grad_enabled(grad):
                wanted = plain.train(training)(x)
                found = one(x.contiguous(memory_format=memory_format))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    compiled = torch.compile(network.eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
