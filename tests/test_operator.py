"""What `Operator` gives every op built on it: registration, compile, export, functorch, autocast."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn

import cellops
from cellops import _native
from cellops.ops import depthwise_conv2d, eca, frelu, group_conv1x1, offset_sample2d, spatial_attention, squeeze_excite
from cellops.ops._operator import Operator
from cellops.testing import Case, cases, forward_and_gradients

OPERATORS: dict[str, Operator] = {
    "offset_sample2d": offset_sample2d._operator,
    "frelu": frelu._operator,
    "frelu_batch_norm": frelu._batch_norm_operator,
    "depthwise_conv2d": depthwise_conv2d._operator,
    "depthwise_conv2d_batch_norm": depthwise_conv2d._batch_norm_operator,
    "squeeze_excite": squeeze_excite._operator,
    "eca": eca._operator,
    "group_conv1x1": group_conv1x1._operator,
    "group_conv1x1_batch_norm": group_conv1x1._batch_norm_operator,
    "spatial_attention": spatial_attention._operator,
}
BASIC = [case for case in cases(None, "small") if case.op in OPERATORS and case.name.endswith("_basic")]
each_op = pytest.mark.parametrize("case", BASIC, ids=str)
each_layout = pytest.mark.parametrize(
    "layout", [pytest.param(torch.contiguous_format, id="nchw"), pytest.param(torch.channels_last, id="channels_last")]
)


def test_every_operator_has_a_basic_case() -> None:
    assert {case.op for case in BASIC} == set(OPERATORS)


def split(case: Case, arguments: dict[str, Any]) -> tuple[list[Tensor], list[Any]]:
    """Tensors and settings in the order of the raw op."""
    names = OPERATORS[case.op].names
    return [arguments[name] for name in names], [value for name, value in arguments.items() if name not in names]


def of_tensors(case: Case, arguments: dict[str, Any], function: Any = None) -> Any:
    """The public function, or another, of the call's tensors alone."""
    names = OPERATORS[case.op].names
    function = function or case.function
    return lambda *tensors: output_of(function(**{**arguments, **dict(zip(names, tensors, strict=True))}))


def output_of(result: Any) -> Tensor:
    """What an op returns, without the statistics behind it."""
    return result[0] if isinstance(result, tuple) else result


