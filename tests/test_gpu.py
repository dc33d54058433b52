"""What only a GPU can show: streams, graphs, autocast, other devices, equal bits, tensors over 2^31 elements, memory.

Every kernel that an op has there is tried, not only the one that is taken by default.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellops
from cellops import _backend
from cellops.testing import Case, assert_close_to_reference, cases, forward_and_gradients, to_dtype

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

OPS = tuple(_backend.OPS)
KERNELS = [(op, backend) for op, backends in _backend.OPS.items() for backend in backends if backend != "cpu"]
SCATTERING = [pair for pair in KERNELS if pair[0] in ("deform_conv2d", "offset_sample2d")]
"""Their backward adds by atomics, outside of deterministic mode at least."""


def first_case(op: str, tag: str = "small") -> Case:
    return cases(op, tag)[0]


def kernel_of(case: Case, backend: str | None, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    """The op with a backend, or a skip with the reason why it has none here."""
    reason = None if backend is None else _backend.why_not(backend, case.op, "cuda", dtype)
    if reason is not None:
        pytest.skip(str(reason))
    return functools.partial(case.function, backend=backend)


def agrees(case: Case, found: dict[str, Tensor], arguments: dict[str, Any]) -> None:
    """Output and gradients are within the tolerances of float32."""
    wanted = forward_and_gradients(case.reference, to_dtype(arguments, torch.float64), grad_dtype=torch.float32)
    for name, tensor in found.items():
        assert_close_to_reference(tensor, wanted[name], terms=case.terms[name], what=name)


@pytest.fixture
def atomics() -> None:
    """The mode that users have: additions in any order."""
    torch.use_deterministic_algorithms(False)


def tensors_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


# Streams


@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_on_a_side_stream_behind_slow_work(atomics: None, op: str, backend: str) -> None:
    """Inputs are written on the same stream a while after the call was made: a launch elsewhere reads too early."""
    case = first_case(op)
    function = kernel_of(case, backend)
    arguments = case.make(device="cuda")
    forward_and_gradients(function, arguments)  # compiled before anything is timed
    late = {name: torch.full_like(value, 1e3) for name, value in tensors_of(arguments).items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        for name, value in late.items():
            value.copy_(arguments[name])
        found = forward_and_gradients(function, {**arguments, **late})
    side.synchronize()
    agrees(case, found, arguments)


@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_scratch_of_a_side_stream_is_not_given_to_another(atomics: None, op: str, backend: str) -> None:
    """What the kernels still use is freed and asked for again, on another stream, while they wait for their turn."""
    case = first_case(op)
    function = kernel_of(case, backend)
    arguments = case.make(device="cuda")
    forward_and_gradients(function, arguments)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        found = forward_and_gradients(function, arguments)
    overwritten = [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(64)]
    side.synchronize()
    agrees(case, found, arguments)
    assert len(overwritten) == 64


# CUDA graphs


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_captured_in_a_graph_and_replayed_on_new_values(
    atomics: None, op: str, backend: str, memory_format: torch.memory_format
) -> None:
    case = first_case(op)
    function = kernel_of(case, backend)
    arguments = case.make(device="cuda", memory_format=memory_format)
    leaves = {name: value.requires_grad_() for name, value in tensors_of(arguments).items()}

    def call() -> tuple[Tensor, ...]:
        found = function(**arguments)
        output = found[0] if isinstance(found, tuple) else found
        return (output, *torch.autograd.grad(output, tuple(leaves.values()), torch.ones_like(output)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    other = case.make(device="cuda", memory_format=memory_format, seed=7)
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(other[name])
    graph.replay()
    graph.replay()  # what adds up must begin at zero every time
    torch.cuda.synchronize()
    for one, wanted in zip(captured, call(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)


def test_a_network_captured_in_a_graph_for_training(atomics: None) -> None:
    """By `make_graphed_callables`, which takes the launches' Python out of a training step."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(8, 16, 3, padding=1), cellops.FReLU(16), cellops.DeformConv2dPack(16, 16, 3, padding=1))
    network = nn.Sequential(*layers, cellops.EfficientChannelAttention(16)).cuda()
    nn.init.normal_(network[2].conv_offset.weight, std=0.1)
    twin = copy.deepcopy(network)
    samples = [torch.randn(4, 8, 14, 14, device="cuda", requires_grad=True) for _ in range(2)]

    def step(module: nn.Module, input: Tensor) -> list[Tensor]:
        output = module(input)
        gradients = torch.autograd.grad(output.square().sum(), (input, *module.parameters()))
        return [one.detach().clone() for one in (output, *gradients)]

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        graphed = torch.cuda.make_graphed_callables(network, (samples[0],))
        pairs = list(zip(step(graphed, samples[1]), step(twin, samples[1]), strict=True))
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


