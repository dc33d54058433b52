"""What is special about the Triton backend: its choice, its two ways to the input's gradient, its configurations."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import INTERPRETER_ERROR
from torch import Tensor
from triton_calls import TRITON_OPS, in_format

from cellops import _backend
from cellops.ops.depthwise_conv2d import depthwise_conv2d
from cellops.ops.frelu import frelu_batch_norm
from cellops.reference._activation import ACTIVATIONS
from cellops.reference.frelu import frelu_batch_norm as reference_frelu_batch_norm
from cellops.reference.offset_sample2d import offset_sample2d_backward as reference_offset_sample2d_backward
from cellops.testing import Case, assert_close_to_reference, cases, forward_and_gradients, to_dtype
from cellops.testing._compile_kernels import LIMITS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETER_ERROR is not None and not torch.cuda.is_available(), reason=str(INTERPRETER_ERROR)),
]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is not used beside a GPU")
LONG_INTERPRETED = [] if torch.cuda.is_available() else [pytest.mark.exhaustive]
"""Marks of a case that takes the interpreter long."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case_of(op: str, name: str) -> Case:
    (case,) = (case for case in cases(op) if case.name == name)
    return case


def agrees(case: Case, arguments: dict[str, Any]) -> None:
    """Forward and gradients agree with the float64 reference."""
    found = forward_and_gradients(
        functools.partial(case.function, backend="triton"), arguments, grad_dtype=torch.float32
    )
    wanted = forward_and_gradients(case.reference, to_dtype(arguments, torch.float64), grad_dtype=torch.float32)
    for name, tensor in found.items():
        assert_close_to_reference(tensor, wanted[name], terms=case.terms[name], what=name)


@pytest.fixture
def atomics() -> None:
    torch.use_deterministic_algorithms(False)


# The choice


def test_every_op_has_launchers_like_its_formula() -> None:
    for op in TRITON_OPS:
        module = importlib.import_module(f"cellops.reference.{op.removesuffix('_batch_norm')}")
        launcher = _backend.gpu_launcher("triton", op, "forward")
        assert [*inspect.signature(launcher).parameters] == [*inspect.signature(getattr(module, op)).parameters]
        assert "wanted" in inspect.signature(_backend.gpu_launcher("triton", op, "backward")).parameters