def beside_output(case: Case, tensors: list[Tensor], settings: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The statistics, which the backward op wants after the tensors, and what is saved, which it gets last."""
    operator = OPERATORS[case.op]
    found = operator.training_op(*tensors, *settings)
    rest = [one.detach() for one in found[1:]] if isinstance(found, tuple) else []
    return rest[: len(operator.statistics)], rest[len(operator.statistics) :]


@each_op
@each_layout
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(case: Case, layout: torch.memory_format, requires_grad: bool) -> None:
    tensors, settings = split(case, case.make(memory_format=layout))
    operator = OPERATORS[case.op]
    for tensor in tensors:
        tensor.requires_grad_(requires_grad)
    for op in {operator.op, operator.training_op}:
        torch.library.opcheck(op, (*tensors, *settings))
    grad_output = torch.randn_like(output_of(operator.op(*tensors, *settings))).requires_grad_(requires_grad)
    statistics, saved = beside_output(case, tensors, settings)
    arguments = (grad_output, *tensors, *statistics, *settings, [True] * len(tensors), None, *saved)
    torch.library.opcheck(operator.backward_op, arguments)


@each_op
def test_raw_op_trains(case: Case) -> None:
    tensors, settings = split(case, case.make())
    leaves = [tensor.requires_grad_() for tensor in tensors]
    output_of(getattr(torch.ops.cellops, case.op)(*leaves, *settings)).square().sum().backward()
    wanted = torch.autograd.grad(of_tensors(case, case.make())(*leaves).square().sum(), leaves)
    for leaf, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=0)


@each_op
@each_layout
def test_meta_tensors_have_shape_and_strides(case: Case, layout: torch.memory_format) -> None:
    real, meta = (
        forward_and_gradients(case.function, case.make(device=device, memory_format=layout))
        for device in ("cpu", "meta")
    )
    for name, tensor in real.items():
        assert (tensor.shape, tensor.stride()) == (meta[name].shape, meta[name].stride()), name


@each_op
@each_layout
def test_devices_without_a_kernel_take_the_reference(case: Case, layout: torch.memory_format) -> None:
    """The kernels registered for any device, run here on the CPU's tensors."""
    tensors, settings = split(case, case.make(memory_format=layout))
    operator = OPERATORS[case.op]
    results, wanted = (
        found if isinstance(found, tuple) else (found,)
        for found in (
            operator.forward_any_device(*tensors, *settings, "reference", saves=True),
            operator.training_op(*tensors, *settings, "reference"),
        )
    )
    flags = [True] * len(tensors)
    output, *rest = results
    statistics, saved = rest[: len(operator.statistics)], rest[len(operator.statistics) :]
    found = operator.backward_any_device(output, *tensors, *statistics, *settings, flags, "reference", *saved)
    expected = operator.backward_op(output, *tensors, *statistics, *settings, flags, "reference", *saved)
    for one, other in zip((*results, *found), (*wanted, *expected), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


@each_op
@pytest.mark.skipif(_native.error is not None, reason=f"no compiled library: {_native.error}")
def test_only_wanted_gradients_are_computed(case: Case) -> None:
    tensors, settings = split(case, case.make())
    operator = OPERATORS[case.op]
    statistics, saved = beside_output(case, tensors, settings)
    grad_output = torch.randn_like(output_of(operator.op(*tensors, *settings)))

    def backward(wanted: list[bool]) -> list[Tensor]:
        return operator.backward_op(grad_output, *tensors, *statistics, *settings, wanted, "cpu", *saved)

    every = backward([True] * len(tensors))
    for bits in range(1, 2 ** len(tensors)):
        wanted = [bool(bits >> i & 1) for i in range(len(tensors))]
        chosen = [gradient for gradient, want in zip(every, wanted, strict=True) if want]
        for one, other in zip(backward(wanted), chosen, strict=True):
            assert torch.equal(one, other)


@each_op
def test_forward_mode(case: Case) -> None:
    arguments = case.make(torch.float64)
    tensors, _ = split(case, arguments)
    for which, tensor in enumerate(tensors):
        tangent = torch.randn_like(tensor)
        before, after = tensors[:which], tensors[which + 1 :]
        function = of_tensors(case, arguments)
        wanted, found = (
            torch.func.jvp(lambda t, f=f, before=before, after=after: f(*before, t, *after), (tensor,), (tangent,))[1]
            for f in (of_tensors(case, arguments, case.reference), function)
        )
        torch.testing.assert_close(found, wanted)
        assert wanted.abs().max() > 1e-4
        with fwAD.dual_level():
            dual = fwAD.make_dual(tensor, tangent)
            output = fwAD.unpack_dual(function(*before, dual, *after))
            torch.testing.assert_close(output.tangent, wanted)
            with pytest.raises(RuntimeError, match="backend='cpu' cannot run"):
                of_tensors(case, {**arguments, "backend": "cpu"})(*before, dual, *after)


@each_op
def test_functorch(case: Case) -> None:
    arguments = case.make(torch.float64)
    tensors, _ = split(case, arguments)
    function, reference = of_tensors(case, arguments), of_tensors(case, arguments, case.reference)
    every = tuple(range(len(tensors)))

    def loss(function: Any, *tensors: Tensor) -> Tensor:
        return function(*tensors).square().sum()

    found = torch.func.grad(functools.partial(loss, function), every)(*tensors)
    wanted = torch.func.grad(functools.partial(loss, reference), every)(*tensors)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(torch.func.functionalize(function)(*tensors), function(*tensors))
    batch = [torch.stack((tensor, tensor + 0.5)) for tensor in tensors]
    per_sample = torch.func.vmap(torch.func.grad(functools.partial(loss, function), every))(*batch)
    expected = torch.func.vmap(torch.func.grad(functools.partial(loss, reference), every))(*batch)
    for one, other in zip(per_sample, expected, strict=True):
        torch.testing.assert_close(one, other)


@each_op
def test_autocast_casts_and_returns_the_autocast_type(case: Case) -> None:
    arguments = case.make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = output_of(case.function(**arguments))
    assert output.dtype == torch.bfloat16
    stay = {name for name, wide in zip(OPERATORS[case.op].names, OPERATORS[case.op].wide, strict=True) if wide}
    cast = {
        key: value.bfloat16() if isinstance(value, Tensor) and key not in stay else value
        for key, value in arguments.items()
    }
    assert torch.equal(output, output_of(case.function(**cast)))


@each_op
def test_compiled_and_dynamic(case: Case) -> None:
    torch._dynamo.reset()  # or the cases share one function, and its limit of programs
    arguments = case.make()
    tensors, _ = split(case, arguments)
    compiled = torch.compile(of_tensors(case, arguments), fullgraph=True, dynamic=True)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    for size in (2, 5):
        for i, name in enumerate(OPERATORS[case.op].names):
            if name in ("input", "offset"):
                leaves[i] = torch.randn(size, *tensors[i].shape[1:], requires_grad=True)
        found = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
        wanted = torch.autograd.grad(of_tensors(case, arguments)(*leaves).square().sum(), leaves)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "module",
    [
        cellops.ConvOffset2d(8),
        cellops.SqueezeExcite(8, rd_channels=4),
        cellops.EfficientChannelAttention(8),
        cellops.SpatialAttention(8, 3),
    ],
    ids=["conv_offset", "se", "eca", "spatial"],
)
def test_exported_program_trains_and_names_no_backend(module: nn.Module) -> None:
    input = torch.randn(2, 8, 5, 6)
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (input,)), file)
    file.seek(0)
    program = torch.export.load(file)
    assert "cellops" in str(program.graph) and "'cpu'" not in str(program.graph)
    loaded = program.module()
    loaded(input).square().sum().backward()
    module.zero_grad()
    module(input).square().sum().backward()
    wanted = dict(module.named_parameters())
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad)


