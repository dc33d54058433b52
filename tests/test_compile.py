"""Modules under `torch.compile`: where an op is called, where the composition, and that both give the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import cellops
from cellops.convert.modules import EfficientNetSqueezeExcite
from cellops.nn import _compiled


def efficient_net_squeeze_excite(channels: int) -> nn.Module:
    """As `accelerate` makes it of timm's."""
    module = cellops.SqueezeExcite(channels, rd_channels=4, act="silu")
    module.conv_reduce, module.conv_expand = module.fc1, module.fc2
    del module.fc1, module.fc2
    module.__class__ = EfficientNetSqueezeExcite
    return module


def fused_sequential(channels: int) -> nn.Module:
    """As `accelerate` makes it of a sequence."""
    model = nn.Sequential(nn.Conv2d(channels, channels, 1, groups=4), nn.BatchNorm2d(channels), nn.SiLU())
    assert cellops.accelerate(model).replaced
    return model


MODULES: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "SqueezeExcite": ("squeeze_excite", lambda channels: cellops.SqueezeExcite(channels, gate="hard_sigmoid")),
    "EfficientNetSqueezeExcite": ("squeeze_excite", efficient_net_squeeze_excite),
    "EfficientChannelAttention": ("eca", cellops.EfficientChannelAttention),
    "FReLU": ("frelu", cellops.FReLU),
    "SpatialAttention conv": ("spatial_attention conv", lambda channels: cellops.SpatialAttention(channels, 3)),
    "SpatialAttention pool": ("spatial_attention pool", lambda channels: cellops.SpatialAttention(mode="pool")),
    "GroupConv1x1": ("group_conv1x1", lambda channels: cellops.GroupConv1x1(channels, channels, 4, shuffle=True)),
    "DepthwiseConv2d": ("depthwise_conv2d", cellops.DepthwiseConv2d),
    "FusedSequential": ("group_conv1x1", fused_sequential),
}
CHANNELS = 16


class Calls:
    """A compiler that only keeps the names of what a graph calls, and runs it as it is."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.names += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return graph.forward

    def op(self, name: str) -> bool:
        """Whether a graph calls the op."""
        return any(f"cellops.{name.partition(' ')[0]}" in called for called in self.names)


def outputs(module: nn.Module, shape: tuple[int, ...], layout: torch.memory_format) -> tuple[Calls, Tensor, Tensor]:
    """Inference compiled and not."""
    torch.compiler.reset()
    calls = Calls()
    input = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    with torch.no_grad():
        return calls, torch.compile(module, backend=calls, fullgraph=True)(input), module(input)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("name", list(MODULES))
def test_an_op_stands_back_below_its_limit(name: str, layout: torch.memory_format) -> None:
    op, build = MODULES[name]
    width = _compiled.FEWEST[op][layout is torch.channels_last] // CHANNELS // 4
    if width == 0:
        pytest.skip("in this layout it never stands back")
    for columns, called in ((width - 1, False), (width, True)):
        module = build(CHANNELS).eval()
        for bn in (bn for bn in module.modules() if isinstance(bn, nn.BatchNorm2d)):
            nn.init.normal_(bn.running_mean)
            nn.init.uniform_(bn.weight, 0.5, 1.5)
        calls, compiled, eager = outputs(module, (2, CHANNELS, 4, columns), layout)
        assert calls.op(op) == called, calls.names
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
        assert compiled.stride() == eager.stride()


@pytest.mark.parametrize("name", list(MODULES))
def test_training_calls_the_op(name: str) -> None:
    """Small as the map is, gradients are what Inductor is slower at."""
    op, build = MODULES[name]
    torch.compiler.reset()
    module, calls = build(CHANNELS), Calls()
    found = []
    for function in (torch.compile(module, backend=calls, fullgraph=True), module):
        input = torch.randn(2, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        found.append(torch.autograd.grad(function(input).square().sum(), input)[0])
    assert calls.op(op), calls.names
    torch.testing.assert_close(*found)


def test_exported_programs_keep_the_op() -> None:
    with torch.no_grad():
        program = torch.export.export(cellops.SqueezeExcite(CHANNELS).eval(), (torch.randn(2, CHANNELS, 7, 7),))
    assert any("cellops.squeeze_excite" in str(node.target) for node in program.graph.nodes)


def test_autocast_keeps_the_op() -> None:
    """Its result is of autocast's type, which the composition's would not be."""
    torch.compiler.reset()
    module, calls = cellops.SqueezeExcite(CHANNELS), Calls()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        output = torch.compile(module, backend=calls, fullgraph=True)(torch.randn(2, CHANNELS, 7, 7))
    assert calls.op("squeeze_excite")
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["SqueezeExcite", "EfficientChannelAttention"])
def test_wrong_input_is_the_ops_error(name: str) -> None:
    """Standing back does not let through what the op refuses."""
    torch.compiler.reset()
    compiled = torch.compile(MODULES[name][1](CHANNELS), backend=Calls())
    with torch.no_grad():
        with pytest.raises(Exception, match=r"must be torch\.float64"):
            compiled(torch.randn(2, CHANNELS, 7, 7, dtype=torch.float64))
        with pytest.raises(Exception, match="must have 4 dimensions"):
            compiled(torch.randn(2, CHANNELS, 7))
        with pytest.raises(Exception, match="at least one"):
            compiled(torch.randn(2, CHANNELS, 0, 7))


@pytest.mark.parametrize("name", ["FReLU", "GroupConv1x1", "SpatialAttention conv"])
def test_wrong_channels_are_the_ops_error(name: str) -> None:
    op, build = MODULES[name]
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.compiler.reset()
        compiled = torch.compile(build(CHANNELS).eval(), backend=Calls())
        input = torch.randn(2, CHANNELS // 2, 7, 7).contiguous(memory_format=layout)
        with torch.no_grad(), pytest.raises(Exception, match=f"{op.partition(' ')[0]}.*must|must.*channels"):
            compiled(input)


def test_one_graph_serves_all_batches_of_a_map() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(cellops.SqueezeExcite(CHANNELS), backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5, 8):
            compiled(torch.randn(batch, CHANNELS, 7, 7))
    assert counter.frame_count <= 2


def test_two_graphs_serve_all_resolutions() -> None:
    """A limit for each of these maps was one more graph for some resolutions, beyond what torch allows in all."""
    torch.compiler.reset()
    model = nn.Sequential(*stage(16), *stage(64)).eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for size in (17, 33, 65, 130, 260):
            input = torch.randn(2, 1, size, size)
            torch.testing.assert_close(compiled(input), model(input), rtol=1e-3, atol=1e-4)
    assert counter.frame_count <= 2


def test_an_exported_program_takes_maps_of_any_size() -> None:
    """Where an eager call goes by the map's size, the program refused the sizes on the other side."""
    module = cellops.DepthwiseConv2d(CHANNELS).eval()
    sizes = {2: torch.export.Dim("rows", min=4, max=512), 3: torch.export.Dim("columns", min=4, max=512)}
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(2, CHANNELS, 20, 20),), dynamic_shapes=(sizes,)).module()
        for size in (6, 20, 40):
            input = torch.randn(2, CHANNELS, size, size)
            torch.testing.assert_close(program(input), module(input), rtol=1e-4, atol=1e-5)