@pytest.mark.parametrize("op", TRITON_OPS)
def test_gpus_take_it_and_float64_takes_the_reference(op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        by_cuda = op == "offset_sample2d" and _backend.why_not("cuda", op, "cuda", dtype) is None
        assert _backend.preferred(op, "cuda", dtype).name == ("cuda" if by_cuda else "triton")
    choice = _backend.preferred(op, "cuda", torch.float64)
    assert choice.name == "reference"
    assert choice.reasons["triton"] == "its dtypes are float32, bfloat16, float16"
    with pytest.raises(RuntimeError, match=rf"backend='triton' cannot run {op} on cuda with float64: its dtypes are"):
        _backend.choose(op, "cuda", torch.float64, "triton")


def test_nothing_of_it_is_imported_before_it_is_chosen() -> None:
    code = (
        "import sys, torch, cellops\n"
        "cellops.eca(torch.rand(1, 3, 2, 2), torch.rand(1, 1, 3))\n"
        "print([name for name in sys.modules if name.startswith('cellops.triton')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_cpu_tensors_need_the_interpreter() -> None:
    code = "import torch, cellops; cellops.eca(torch.rand(1, 3, 2, 2), torch.rand(1, 1, 3), backend='triton')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "RuntimeError: backend='triton' cannot run eca on cpu with float32" in done.stderr
    assert "on the CPU with TRITON_INTERPRET=1" in done.stderr


@pytest.mark.parametrize(
    ("broken", "reason"), [(False, "triton is not installed"), (True, "triton cannot be imported")]
)
def test_without_triton_everything_else_works(tmp_path: Any, broken: bool, reason: str) -> None:
    finder = "raise OSError('no driver')" if broken else "raise ModuleNotFoundError(name='triton')"
    if broken:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text(finder)
    code = (
        "import sys\n"
        f"broken = {broken}\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "if not broken:\n"
        "    import importlib.util; find = importlib.util.find_spec\n"
        "    importlib.util.find_spec = lambda name, *more: None if name == 'triton' else find(name, *more)\n"
        "import torch, cellops\n"
        "from cellops import _backend\n"
        "cellops.eca(torch.rand(1, 3, 2, 2), torch.rand(1, 1, 3))\n"
        "print(_backend.preferred('eca', 'cuda', torch.float32))\n"
        "try:\n"
        "    _backend.choose('eca', 'cuda', torch.float32, 'triton')\n"
        "except ImportError as error:\n"
        "    print('raised', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Choice(name='reference'" in done.stdout, done.stdout + done.stderr
    assert f"raised backend='triton' cannot run eca on cuda with float32: {reason}" in done.stdout


# Gradients of the input


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "v1",
        "stride_uneven",
        "channels17",
        "far",
        pytest.param("crossed_groups", marks=LONG_INTERPRETED),
        pytest.param("depthwise_multiplier", marks=LONG_INTERPRETED),
    ],
)
def test_deform_conv2d_adds_up_with_atomics(atomics: None, name: str) -> None:
    case = case_of("deform_conv2d", name)
    agrees(case, case.make(device=DEVICE))
    agrees(case, case.make(device=DEVICE, memory_format=torch.channels_last))


@pytest.mark.parametrize("name", ["offset_basic", "offset_interleaved"])
def test_offset_sample2d_adds_up_with_atomics(atomics: None, name: str) -> None:
    case = case_of("offset_sample2d", name)
    agrees(case, case.make(device=DEVICE))
    agrees(case, case.make(device=DEVICE, memory_format=torch.channels_last))


@pytest.mark.parametrize("op", ["deform_conv2d", "offset_sample2d"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_mode_launches_no_atomics(op: str, deterministic: bool) -> None:
    from cellops.triton._launch import noted_launches

    torch.use_deterministic_algorithms(deterministic)
    case = cases(op, "small")[0]
    with noted_launches() as launches:
        forward_and_gradients(functools.partial(case.function, backend="triton"), case.make(device=DEVICE))
    owning = [launch for launch in launches if launch.kernel.__name__ == f"{op}_backward_input_kernel"]
    adding = [
        launch
        for launch in launches
        if launch not in owning
        and dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)).get("grad_input") is not None
    ]
    assert (len(owning), len(adding)) == ((1, 0) if deterministic else (0, 1))


# Values at the edges


@pytest.mark.parametrize("values", [(float("nan"), float("inf"), -float("inf")), (1e30, -1e30, 3e9)])
def test_no_offset_reads_outside(values: tuple[float, ...]) -> None:
    for op, name in (("deform_conv2d", "plain"), ("offset_sample2d", "offset_basic")):
        case = case_of(op, name)
        arguments = case.make(device=DEVICE)
        for place, value in enumerate(values):
            arguments["offset"].view(-1)[7 * place :: 23] = value
        agrees(case, arguments)


def test_zero_offsets_take_the_right_derivative() -> None:
    for op, name in (("deform_conv2d", "plain"), ("offset_sample2d", "offset_basic")):
        case = case_of(op, name)
        arguments = case.make(device=DEVICE)
        arguments["offset"].zero_()
        agrees(case, arguments)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("deterministic", [True, False])
def test_gradients_that_are_not_finite_stay_at_their_corners(
    deterministic: bool, memory_format: torch.memory_format
) -> None:
    """Of `offset_sample2d`: the last row and column have none beyond them, where 0 * inf would make NaN of inf."""
    torch.use_deterministic_algorithms(deterministic)
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 3, 5, 6, generator=generator).to(DEVICE, memory_format=memory_format)
    offset = (0.3 * torch.randn(2, 6, 5, 6, generator=generator)).to(DEVICE, memory_format=memory_format)
    grad_output = torch.randn(2, 3, 5, 6, generator=generator).to(DEVICE, memory_format=memory_format)
    offset[1, 0, 4], offset[1, 1, :, 5] = 9.0, 9.0
    grad_output[0, 1, 2, 3], grad_output[0, 2, 0, 0] = float("nan"), -float("inf")
    grad_output[1, 0, 4], grad_output[1, 0, 0, 5] = float("inf"), float("inf")
    found, wanted = (
        _backend.gpu_launcher("triton", "offset_sample2d", "backward")(
            grad_output, input, offset, "planar", (True, True)
        ),
        reference_offset_sample2d_backward(grad_output, input, offset),
    )
    assert wanted[0][1, 0, 4, 0] == float("inf") and wanted[0].isfinite().float().mean() > 0.7
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    finite = wanted[1].isfinite()  # the reference has inf - inf where grad * (x01 - x00) is inf
    assert torch.equal(found[1].isfinite(), finite)
    torch.testing.assert_close(found[1][finite], wanted[1][finite], rtol=1e-5, atol=1e-5)


def test_reciprocals_divide_without_a_remainder_lost() -> None:
    from cellops.triton.offset_sample2d import _reciprocal

    divisors = (*range(1, 300), 12544, 50176, 65535, 65536, 65537, 2**30 - 1, 2**30, 2**31 - 1)
    for divisor in divisors:
        multiplier, shift = _reciprocal(divisor)
        assert 2**31 <= multiplier < 2**32
        last = (2**31 - 1) // divisor * divisor
        for number in {0, 1, divisor - 1, divisor, last - 1, last, 2**31 - 1} - {-1}:
            assert ((2 * number * multiplier) >> 32) >> shift == number // divisor, (number, divisor)


