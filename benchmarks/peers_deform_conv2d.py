"""What a user could run instead of `cellops.deform_conv2d`, each built from the same arguments and ready to be called.

A builder takes a `Problem` and returns a call that gives the output; a peer that cannot run it raises `Missing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cellops import testing

Call = Callable[[], Any]
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Missing(Exception):
    """A peer is not installed or cannot run this problem; the text says why."""


@dataclass(frozen=True)
class Problem:
    """One case in one dtype and layout, with its tensors."""

    case: testing.Case
    dtype: torch.dtype
    layout: str
    threads: int
    arguments: testing.Arguments

    @classmethod
    def of(cls, case: testing.Case, dtype: torch.dtype, layout: str, threads: int) -> Problem:
        return cls(case, dtype, layout, threads, case.make(dtype, memory_format=FORMATS[layout]))

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype."""
        return replace(self, dtype=dtype, arguments=testing.to_dtype(self.arguments, dtype))

    def tensor(self, name: str) -> Tensor | None:
        value = self.arguments[name]
        return value if value is None else value.detach()


def cellops_call(problem: Problem) -> Callable[..., Tensor]:
    return problem.case.function


def torchvision_call(problem: Problem) -> Callable[..., Tensor]:
    """torchvision's function, which takes the same arguments."""
    function = require("torchvision").ops.deform_conv2d
    try:
        function(**problem.arguments)
    except RuntimeError as error:
        raise Missing(str(error).splitlines()[0].split(", ")[-1]) from error
    return function


def dense_call(problem: Problem) -> Callable[..., Tensor]:
    """`torch.conv2d` with the same weight: the arithmetic of the deformable convolution without the sampling."""
    groups = problem.case.sizes["groups"]

    def dense(
        *, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, **unused: Any
    ) -> Tensor:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)

    return dense


EAGER: dict[str, Callable[[Problem], Callable[..., Tensor]]] = {
    "cellops": cellops_call,
    "torchvision": torchvision_call,
    "dense": dense_call,
}
"""Functions of torch tensors, which can be trained."""


def eager(build: Callable[[Problem], Callable[..., Tensor]], problem: Problem, *, backward: bool) -> Call:
    """A call of a torch function under no_grad, or forward and `autograd.grad` to every tensor it uses."""
    function = build(problem)
    if not backward:
        arguments = dict(problem.arguments)

        def forward() -> Tensor:
            with torch.no_grad():
                return function(**arguments)

        return forward
    names = ("input", "weight", "bias") if build is dense_call else ("input", "offset", "mask", "weight", "bias")
    leaves = {name: tensor.requires_grad_() for name in names if (tensor := problem.tensor(name)) is not None}
    arguments = {**problem.arguments, **leaves}
    inputs = tuple(leaves.values())
    output = function(**arguments).detach()
    drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grad_output = torch.empty_like(output).copy_(drawn)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(**arguments), inputs, grad_output)

    return forward_and_backward


def onnxruntime_call(problem: Problem) -> Call:
    """A session over one DeformConv node, constant weight, inputs and output bound once: nothing copied per call."""
    runtime, onnx = require("onnxruntime"), require("onnx")
    _float32_only(problem, "its CPU kernel of DeformConv takes float32 and float64")
    sizes = problem.case.sizes
    inputs, weights = _arrays(problem, ("input", "offset", "mask")), _arrays(problem, ("weight", "bias"))
    pads = [*sizes["padding"], *sizes["padding"]]
    node = onnx.helper.make_node(
        "DeformConv",
        [name if name in {**inputs, **weights} else "" for name in ("input", "weight", "offset", "bias", "mask")],
        ["output"],
        kernel_shape=sizes["kernel_size"],
        pads=pads,
        strides=sizes["stride"],
        dilations=sizes["dilation"],
        group=sizes["groups"],
        offset_group=sizes["offset_groups"],
    )
    output = torch.empty(output_shape(problem))
    described = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "deform_conv2d",
        [described(name, onnx.TensorProto.FLOAT, array.shape) for name, array in inputs.items()],
        [described("output", onnx.TensorProto.FLOAT, output.shape)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = problem.threads, 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("output", "cpu", 0, "float32", tuple(output.shape), output.data_ptr())

    def run(bound: object = inputs) -> Tensor:  # the binding knows only addresses
        session.run_with_iobinding(binding)
        return output

    return run


def openvino_call(problem: Problem) -> Call:
    """A compiled model of the same node, built directly: OpenVINO's ONNX reader has no rule for DeformConv.

    A channels_last problem enters and leaves in channels_last, which is what its kernel computes in.
    """
    openvino = require("openvino")
    _float32_only(problem, "its kernel computes in float32 also where the precision hint is bf16")
    opset, sizes = openvino.opset8, problem.case.sizes
    arrays = _arrays(problem, ("input", "offset", "mask"))
    weights = _arrays(problem, ("weight", "bias"))
    parameters = {name: opset.parameter(list(array.shape), array.dtype, name=name) for name, array in arrays.items()}
    node = opset.deformable_convolution(
        parameters["input"],
        parameters["offset"],
        opset.constant(weights["weight"]),
        list(sizes["stride"]),
        list(sizes["padding"]),
        list(sizes["padding"]),
        list(sizes["dilation"]),
        parameters.get("mask"),
        group=sizes["groups"],
        deformable_group=sizes["offset_groups"],
        bilinear_interpolation_pad=True,
    )
    if "bias" in weights:
        node = opset.add(node, opset.constant(weights["bias"].reshape(1, -1, 1, 1)))
    model = openvino.Model([node], list(parameters.values()), "deform_conv2d")
    channels_last = problem.layout == "channels_last"
    if channels_last:
        ports = openvino.preprocess.PrePostProcessor(model)
        for port in (ports.input(0), ports.output(0)):
            port.tensor().set_layout(openvino.Layout("NHWC"))
            port.model().set_layout(openvino.Layout("NCHW"))
        model = ports.build()
        arrays["input"] = arrays["input"].transpose(0, 2, 3, 1).copy()
    settings = {
        "INFERENCE_NUM_THREADS": problem.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    for name, array in arrays.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def run(bound: object = arrays) -> Tensor:
        request.infer()
        output = torch.from_numpy(request.get_output_tensor(0).data)
        return output.permute(0, 3, 1, 2) if channels_last else output

    return run


def require(name: str) -> Any:
    """The module of that name, or `Missing`."""
    try:
        return __import__(name)
    except ImportError as error:
        raise Missing(f"not installed ({error})") from error


def _float32_only(problem: Problem, reason: str) -> None:
    if problem.dtype is not torch.float32:
        raise Missing(reason)


def _arrays(problem: Problem, names: tuple[str, ...]) -> dict[str, Any]:
    tensors = {name: problem.tensor(name) for name in names}
    return {name: tensor.contiguous().numpy() for name, tensor in tensors.items() if tensor is not None}


def output_shape(problem: Problem) -> tuple[int, ...]:
    """[N, O, OH, OW]."""
    sizes = problem.case.sizes
    return (sizes["batch"], sizes["out_channels"], sizes["out_height"], sizes["out_width"])
