"""Ops seen through PyTorch's machinery: raw ops, compile, export, functorch, forward-mode AD, autocast, meta."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn

import cellops
from cellops import _native
from cellops.ops import _deform_conv2d_launch as launch
from cellops.reference import deform_conv2d as reference
from cellops.testing import Case, cases, forward_and_gradients, to_dtype

NAMES = ("input", "offset", "weight", "bias", "mask")
raw_op = torch.ops.cellops.deform_conv2d.default


def case_named(name: str) -> Case:
    (case,) = (case for case in cases("deform_conv2d") if case.name == name)
    return case


def sizes_of(arguments: dict[str, Any]) -> tuple[int, ...]:
    return *arguments["stride"], *arguments["padding"], *arguments["dilation"]


def raw(**arguments: Any) -> Tensor:
    """The public function's arguments for the raw op."""
    return raw_op(*(arguments[name] for name in NAMES), *sizes_of(arguments), arguments.get("backend"))


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    return [arguments[name] for name in NAMES if arguments[name] is not None]


def of_tensors(function: Callable[..., Tensor], arguments: dict[str, Any]) -> Callable[..., Tensor]:
    """The function of the call's tensors alone, in the order of `tensors_of`."""
    names = [name for name in NAMES if arguments[name] is not None]
    return lambda *tensors: function(**{**arguments, **dict(zip(names, tensors, strict=True))})


def assert_same(found: Any, wanted: Any, **options: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **options)


WAYS = [pytest.param(cellops.deform_conv2d, id="public"), pytest.param(raw, id="raw")]
each_way = pytest.mark.parametrize("function", WAYS)


# Registration


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["plain", "v1", "crossed_groups", "empty"])
def test_opcheck(name: str, requires_grad: bool) -> None:
    arguments = case_named(name).make()
    tensors = [None if arguments[key] is None else arguments[key].requires_grad_(requires_grad) for key in NAMES]
    torch.library.opcheck(raw_op, (*tensors, *sizes_of(arguments)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_backward(requires_grad: bool, layout: torch.memory_format) -> None:
    arguments = case_named("plain").make(memory_format=layout)
    grad_output = torch.randn_like(cellops.deform_conv2d(**arguments))
    tensors = [grad_output, *(arguments[name] for name in ("input", "offset", "weight", "mask"))]
    for tensor in tensors:
        tensor.requires_grad_(requires_grad)
    wanted = [True, True, True, True, True]
    torch.library.opcheck(torch.ops.cellops.deform_conv2d_backward.default, (*tensors, *sizes_of(arguments), wanted))


def test_raw_op_trains() -> None:
    arguments = case_named("plain").make()
    wanted = forward_and_gradients(cellops.deform_conv2d, arguments)
    assert_same(forward_and_gradients(raw, arguments).values(), wanted.values(), rtol=0, atol=0)
    leaves = [tensor.requires_grad_() for tensor in tensors_of(arguments)]
    torch.ops.cellops.deform_conv2d(*leaves, *sizes_of(arguments)).sum().backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["plain", "single_channel", "single_pixel", "empty"])
def test_meta_tensors_have_shape_and_strides(name: str, layout: torch.memory_format) -> None:
    case = case_named(name)
    real, meta = (cellops.deform_conv2d(**case.make(device=device, memory_format=layout)) for device in ("cpu", "meta"))
    assert meta.device.type == "meta"
    assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)
    gradients = [
        forward_and_gradients(case.function, case.make(device=device, memory_format=layout))
        for device in ("cpu", "meta")
    ]
    for one, other in zip(*(found.values() for found in gradients), strict=True):
        assert one.stride() == other.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_devices_without_a_kernel_take_the_reference(layout: torch.memory_format) -> None:
    """The kernels registered for any device, run here on the CPU's tensors."""
    arguments = case_named("plain").make(memory_format=layout)
    config = (*sizes_of(arguments), "reference")
    output = launch.forward_any_device(*(arguments[name] for name in NAMES), *config)
    wanted = cellops.deform_conv2d(**arguments, backend="reference")
    assert torch.equal(output, wanted) and output.stride() == wanted.stride()
    tensors = [arguments[name] for name in ("input", "offset", "weight", "mask")]
    found = launch.backward_any_device(torch.ones_like(output), *tensors, *config[:6], [True] * 5, "reference")
    leaves = [tensor.requires_grad_() for tensor in tensors_of(arguments)]
    gradients = torch.autograd.grad(cellops.deform_conv2d(**arguments, backend="reference").sum(), leaves)
    assert_same(found, gradients)
    assert [one.stride() for one in found] == [one.stride() for one in gradients]