@each_op
def test_errors_name_the_argument(case: Case) -> None:
    arguments = case.make()
    weight = OPERATORS[case.op].names[1]
    with pytest.raises(ValueError, match="input must have 4 dimensions"):
        case.function(**{**arguments, "input": arguments["input"][0]})
    with pytest.raises(ValueError, match=f"{weight} must have shape"):
        case.function(**{**arguments, weight: arguments[weight][..., :0]})
    with pytest.raises(TypeError, match=f"{weight} must be torch.float32 like the input, got torch.float64"):
        case.function(**{**arguments, weight: arguments[weight].double()})
    with pytest.raises(TypeError, match="input must be one of"):
        case.function(**{**arguments, "input": arguments["input"].long()})
    with pytest.raises(RuntimeError, match=f"{weight} must be on cpu like the input, got meta"):
        case.function(**{**arguments, weight: arguments[weight].to("meta")})
    with pytest.raises(ValueError, match="backend must be one of"):
        case.function(**arguments, backend="fast")
    with pytest.raises(RuntimeError, match=r"has no cuda kernel|its kernels take tensors on a CUDA device"):
        case.function(**arguments, backend="cuda")


@each_op
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_tensors_that_are_not_dense_are_refused(case: Case, backend: str | None) -> None:
    arguments = case.make()
    for name in OPERATORS[case.op].names[:2]:
        with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got one of layout torch.sparse_coo"):
            case.function(**{**arguments, name: arguments[name].to_sparse()}, backend=backend)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("eps", [-1e-5, float("nan")])
@pytest.mark.parametrize("case", [case for case in BASIC if case.op.endswith("_batch_norm")], ids=str)
def test_an_eps_that_no_normalisation_takes_is_refused(case: Case, eps: float, backend: str | None) -> None:
    arguments = case.make()
    with pytest.raises(ValueError, match=f"eps must be at least 0, got {eps}"):
        case.function(**{**arguments, "eps": eps}, backend=backend)
    case.function(**{**arguments, "eps": 0.0}, backend=backend)


@each_op
def test_bit_identical_from_run_to_run(case: Case) -> None:
    big = next(other for other in cases(case.op, "edge") if other.name.endswith("_image"))
    arguments = big.make()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            first, second = (forward_and_gradients(big.function, arguments) for _ in range(2))
            assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.set_num_threads(threads)


def test_unknown_settings_are_refused() -> None:
    (case,) = (case for case in BASIC if case.op == "squeeze_excite")
    arguments = case.make()
    with pytest.raises(ValueError, match="act must be one of 'relu', 'silu', got 'tanh'"):
        cellops.squeeze_excite(**{**arguments, "act": "tanh"})
    with pytest.raises(ValueError, match="gate must be one of 'sigmoid', 'hard_sigmoid', got 'softmax'"):
        cellops.squeeze_excite(**{**arguments, "gate": "softmax"})


# The modules beside timm's


@each_layout
@pytest.mark.parametrize("channels", [16, 64, 100, 512])
def test_squeeze_excite_is_timms(channels: int, layout: torch.memory_format) -> None:
    timm = pytest.importorskip("timm.layers")
    ours, theirs = cellops.SqueezeExcite(channels), timm.SEModule(channels)
    ours.load_state_dict(theirs.state_dict())
    same_module(ours, theirs, torch.randn(2, channels, 7, 6).contiguous(memory_format=layout))


def test_squeeze_excite_is_torchvisions_with_mobilenets_gate() -> None:
    torchvision = pytest.importorskip("torchvision.ops")
    theirs = torchvision.SqueezeExcitation(24, 8, scale_activation=nn.Hardsigmoid)
    ours = cellops.SqueezeExcite(24, rd_channels=8, gate="hard_sigmoid")
    ours.load_state_dict(theirs.state_dict())
    same_module(ours, theirs, torch.randn(2, 24, 7, 6))


@each_layout
@pytest.mark.parametrize(("channels", "kernel_size"), [(16, 3), (64, 3), (128, 5), (1024, 5), (2048, 7)])
def test_eca_is_timms(channels: int, kernel_size: int, layout: torch.memory_format) -> None:
    timm = pytest.importorskip("timm.layers")
    ours, theirs = cellops.EfficientChannelAttention(channels), timm.EcaModule(channels)
    assert ours.conv.kernel_size == (kernel_size,)
    ours.load_state_dict(theirs.state_dict())
    same_module(ours, theirs, torch.randn(2, channels, 5, 4).contiguous(memory_format=layout))


def same_module(ours: nn.Module, theirs: nn.Module, input: Tensor) -> None:
    inputs = [input.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    outputs = [module(leaf) for module, leaf in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-3)