# Autocast


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_autocast(op: str, dtype: torch.dtype) -> None:
    case = first_case(op)
    arguments = case.make(device="cuda")
    with torch.autocast("cuda", dtype):
        found = case.function(**arguments)
        output = found[0] if isinstance(found, tuple) else found
    assert output.dtype == dtype
    rounded = to_dtype(arguments, dtype)
    if "offset" in rounded:
        rounded["offset"] = arguments["offset"]
    eager = case.reference(**rounded)
    eager = eager[0] if isinstance(eager, tuple) else eager
    wanted = case.reference(**to_dtype(rounded, torch.float64))
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    assert_close_to_reference(output, wanted, terms=case.terms["output"], eager=eager)


def test_a_network_trains_under_autocast_with_a_scaler() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        cellops.FReLU(16),
        cellops.DepthwiseConv2d(16),
        cellops.DeformConv2dPack(16, 16, 3, padding=1),
        cellops.SqueezeExcite(16, rd_channels=4),
        cellops.GroupConv1x1(16, 32, 4, shuffle=True),
        cellops.EfficientChannelAttention(32),
        cellops.SpatialAttention(32),
        cellops.ConvOffset2d(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 3),
    ).to("cuda", memory_format=torch.channels_last)
    images = torch.randn(12, 3, 20, 24, device="cuda").contiguous(memory_format=torch.channels_last)
    classes = torch.arange(12, device="cuda") % 3
    optimizer, scaler = torch.optim.AdamW(network.parameters(), 3e-3), torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(network(images).float(), classes)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses


# Compilers


@pytest.mark.parametrize("op", OPS)
def test_compiled_with_its_backward(op: str) -> None:
    case = first_case(op)
    arguments = case.make(device="cuda", memory_format=torch.channels_last)
    wanted = forward_and_gradients(case.function, arguments)
    torch.compiler.reset()
    found = forward_and_gradients(torch.compile(case.function, fullgraph=True, dynamic=True), arguments)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-4)


# Networks