def stage(width: int) -> list[nn.Module]:
    """Half the resolution; an op of each kind that stands back below its limit."""
    return [
        nn.AvgPool2d(2, ceil_mode=True),
        nn.LazyConv2d(width, 1),
        cellops.SqueezeExcite(width),
        cellops.DepthwiseConv2d(width),
        cellops.FReLU(width),
        cellops.GroupConv1x1(width, width, 4),
        cellops.SpatialAttention(mode="pool"),
    ]


def test_compiled_autograd() -> None:
    """Of any module, once a pack is there: the hook for its old keys was compiled too, with a half-made parent."""
    torch.compiler.reset()
    model = nn.Sequential(cellops.DeformConv2dPack(3, 8, 3), cellops.FReLU(8), cellops.SqueezeExcite(8))
    input = torch.randn(2, 3, 9, 9)
    wanted = torch.autograd.grad(model(input).square().sum(), list(model.parameters()))
    for function in (model, torch.compile(model, backend="eager")):
        loss = function(input).square().sum()
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda loss: loss.backward(), backend="eager")(loss)
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], list(wanted))
        model.zero_grad()


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    "module",
    [
        lambda: cellops.GroupConv1x1(96, 32, 1),
        lambda: cellops.GroupConv1x1(24, 32, 2),
        lambda: cellops.DepthwiseConv2d(24, 5),
    ],
    ids=["deep", "shallow", "depthwise"],
)
def test_bfloat16_compiles_as_one_graph(module: Callable[[], nn.Module], training: bool, autocast: bool) -> None:
    torch._dynamo.reset()
    ours = module().train(training)
    input = torch.randn(2, next(ours.parameters()).shape[1] * getattr(ours, "groups", 24), 5, 5)
    if not autocast:
        ours, input = ours.bfloat16(), input.bfloat16()
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = torch.compile(ours, fullgraph=True, backend="eager")(input)
        torch.testing.assert_close(found, ours(input), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", list(MODULES))
def test_eager_mode_calls_the_op(name: str) -> None:
    op, build = MODULES[name]
    with torch.profiler.profile() as profile, torch.no_grad():
        build(CHANNELS).eval()(torch.randn(1, CHANNELS, 16, 16))
    assert any(f"cellops::{op.partition(' ')[0]}" in event.key for event in profile.key_averages())
