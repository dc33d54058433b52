"""Ops under threads, forks, large tensors and small memory; bit-identical from run to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import cellops
from cellops import _native
from cellops.models import doctor
from cellops.ops import _deform_conv2d_launch as launch
from cellops.testing import Arguments, Case, assert_close_to_reference, cases, forward_and_gradients, to_dtype

needs_library = pytest.mark.skipif(_native.error is not None, reason=str(_native.error))


def case_named(name: str) -> Case:
    (case,) = (case for case in cases("deform_conv2d") if case.name == name)
    return case


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["plain", "batch33", "map63", "groups8", "depthwise64", "row", "empty"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_threads_agree_and_repeat_themselves(name: str, threads: int, layout: torch.memory_format) -> None:
    case = case_named(name)
    arguments = case.make(memory_format=layout)
    wanted = forward_and_gradients(case.reference, to_dtype(arguments, torch.float64))
    torch.set_num_threads(threads)
    first = forward_and_gradients(case.function, arguments)
    for _ in range(3):
        again = forward_and_gradients(case.function, arguments)
        assert all(torch.equal(first[key], again[key]) for key in first), "not bit-identical from run to run"
    for key, tensor in first.items():
        assert_close_to_reference(tensor, wanted[key], terms=case.terms[key], what=key)


@needs_library
def test_processes_agree_to_the_bit() -> None:
    script = (
        "import hashlib, torch; from cellops.testing import cases, forward_and_gradients; torch.set_num_threads(2); "
        "case, = (case for case in cases('deform_conv2d') if case.name == 'channels48'); "
        "found = forward_and_gradients(case.function, case.make()); "
        "print(hashlib.sha256(b''.join(found[key].numpy().tobytes() for key in sorted(found))).hexdigest())"
    )
    first, second = (run_python(script) for _ in range(2))
    assert first == second


def run_python(script: str, **environment: str) -> str:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment}).stdout


def test_doctor_says_which_cores_and_runtimes_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3}, raising=False)
    assert doctor.cores() == "8 cores, 2 of them for this process"
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f10 r--p 0 fe:0 1   /opt/my env/torch/lib/libgomp.so.1\n"
        "7f10-7f20 r-xp 0 fe:0 1   /opt/my env/torch/lib/libgomp.so.1\n"
    )
    assert doctor.openmp(maps) == "/opt/my env/torch/lib/libgomp.so.1"
    with maps.open("a") as file:
        file.write("7f30-7f40 r--p 0 fe:0 2   /usr/lib/llvm-14/lib/libomp.so.5\n")
    assert doctor.openmp(maps).endswith(" and /usr/lib/llvm-14/lib/libomp.so.5, whose threads spin against each other")


def test_python_threads() -> None:
    """Four at once, each with its own thread count and its own tensors."""
    case = case_named("channels48")
    calls = [case.make(seed=seed) for seed in range(4)]
    wanted = [forward_and_gradients(case.reference, to_dtype(arguments, torch.float64)) for arguments in calls]
    found: dict[int, dict[str, Tensor]] = {}

    def work(index: int) -> None:
        torch.set_num_threads(1 + index % 3)
        for _ in range(5):
            found[index] = forward_and_gradients(case.function, calls[index])

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, tensors in enumerate(wanted):
        for key, tensor in tensors.items():
            assert_close_to_reference(found[index][key], tensor, terms=case.terms[key], what=key)


class Convolved(Dataset):
    """Convolves in the worker that loads."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return cellops.deform_conv2d(**self.case.make(seed=index))


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_forked_data_loader_workers() -> None:
    data = Convolved(case_named("channels48"))
    torch.set_num_threads(2)
    wanted = [data[index] for index in range(len(data))]  # the parent's pool of threads exists before the fork
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for found, tensor in zip(loader, wanted, strict=True):
        torch.testing.assert_close(found, tensor)


# More than 2^31 elements