def test_backend_governs_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("deform_conv2d", "deform_conv2d_backward"):
        kept = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, _name=name, _kept=kept: (calls.append(_name), _kept(*a))[1])
    arguments = case_named("plain").make()
    forward_and_gradients(functools.partial(cellops.deform_conv2d, backend="reference"), arguments)
    assert calls == ["deform_conv2d", "deform_conv2d_backward"]
    if _native.error is None:
        calls.clear()
        forward_and_gradients(functools.partial(cellops.deform_conv2d, backend="cpu"), arguments)
        assert calls == []
        leaf = arguments["input"].requires_grad_()
        output = cellops.deform_conv2d(**arguments, backend="cpu")
        (first,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        assert calls == [], "the first backward is the backend's, also where a second follows"
        first.square().sum().backward()
        assert calls


# Second derivatives


@each_way
@pytest.mark.parametrize("name", ["plain", "v1", "depthwise"])
def test_second_derivatives(name: str, function: Callable[..., Tensor]) -> None:
    arguments = case_named(name).make(torch.float64)
    tensors = [tensor.requires_grad_() for tensor in tensors_of(arguments)]
    assert torch.autograd.gradgradcheck(of_tensors(function, arguments), tensors, fast_mode=True)


def test_second_derivatives_of_dependent_arguments() -> None:
    """Offset and mask computed from the input: nothing may be counted twice."""
    arguments = case_named("plain").make(torch.float64)

    def function(input: Tensor, op: Callable[..., Tensor] = cellops.deform_conv2d) -> Tensor:
        offset = torch.tanh(input.mean(1, keepdim=True)) * arguments["offset"]
        mask = torch.sigmoid(input.sum(1, keepdim=True)) * arguments["mask"]
        return op(**{**arguments, "input": input, "offset": offset, "mask": mask})

    def second(op: Callable[..., Tensor]) -> Tensor:
        leaf = arguments["input"].detach().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf, op).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(second(cellops.deform_conv2d), second(reference.deform_conv2d))