@pytest.mark.parametrize(("op", "name"), [("deform_conv2d", "plain"), ("offset_sample2d", "offset_basic")])
def test_float32_offsets_beside_half_inputs(op: str, name: str) -> None:
    case = case_of(op, name)
    arguments = case.make(torch.bfloat16, DEVICE)
    arguments["offset"] = case.make(device=DEVICE)["offset"]
    found, eager = (
        forward_and_gradients(function, arguments)
        for function in (functools.partial(case.function, backend="triton"), case.reference)
    )
    wanted = forward_and_gradients(case.reference, to_dtype(arguments, torch.float64), grad_dtype=torch.bfloat16)
    assert found["offset"].dtype == torch.float32
    for key in ("output", "input"):
        assert_close_to_reference(found[key], wanted[key], terms=case.terms[key], eager=eager[key], what=key)


def test_statistics_far_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    input = (1000 + torch.randn(4, 3, 20, 20, generator=generator)).to(DEVICE)
    weight = torch.tensor([1.0]).expand(3, 1, 1, 1).contiguous().to(DEVICE)
    _, mean, variance = frelu_batch_norm(input, weight, backend="triton")
    _, wanted_mean, wanted_variance = reference_frelu_batch_norm(input.double(), weight.double(), None, None, 1e-5)
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), wanted_variance, rtol=1e-4, atol=0)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_at_kinks_and_far_out(activation: str) -> None:
    """Values and slopes are the reference's, NaN, -inf and both kinks of relu6 and hardswish among them."""
    finite = [-1e30, -100.0, -10.0, -3.0, -1e-3, 0.0, 0.5, 3.0, 6.0, 90.0, 1e30]
    points = torch.tensor([-torch.inf, *finite, torch.nan]).reshape(1, 1, 1, -1)
    # The reference on the CPU: on a GPU PyTorch's own convolutions of float32 are TF32's.
    found, wanted = (
        forward_and_gradients(
            functools.partial(depthwise_conv2d, activation=activation, backend=backend),
            {"input": points.to(device), "weight": torch.ones(1, 1, 1, 1, device=device)},
        )
        for backend, device in (("triton", DEVICE), ("reference", "cpu"))
    )
    for name in ("output", "input"):
        torch.testing.assert_close(found[name].cpu(), wanted[name], rtol=1e-5, atol=1e-6, equal_nan=True)


# Configurations