@pytest.mark.parametrize("name", ["deform_resnet50", "dresnet_025", "hqnet_tiny", "hqnet_dcn", "shufflenet_v1_g3"])
def test_networks_answer_as_on_the_cpu_and_train(name: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    from cellops.models import create_model

    torch.manual_seed(0)
    network = create_model(name, num_classes=4).eval()
    images = torch.randn(2, 3, 224, 224)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            wanted = network(images)
            network = network.to("cuda", memory_format=torch.channels_last)
            images = images.to("cuda").contiguous(memory_format=torch.channels_last)
            found = network(images).cpu()
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    with torch.autocast("cuda", torch.bfloat16):
        loss = nn.functional.cross_entropy(network.train()(images).float(), torch.tensor([0, 1], device="cuda"))
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_recipe_trains_on_the_gpu(tmp_path: Any, precision: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    command = [sys.executable, "-m", "cellops.models", "train", "--recipe", "demo", "--output", str(tmp_path / "run")]
    settings = ("training.device=cuda", f"training.precision={precision}", "data.options={count: 200, size: 64}")
    command += ["--epochs", "2", *(word for one in settings for word in ("--set", one))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CELLOPS_CACHE": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "results.json").is_file()


# Devices


@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_on_another_device_than_the_current_one(op: str, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    case = first_case(op)
    function = kernel_of(case, backend)
    arguments = case.make(device="cuda:1")
    with torch.cuda.device(0):
        found = forward_and_gradients(function, arguments)
        assert torch.cuda.current_device() == 0
    assert {tensor.device for tensor in found.values()} == {torch.device("cuda", 1)}
    agrees(case, found, arguments)


@pytest.mark.parametrize("op", OPS)
def test_tensors_on_two_devices_are_an_error(op: str) -> None:
    arguments = first_case(op).make(device="cuda")
    name = list(tensors_of(arguments))[1]
    with pytest.raises(RuntimeError, match=f"{name} must be on cuda:0 like the input, got cpu"):
        first_case(op).function(**{**arguments, name: arguments[name].cpu()})


@pytest.mark.parametrize("op", OPS)
def test_the_cpus_kernels_do_not_take_tensors_of_a_gpu(op: str) -> None:
    case = first_case(op)
    with pytest.raises(RuntimeError, match=f"backend='cpu' cannot run {op} on cuda"):
        case.function(**case.make(device="cuda"), backend="cpu")


# Bit-identical results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_deterministic_mode_gives_the_same_bits(op: str, backend: str, dtype: torch.dtype) -> None:
    case = first_case(op, "real")
    function = kernel_of(case, backend, dtype)
    arguments = case.make(dtype, "cuda", torch.channels_last)
    torch.use_deterministic_algorithms(True, warn_only=True)
    first = forward_and_gradients(function, arguments)
    for _ in range(3):
        again = forward_and_gradients(function, arguments)
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("op", "backend"), SCATTERING)
def test_additions_in_any_order_agree(atomics: None, op: str, backend: str, memory_format: torch.memory_format) -> None:
    """The contract runs in deterministic mode; this is the mode that users have."""
    for case in (*cases(op, "small"), first_case(op, "real")):
        arguments = case.make(device="cuda", memory_format=memory_format)
        agrees(case, forward_and_gradients(kernel_of(case, backend), arguments), arguments)


# Sizes


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_tensors_of_more_than_2_to_the_31_elements(
    atomics: None, op: str, backend: str, memory_format: torch.memory_format
) -> None:
    """The last images of a batch that long give what they give by themselves."""
    case = first_case(op, "real")
    function = kernel_of(case, backend, torch.float16)
    few = case.make(torch.float16, "cuda", memory_format)
    batch = few["input"].shape[0]
    repeats = 2**31 // few["input"].numel() + 2
    batched = [name for name in ("input", "offset", "mask") if isinstance(few.get(name), Tensor)]
    needed = 3 * repeats * sum(few[name].nbytes for name in batched)
    if needed > 0.9 * torch.cuda.mem_get_info()[0]:
        pytest.skip(f"it takes about {needed >> 30} GiB of the GPU's memory")
    many = dict(few)
    for name in batched:
        many[name] = few[name].repeat(repeats, 1, 1, 1).contiguous(memory_format=memory_format)
    with torch.no_grad():
        found, wanted = function(**many), function(**few)
    if isinstance(found, tuple):  # statistics of equal images are those of one of them
        (found, *statistics), (wanted, *expected) = found, wanted
        for one, other in zip(statistics, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert many["input"].numel() > 2**31
    torch.testing.assert_close(found[-batch:], wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[:batch], wanted, rtol=1e-2, atol=1e-2)


# Memory


EXTRA = {("deform_conv2d", False): 0.6, ("deform_conv2d", True): 0.6, ("offset_sample2d", True): 4.2}
"""Most memory above inputs, output and gradients, in tensors of the input's size, forward and backward in bfloat16.

Half types have float32 sums of the input's gradient beside it: for images of 4 MiB at a time in `deform_conv2d`, for
the whole tensor in `offset_sample2d` (2.0). `frelu` and `depthwise_conv2d` write the convolution's gradient in float32
(2.0). In deterministic mode the CUDA kernels' sums are integers of 64 bits (4.0).
"""


@pytest.mark.parametrize(
    ("op", "backend", "deterministic"), [(*pair, False) for pair in KERNELS] + [(*pair, True) for pair in SCATTERING]
)
def test_peak_memory(op: str, backend: str, deterministic: bool) -> None:
    """Besides what it returns, a call needs no more than its docstring says, and no im2col buffer (9 inputs)."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    case = first_case(op, "real")
    function = kernel_of(case, backend, torch.bfloat16)
    drawn = case.make(torch.bfloat16, "cuda", torch.channels_last)
    arguments = {
        name: value.repeat(16, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        if name in ("input", "offset", "mask") and isinstance(value, Tensor)
        else value
        for name, value in drawn.items()
    }
    leaves = {name: value.requires_grad_() for name, value in tensors_of(arguments).items()}
    grad_output = None

    def call() -> list[Tensor]:
        nonlocal grad_output
        found = function(**arguments)
        output = found[0] if isinstance(found, tuple) else found
        if grad_output is None:
            grad_output = torch.randn_like(output)
        return [output.detach(), *torch.autograd.grad(output, tuple(leaves.values()), grad_output)]

    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = call()
    extra = torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in returned)
    limit = EXTRA.get((op, deterministic), 2.2) * arguments["input"].nbytes + (8 << 20)
    assert extra <= limit, f"{extra / arguments['input'].nbytes:.2f} tensors of the input's size"