def large_call(batch: int, channels: int, size: int, stride: int, dtype: torch.dtype) -> Arguments:
    """Zeros but for the last image: a call whose only large tensor is the input."""
    generator = torch.Generator().manual_seed(0)
    input = torch.zeros(batch, channels, size, size, dtype=dtype)
    input[-1] = torch.randn(channels, size, size, generator=generator).to(dtype)
    out = (size - 1) // stride + 1
    offset = torch.rand(batch, 2, out, out, generator=generator).to(dtype)
    weight = torch.randn(2, channels, 1, 1, generator=generator).to(dtype)
    return {"input": input, "offset": offset, "weight": weight, "stride": (stride, stride)}


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_input_of_more_than_2_31_elements(layout: torch.memory_format) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    arguments = large_call(8200, 64, 64, 16, torch.bfloat16)
    if layout == torch.channels_last:
        arguments["input"] = arguments["input"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert arguments["input"].numel() > 2**31
    last = {**arguments, "input": arguments["input"][-1:].clone(), "offset": arguments["offset"][-1:].clone()}
    wanted = forward_and_gradients(cellops.deform_conv2d, last, torch.ones(()))
    found = forward_and_gradients(cellops.deform_conv2d, arguments, torch.ones(()))
    assert torch.equal(found["output"][-1:], wanted["output"])
    assert torch.equal(found["input"][-1:], wanted["input"])
    assert torch.equal(found["offset"][-1:], wanted["offset"])
    torch.testing.assert_close(found["weight"], wanted["weight"])
    assert found["output"][:-1].count_nonzero() == 0
    assert found["input"][4096].count_nonzero() > 0


@needs_library
@pytest.mark.slow
def test_output_and_offset_of_more_than_2_31_elements() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    batch, size = 263, 2048
    image = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    offset = torch.zeros(batch, 2, size, size, dtype=torch.bfloat16)
    offset[-1] = 0.5
    weight = torch.ones(2, 1, 1, 1, dtype=torch.bfloat16)
    assert offset.numel() > 2**31
    output = cellops.deform_conv2d(image.expand(batch, -1, -1, -1), offset, weight, backend="cpu")
    assert output.numel() > 2**31
    assert torch.equal(output[-2, 1], image[0, 0])
    assert torch.equal(output[-1:], cellops.deform_conv2d(image, offset[-1:], weight, backend="cpu"))


def test_images_beyond_the_kernel_take_the_reference() -> None:
    def plan(backend: str | None) -> launch._Plan:
        image, pixel = (1, 1, 2**16, 2**15), (1, 1, 1, 1)
        shapes = (image, (1, 2, 1, 1), pixel, None, None)
        dtypes = (torch.float32, torch.float32, torch.float32, None, None)
        return launch._plan("cpu", (False,) * 4, (2**16, 2**16, 0, 0, 1, 1, backend), *shapes, *dtypes)

    assert plan(None).params is None
    with pytest.raises((RuntimeError, ImportError), match=r"2\^31 pixels|compiled library"):
        plan("cpu")


def test_outputs_beyond_2_31_pixels_are_the_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library numbers an output's pixels in 64 bits, Triton in 32: its kernels read and wrote elsewhere."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def plan(
        backend: str | None, image: tuple[int, int], pad: tuple[int, int] = (0, 0), weight: launch.Shape = (1, 1, 1, 1)
    ) -> str:
        out = [size + 2 * zeros - taps + 1 for size, zeros, taps in zip(image, pad, weight[2:], strict=True)]
        offset = (1, 2 * weight[2] * weight[3], *out)
        dtypes = (torch.float32, torch.float32, torch.float32, None, None)
        shapes = ((1, weight[1], *image), offset, weight, None, None)
        return launch._plan("cpu", (False,) * 4, (1, 1, *pad, 1, 1, backend), *shapes, *dtypes).backend

    large = ((1, 1), (2**15, 2**15))
    if _native.error is None:
        assert plan(None, *large) == plan("cpu", *large) == "cpu"
    for call in (large, ((1, 2**31 - 64),)):
        with pytest.raises(RuntimeError, match=r"an image or its output has about 2\^31 pixels or more"):
            plan("triton", *call)
    assert plan("triton", (1, 2**31 - 128)) == "triton"
    with pytest.raises(RuntimeError, match=r"the weight has 2\^31 elements or more"):
        plan("triton", (1, 1), weight=(2**16, 2**15, 1, 1))
    for backend in ("triton", "cpu"):
        with pytest.raises((RuntimeError, ImportError), match=r"a padded image has 2\^31 rows|compiled library"):
            plan(backend, (1, 1), (2**30, 0), (1, 1, 2**31 + 1, 1))


@needs_library
def test_an_image_beyond_the_kernel_is_refused_before_it_is_copied() -> None:
    image = torch.zeros(1).expand(1, 1, 2**20, 2**20)  # 4 TiB as a copy
    with pytest.raises(RuntimeError, match=r"an image has 2\^31 pixels or more"):
        stride = (2**20, 2**20)
        cellops.deform_conv2d(image, torch.zeros(1, 2, 1, 1), torch.ones(1, 1, 1, 1), stride=stride, backend="cpu")


# Memory

PEAK = """
import json, re, torch
from cellops.testing import cases, forward_and_gradients

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def extra(call):
    "Bytes at the peak beyond those before and those of what the call returns."
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    results = call()
    return resident("VmHWM") - before - sum(tensor.nbytes for tensor in results)

torch.set_num_threads(2)
layout = getattr(torch, LAYOUT)
case, = cases("deform_conv2d", "memory")
arguments = case.make(memory_format=layout)
one_image = {**arguments, **{name: arguments[name][:1] for name in ("input", "offset", "mask")}}
forward_and_gradients(case.function, one_image)  # what PyTorch loads at the first backward is not the op's
forward = extra(lambda: [case.function(**arguments)])
leaves = [value.requires_grad_() for value in arguments.values() if isinstance(value, torch.Tensor)]
output = case.function(**arguments)
grad_output = torch.ones_like(output)
backward = extra(lambda: torch.autograd.grad(output, leaves, grad_output))
buffer = extra(lambda: torch.ones(BUFFER, dtype=torch.uint8).numel() and [])
print(json.dumps({"forward": forward, "backward": backward, "buffer": buffer}))
"""


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_extra_memory_is_a_small_part_of_the_im2col_buffer(layout: str) -> None:
    (case,) = cases("deform_conv2d", "memory")
    sizes = case.sizes
    pixels = sizes["batch"] * sizes["out_height"] * sizes["out_width"]
    buffer = pixels * sizes["in_channels"] * 9 * 4
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # what is freed leaves the process
    found = json.loads(run_python(f"LAYOUT, BUFFER = {layout!r}, {buffer}\n{PEAK}", **malloc))
    assert found["buffer"] > 0.95 * buffer, "what is freed before the end is seen"
    for direction in ("forward", "backward"):  # a little below 0 where a small result lies in pages that were there
        assert found[direction] <= 0.05 * buffer, found