@interpreted
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("deform_conv2d", "plain"),
        ("deform_conv2d", "depthwise"),
        ("offset_sample2d", "offset_interleaved"),
        ("frelu", "frelu_basic"),
        ("depthwise_conv2d_batch_norm", "depthwise_bn_silu"),
        ("eca", "eca_basic"),
        ("group_conv1x1", "group_conv1x1_basic"),
        ("spatial_attention", "spatial_pool3"),
    ],
)
def test_64_bit_offsets_give_the_same(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of tensors with 2^31 elements, here on small ones."""
    from cellops.triton import _launch

    case = case_of(op, name)
    call = functools.partial(forward_and_gradients, functools.partial(case.function, backend="triton"))
    narrow = call(case.make())
    launch, flags = _launch.launch, []

    def wide(*arguments: Any, **constants: Any) -> None:
        flags.append("WIDE" in constants)
        launch(*arguments, **{**constants, **({"WIDE": True} if "WIDE" in constants else {})})

    for module in [module for key, module in sys.modules.items() if key.startswith("cellops.triton.")]:
        if getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", wide)
    for key, tensor in call(case.make()).items():
        assert torch.equal(tensor, narrow[key]), key
    assert any(flags)


@pytest.mark.parametrize("op", [op for op in TRITON_OPS if op not in ("squeeze_excite", "eca")])
def test_64_bit_offsets_where_sizes_need_them(op: str) -> None:
    from cellops.triton._launch import noted_launches

    case = next(case for case in cases(op, "real"))
    drawn = case.make(device="meta")
    for scale, expected in ((1, False), (2**31 // drawn["input"].numel() + 1, True)):
        arguments = {
            name: value.new_empty(scale * value.shape[0], *value.shape[1:])
            if name in ("input", "offset", "mask") and isinstance(value, Tensor)
            else value
            for name, value in drawn.items()
        }
        with noted_launches() as launches:
            _backend.gpu_launcher("triton", op, "forward")(**in_format(arguments, torch.channels_last))
        flags = [launch.constants["WIDE"] for launch in launches if "WIDE" in launch.constants]
        assert flags and (any(flags) == expected)


def test_blocks_of_deform_conv2d() -> None:
    from cellops.triton._launch import Limits
    from cellops.triton.deform_conv2d import forward_blocks

    h200, rtx = Limits(*LIMITS["sm_90"]), Limits(*LIMITS["sm_120"])
    assert forward_blocks(64, 64, 2, h200)[:3] == (64, 64, 64), "few sums: more channels at a time"
    assert forward_blocks(256, 256, 2, h200)[:3] == (64, 256, 32), "every input channel is sampled once"
    assert forward_blocks(256, 256, 2, rtx)[:3] == (128, 128, 32), "fewer output channels, or they spill"
    assert forward_blocks(64, 16, 2, h200)[:3] == (128, 64, 16), "fewer pixels spill on a B200"
    assert forward_blocks(3, 3, 4, h200)[:3] == (64, 16, 16), "tl.dot takes no less than 16"


@interpreted
def test_images_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellops.triton import deform_conv2d, offset_sample2d

    for op, name in {"deform_conv2d": "plain", "offset_sample2d": "offset_basic"}.items():
        case = case_of(op, name)
        call = functools.partial(forward_and_gradients, functools.partial(case.function, backend="triton"))
        whole = call(case.make())
        with monkeypatch.context() as patch:
            patch.setattr(deform_conv2d, "SCRATCH_BYTES", 1)
            for module in (deform_conv2d, offset_sample2d):
                patch.setattr(module, "image_slices", lambda batch, *_: [slice(i, i + 1) for i in range(batch)])
            for key, tensor in call(case.make()).items():
                torch.testing.assert_close(tensor, whole[key], rtol=1e-6, atol=1e-6, msg=key)


def test_float32_is_multiplied_as_torch_was_told() -> None:
    """Whichever way the user tells it: torch's older flag cannot be read once its newer setting was set."""
    told = ("", "m.allow_tf32 = True", "m.fp32_precision = 'tf32'", "torch.backends.fp32_precision = 'tf32'")
    told += ("torch.set_float32_matmul_precision('high')",)
    for line in told:
        text = f"import torch\nm = torch.backends.cuda.matmul\n{line}\nfrom cellops.triton._launch import dot_precision"
        done = subprocess.run([sys.executable, "-c", f"{text}\nprint(dot_precision())"], capture_output=True, text=True)
        assert done.stdout.strip() == ("tf32" if line else "tf32x3"), f"{line}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("op", TRITON_OPS)
def test_no_kernel_multiplies_float32_in_tf32_unasked(op: str, dtype: torch.dtype) -> None:
    """Ten bits lose what batch statistics leave of a gradient, of half types too; the interpreter cannot see it."""
    from cellops.testing._compile_kernels import call_launchers
    from cellops.triton._launch import noted_launches

    with noted_launches() as launches:
        call_launchers(op, cases(op, "small")[0].make(dtype, "meta"), deterministic=False)
    assert launches and not [one.kernel.__name__ for one in launches if "tf32" in one.constants.values()]


@pytest.mark.parametrize("own_sizes", [True, False])
@pytest.mark.parametrize("last", [1000, 3])
def test_statistics_of_many_parts(own_sizes: bool, last: int) -> None:
    """More parts than a tile has, of more pixels than float32 counts one by one, the last one small."""
    from cellops.triton._statistics import batch_gradients, batch_scale, batch_statistics

    generator = torch.Generator().manual_seed(0)
    parts, part_pixels = 300, 123_457
    means, squares, gamma = (torch.randn(*shape, generator=generator) for shape in ((parts, 11), (parts, 11), (11,)))
    means, squares = means + 5, squares.abs() * part_pixels
    means[-1], sizes = 1e4, torch.full((parts,), float(part_pixels))
    sizes[-1] = last
    total = part_pixels * (parts - 1) + last
    given = [tensor.to(DEVICE) for tensor in (means, squares, sizes, gamma)]
    mean, variance, scale = batch_statistics(
        *given[:2], given[2] if own_sizes else None, part_pixels, total, given[3], 1e-3
    )
    share = sizes.double().unsqueeze(1) / total
    wanted = (means * share).sum(0)
    spread = squares.double().sum(0) / total + ((means - wanted).square() * share).sum(0)
    factor = gamma / (spread + 1e-3).sqrt()
    for found, exact in ((mean, wanted), (variance, spread), (scale, factor)):
        torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(batch_scale(variance, given[3], 1e-3), scale, rtol=1e-6, atol=0)

    found = batch_gradients(given[0], given[1], variance, given[3], 1e-3, total)
    to_gamma, to_beta = squares.double().sum(0) / (spread + 1e-3).sqrt(), means.double().sum(0)
    of_apart = to_gamma / (spread + 1e-3).sqrt() * factor / total
    for one, exact in zip(found, (to_gamma, to_beta, to_beta * factor / total, of_apart), strict=True):
        torch.testing.assert_close(one.cpu().double(), exact, rtol=1e-5, atol=0)