def test_third_derivatives() -> None:
    arguments = case_named("pointwise").make(torch.float64)

    def third(op: Callable[..., Tensor]) -> Tensor:
        leaf = arguments["offset"].detach().requires_grad_()
        value = op(**{**arguments, "offset": leaf}).pow(4).sum()
        for _ in range(2):
            (value,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = value.pow(2).sum()
        return torch.autograd.grad(value, leaf)[0]

    torch.testing.assert_close(third(cellops.deform_conv2d), third(reference.deform_conv2d))


# Forward mode and functorch


def tangents_of(tensors: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in tensors]


@each_way
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("which", range(5))
def test_forward_mode(which: int, requires_grad: bool, function: Callable[..., Tensor]) -> None:
    arguments = case_named("plain").make(torch.float64)
    tensors = tensors_of(arguments)
    tangent = tangents_of(tensors)[which]
    _, wanted = torch.func.jvp(
        lambda tensor: of_tensors(reference.deform_conv2d, arguments)(*tensors[:which], tensor, *tensors[which + 1 :]),
        (tensors[which],),
        (tangent,),
    )
    assert wanted.abs().max() > 0.1
    with fwAD.dual_level():
        dual = list(tensors)
        dual[which] = fwAD.make_dual(tensors[which].requires_grad_(requires_grad), tangent)
        output = fwAD.unpack_dual(of_tensors(function, arguments)(*dual))
        assert output.tangent is not None
        torch.testing.assert_close(output.tangent, wanted)
        plain = of_tensors(function, arguments)(*tensors)
        assert fwAD.unpack_dual(plain).tangent is None
        torch.testing.assert_close(output.primal, plain)


def test_forward_mode_of_an_explicit_backend_is_refused() -> None:
    arguments = case_named("plain").make()
    with fwAD.dual_level():
        arguments["input"] = fwAD.make_dual(arguments["input"], torch.ones_like(arguments["input"]))
        with pytest.raises(RuntimeError, match="backend='cpu' cannot run deform_conv2d in forward-mode AD"):
            cellops.deform_conv2d(**arguments, backend="cpu")
        cellops.deform_conv2d(**arguments, backend="reference")


@each_way
@pytest.mark.parametrize("name", ["plain", "v1"])
def test_jvp(name: str, function: Callable[..., Tensor]) -> None:
    arguments = case_named(name).make(torch.float64)
    tensors = tensors_of(arguments)
    found, wanted = (
        torch.func.jvp(of_tensors(op, arguments), tuple(tensors), tuple(tangents_of(tensors)))
        for op in (function, reference.deform_conv2d)
    )
    assert_same(found, wanted)


@each_way
@pytest.mark.parametrize("name", ["plain", "v1"])
def test_functorch_gradients(name: str, function: Callable[..., Tensor]) -> None:
    arguments = case_named(name).make(torch.float64)
    tensors = tensors_of(arguments)
    every = tuple(range(len(tensors)))

    def loss(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: of_tensors(op, arguments)(*tensors).square().sum()

    found, wanted = (torch.func.grad(loss(op), every)(*tensors) for op in (function, reference.deform_conv2d))
    assert_same(found, wanted)

    def weight_loss(op: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: loss(op)(*tensors[:2], weight, *tensors[3:])

    def curvature(op: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        first = torch.func.grad(lambda offset: loss(op)(tensors[0], offset, *tensors[2:]))
        return torch.func.grad(lambda offset: first(offset).square().sum())

    for transform in (lambda op: torch.func.hessian(weight_loss(op))(tensors[2]), lambda op: curvature(op)(tensors[1])):
        torch.testing.assert_close(transform(function), transform(reference.deform_conv2d))


@each_way
def test_functionalized(function: Callable[..., Tensor]) -> None:
    """Functionalization has no rule for a Function of functorch, which the public function applied."""
    arguments = case_named("plain").make(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors_of(arguments)]
    call = of_tensors(function, arguments)
    functional = torch.func.functionalize(call)
    torch.testing.assert_close(functional(*leaves), call(*leaves))
    found, wanted = (torch.autograd.grad(one(*leaves).square().sum(), leaves) for one in (functional, call))
    assert_same(found, wanted)
    gradient = torch.func.grad(lambda weight: functional(*leaves[:2], weight, *leaves[3:]).square().sum())
    torch.testing.assert_close(gradient(leaves[2].detach()), wanted[2])


@each_way
@pytest.mark.parametrize(
    "mapped",
    [
        (0, 0, None, None, 0),
        (0, 0, 0, 0, 0),
        (None, None, 1, None, None),
        (None, 2, None, None, None),
        (1, None, None, 0, 0),
    ],
    ids=str,
)
def test_vmap(mapped: tuple[int | None, ...], function: Callable[..., Tensor]) -> None:
    arguments = case_named("groups2").make(torch.float64)
    call = of_tensors(function, arguments)
    tensors = [
        tensor if dim is None else torch.stack((tensor, 0.7 * tensor, tensor + 0.01), dim)
        for tensor, dim in zip(tensors_of(arguments), mapped, strict=True)
    ]

    def single(index: int) -> list[Tensor]:
        return [
            tensor if dim is None else tensor.select(dim, index) for tensor, dim in zip(tensors, mapped, strict=True)
        ]

    found = torch.func.vmap(call, mapped)(*tensors)
    torch.testing.assert_close(found, torch.stack([call(*single(index)) for index in range(3)]))

    gradient = torch.func.grad(lambda *tensors: call(*tensors).square().sum(), tuple(range(5)))
    found = torch.func.vmap(gradient, mapped)(*tensors)
    looped = [gradient(*single(index)) for index in range(3)]
    assert_same(found, [torch.stack(values) for values in zip(*looped, strict=True)])


# Autocast


@each_way
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str | None, function: Callable[..., Tensor]) -> None:
    case = case_named("plain")
    arguments = {**case.make(), "backend": backend}
    leaves = {name: arguments[name].requires_grad_() for name in NAMES}
    cast = {**arguments, **{name: leaves[name].detach().to(dtype) for name in NAMES if name != "offset"}}
    wanted = forward_and_gradients(cellops.deform_conv2d, cast, torch.ones(()))
    with torch.autocast("cpu", dtype):
        output = function(**arguments)
        inside = torch.autograd.grad(output.sum(), list(leaves.values()), retain_graph=True)
    outside = torch.autograd.grad(output.sum(), list(leaves.values()))
    assert output.dtype == dtype
    assert torch.equal(output, wanted["output"])
    for name, one, other in zip(NAMES, inside, outside, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other), f"{name}: backward inside and outside of autocast differ"
        assert torch.equal(one, wanted[name].float()), name


def test_autocast_leaves_float64_and_takes_half_offsets() -> None:
    arguments = case_named("plain").make(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert cellops.deform_conv2d(**arguments).dtype == torch.float64
        arguments = to_dtype(arguments, torch.float32)
        wanted = cellops.deform_conv2d(**arguments)
        for dtype in (torch.bfloat16, torch.float16):
            output = cellops.deform_conv2d(**{**arguments, "offset": arguments["offset"].to(dtype)})
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output, wanted, rtol=0.1, atol=0.5)


# Compile and export


class Model(nn.Module):
    """Predicts its own offsets and masks, so that it trains from end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.pack = cellops.DeformConv2dPack(4, 6, 3, stride=2, padding=1, offset_groups=2)
        self.head = cellops.DeformConv2d(6, 5, 1)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1

    def forward(self, input: Tensor) -> Tensor:
        features = self.pack(self.stem(input).relu())
        return self.head(features, features[:, :2])


def images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch * size))


def parameter_gradients(model: nn.Module, input: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(input).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compile(layout: torch.memory_format) -> None:
    torch._dynamo.reset()
    model = Model().to(memory_format=layout)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, size in ((2, 9), (3, 12), (5, 17)):
            input = images(batch, size).contiguous(memory_format=layout)
            assert_same([compiled(input)], [model(input)])
            assert compiled(input).stride() == model(input).stride()
            assert_same(parameter_gradients(compiled, input), parameter_gradients(model, input))
    with torch.no_grad():
        assert_same([compiled(input)], [model(input)])


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    input = images(2, 9)
    assert_same([compiled(input)], [model(input)])
    assert_same(parameter_gradients(compiled, input), parameter_gradients(model, input))


def test_compile_keeps_errors_and_backends() -> None:
    torch._dynamo.reset()
    arguments = case_named("plain").make()
    compiled = torch.compile(cellops.deform_conv2d, backend="aot_eager", fullgraph=True)
    for backend in ("reference", None):
        assert_same([compiled(**arguments, backend=backend)], [cellops.deform_conv2d(**arguments, backend=backend)])
    with pytest.raises(Exception, match=r"mask must have shape \(2, 9, 7, 6\)"):
        compiled(**{**arguments, "mask": arguments["mask"][:, :3]})
    with torch.autocast("cpu", torch.bfloat16):
        assert_same([compiled(**arguments)], [cellops.deform_conv2d(**arguments)])


def test_compiled_functorch() -> None:
    torch._dynamo.reset()
    arguments = case_named("plain").make(torch.float64)
    call = of_tensors(cellops.deform_conv2d, arguments)
    gradient = torch.func.grad(lambda *tensors: call(*tensors).square().sum(), (0, 1, 2, 3, 4))
    tensors = tensors_of(arguments)
    assert_same(torch.compile(gradient, backend="aot_eager")(*tensors), gradient(*tensors))


def ops_of(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if "cellops" in str(node.target)]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_trains(strict: bool) -> None:
    model = Model()
    batch, half = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("half", min=2, max=64)
    shapes = ({0: batch, 2: 2 * half, 3: 2 * half},)
    program = torch.export.export(model, (images(2, 8),), dynamic_shapes=shapes, strict=strict)
    nodes = ops_of(program)
    assert [node.target for node in nodes] == [raw_op, raw_op]
    assert all("cpu" not in map(str, (*node.args, *node.kwargs.values())) for node in nodes), "no backend is named"
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    for exported in (program, torch.export.load(stored), program.run_decompositions()):
        assert len(ops_of(exported)) == 2
        module = exported.module()
        for input in (images(2, 8), images(3, 12)):
            assert_same([module(input)], [model(input)])
            found = parameter_gradients(module, input)
            names = [name for name, _ in module.named_parameters()]
            wanted = dict(
                zip((name for name, _ in model.named_parameters()), parameter_gradients(model, input), strict=True)
            )
            assert_same(found, [wanted[name] for name in names])
            assert all(gradient.abs().sum() > 0 for gradient in found)


def test_reference_traces() -> None:
    """With dynamic shapes, and with its backward."""
    torch._dynamo.reset()
    arguments = case_named("plain").make()
    wanted = forward_and_gradients(reference.deform_conv2d, arguments)
    for options in ({"backend": "eager", "dynamic": True}, {"backend": "aot_eager"}):
        compiled = torch.compile(reference.deform_conv2d, fullgraph=True, **options)
        assert_same(forward_and_gradients(compiled, arguments).values(), wanted.values())
