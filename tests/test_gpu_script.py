"""benchmarks/gpu.py where there is no GPU: its steps on tiny shapes, how it goes on, what it says of the targets."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import INTERPRETER_ERROR

pytest.importorskip("timm", reason="timm is not installed")

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
HEAD = {"machine": {"name": "a", "cpu": "x"}, "versions": {"torch": "2"}, "commit": {"hash": "c", "dirty": False}}


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def gpu(*arguments: str, output: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments, "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = gpu("ops", output=tmp_path / "results")
    assert done.returncode == 2
    assert "there is no GPU here" in done.stderr and "--device cpu --small" in done.stderr
    assert not (tmp_path / "results").exists()


def test_full_sizes_are_for_a_gpu(tmp_path: Path) -> None:
    done = gpu("ops", "--device", "cpu", output=tmp_path)
    assert done.returncode == 2 and "--device cpu is for --small" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETER_ERROR is not None, reason=str(INTERPRETER_ERROR))
def test_every_step_on_tiny_shapes_and_a_second_call_that_goes_on(tmp_path: Path) -> None:
    """144 s on two busy cores, most of it Triton's interpreter and starting processes."""
    words = ("--device", "cpu", "--small", "--minutes", "30", "--jobs", "1")
    done = gpu("all", *words, output=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-small.json")
    results = json.loads(path.read_text())
    kinds = {record["kind"] for record in results["records"]}
    assert kinds == {"suite", "sanitizer", "gpu", "gpu_overhead", "kernels", "tuning", "benchmarks", "experiment"}
    assert results["machine"]["cpu"] and results["versions"]["torch"] and results["commit"]["hash"]
    (row,) = (one for one in results["records"] if one["key"].startswith("ops deform_conv2d plain float32"))
    assert {"eager", "compiled", "torchvision", "dense", "copy"} <= set(row["variants"])
    assert {"cellops cpu", "cellops triton"} <= set(row["percent_of_copy"])
    again = gpu("all", *words, output=tmp_path)
    assert again.returncode == 0
    assert json.loads(path.read_text())["records"] == results["records"], "nothing was left to be measured"


def progress() -> Any:
    return importlib.import_module("on_gpu.progress")


def test_rows_are_kept_as_they_come_and_not_measured_again(tmp_path: Path) -> None:
    module, measured = progress(), []

    def row(key: str, seconds: float = 0.0) -> Any:
        return module.Row(key, seconds, lambda left: measured.append(key) or {"kind": "x"})

    def call(*rows: Any) -> Any:
        results, step = module.Results(tmp_path / "r.json", HEAD), module.Step("s", list(rows))
        module.run(step, results, module.Budget(100.0), lambda line: None)
        return step.left

    assert call(row("a"), row("long", 1000.0)) == ["long"]
    assert call(row("a"), row("b")) == []
    assert measured == ["a", "b"]
    kept = json.loads((tmp_path / "r.json").read_text())
    assert [record["key"] for record in kept["records"]] == ["a", "b"]
    assert {record["commit"] for record in kept["records"]} == {"c"}
    results = module.Results(tmp_path / "r.json", HEAD)
    assert results.forget("b") == 1 and "b" not in results and "a" in results


def test_a_row_that_fails_costs_no_other(tmp_path: Path) -> None:
    module = progress()

    def fail(left: float) -> Any:
        raise ValueError("no such thing")

    def late(left: float) -> Any:
        raise module.OutOfTime

    rows = [module.Row("bad", 0, fail), module.Row("late", 0, late), module.Row("good", 0, lambda left: {"kind": "x"})]
    for parallel in (1, 3):
        results, step = module.Results(tmp_path / f"{parallel}.json", HEAD), module.Step("s", rows, parallel)
        module.run(step, results, module.Budget(100.0), lambda line: None)
        assert step.left == ["late"] and "late" not in results and "good" in results
        assert [record["failed"] for record in module.failures(results.records)] == ["ValueError: no such thing"]


def test_an_error_that_takes_the_gpu_ends_the_process_and_is_kept(tmp_path: Path) -> None:
    module = progress()

    def crash(left: float) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    results = module.Results(tmp_path / "r.json", HEAD)
    step = module.Step("s", [module.Row("bad", 0, crash), module.Row("next", 0, lambda left: {"kind": "x"})])
    with pytest.raises(module.DeadDevice, match="bad"):
        module.run(step, results, module.Budget(100.0), lambda line: None)
    assert "bad" in results and "next" not in results


def test_a_wrong_variant_costs_no_other() -> None:
    ops = importlib.import_module("on_gpu.ops")
    one = (torch.ones(3),)

    def missing() -> Any:
        raise ImportError

    def crash() -> Any:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    makers = {
        "cellops a": lambda: lambda: one,
        "cellops b": lambda: lambda: (torch.full((3,), 1.5),),
        "half the size": lambda: lambda: (torch.ones(2),),
        "missing": missing,
        "measure of speed": lambda: lambda: (torch.zeros(7),),
        "same": lambda: lambda: (torch.ones(3),),
    }
    calls, skipped, ours = ops.tried(makers, set(makers) - {"measure of speed"}, None, torch.float32)
    assert set(calls) == set(makers) - {"missing"}, "a wrong answer is timed"
    assert set(skipped) == {"cellops b", "half the size", "missing"}
    assert "differs" in skipped["cellops b"] and skipped["missing"] == "ImportError"
    assert ours is one
    assert ops.own_failures(skipped)["failed"].startswith("cellops b: AssertionError: ")
    assert ops.own_failures({"eager": "differs"}) == {}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ops.tried({"a": lambda: crash}, set(), one, torch.float32)


def test_the_clock_goes_on_where_one_variant_raises() -> None:
    clock = importlib.import_module("on_gpu.clock")

    def fail() -> None:
        raise MemoryError

    timings, failed = clock.compare({"bad": fail, "good": lambda: None}, torch.device("cpu"), 2)
    assert failed == {"bad": "MemoryError"}
    assert set(timings) == {"good"} and timings["good"]["rounds"] == 2


def test_launches_of_a_kernel_are_told_together() -> None:
    kernels = importlib.import_module("on_gpu.kernels")
    found = kernels.by_kernel([("a", 2.0), ("b" * 3000, 5.0), ("a", 4.0)])
    assert list(found) == ["a", "b" * kernels.MOST_LETTERS], "the slowest first"
    assert found["a"] == {"seconds": pytest.approx(6e-6), "launches": 2}


def test_what_cannot_run_here_is_tried_again(tmp_path: Path) -> None:
    module, there = progress(), []

    def measure(left: float) -> Any:
        if not there:
            raise module.Skipped("no data")
        return {"kind": "x"}

    for _ in range(2):
        results, step = module.Results(tmp_path / "r.json", HEAD), module.Step("s", [module.Row("a", 0, measure)])
        module.run(step, results, module.Budget(100.0), lambda line: None)
        if not there:
            assert step.left == [] and "a" not in results and results.data["skipped"] == {"a": "no data"}
            there.append("data")
    assert "a" in results and results.data["skipped"] == {}


def test_a_row_longer_than_a_call_holds_nothing_up(tmp_path: Path) -> None:
    module = progress()
    measured: list[tuple[str, int]] = []

    def late(left: float) -> Any:
        measured.append(("late", round(left)))
        raise module.OutOfTime

    def call(seconds: float, **more: bool) -> list[str]:
        rows = [module.Row("late", 0, late, **more), module.Row("good", 0, lambda left: {"kind": "x"})]
        results, step = module.Results(tmp_path / "r.json", HEAD), module.Step("s", rows)
        module.run(step, results, module.Budget(seconds), lambda line: None)
        assert "good" in results and step.left == ["late"]
        return list(results.data["stopped"])

    assert call(50.0) == ["late"]
    call(51.0)
    call(100.0)
    call(100.0)
    assert measured == [("late", 50), ("late", 100)], "once more with more time, then passed over"
    assert call(200.0, resumes=True) == []
    call(100.0, resumes=True)
    assert measured[2:] == [("late", 200), ("late", 100)], "what goes on is always gone on with"


def test_an_older_library_is_measured_where_it_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, build, module = importlib.import_module("gpu"), importlib.import_module("on_gpu.build"), progress()
    monkeypatch.setattr(build, "up_to_date", lambda: False)
    monkeypatch.setattr(build, "_version", lambda: "0")
    monkeypatch.setattr(build.shutil, "which", lambda name: sys.executable)  # fails at its first argument
    monkeypatch.setattr(build, "loadable", lambda: True)
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    assert script._compile(module.Budget(60.0))
    errors = capsys.readouterr().err
    assert "failed:" in errors and "warning: the library that is there, older than csrc/" in errors
    monkeypatch.setattr(build, "loadable", lambda: False)
    assert not script._compile(module.Budget(60.0))

    def late(command: Any, seconds: float) -> Any:
        raise module.OutOfTime

    monkeypatch.setattr(build.process, "run", late)
    assert not script._compile(module.Budget(1.0))
    assert "was not finished in this call's time" in capsys.readouterr().err


def test_which_errors_take_the_gpu() -> None:
    is_fatal = progress().is_fatal
    assert is_fatal(RuntimeError("CUDA error: unspecified launch failure"))
    assert not is_fatal(RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling x"))
    assert not is_fatal(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))


def test_a_row_that_was_cut_off_is_not_tried_again(tmp_path: Path) -> None:
    module = progress()
    module.Results(tmp_path / "r.json", HEAD).begin("hangs")
    results = module.Results(tmp_path / "r.json", HEAD)
    (record,) = results.records
    assert record["key"] == "hangs" and "cut off" in record["failed"]


def test_results_of_another_machine_are_refused(tmp_path: Path) -> None:
    module = progress()
    module.Results(tmp_path / "r.json", HEAD)
    with pytest.raises(ValueError, match="measured elsewhere"):
        module.Results(tmp_path / "r.json", {**HEAD, "machine": {"name": "b", "cpu": "x"}})


def record(direction: str, **changes: Any) -> dict[str, Any]:
    """A row of an H200 in which the op takes 1 ms by default."""
    times = {"cellops triton": 1e-3, "cellops cuda": 2e-3, "dense": 5e-4, "torchvision": 6e-3, "compiled": 3e-3}
    row = {
        "key": f"ops {direction}",
        "kind": "gpu",
        "op": "deform_conv2d",
        "case": "1x64x56x56",
        "shape": [1024, 64, 56, 56],
        "sweep": False,
        "dtype": "bfloat16",
        "layout": "channels_last",
        "direction": direction,
        "default": "triton",
        "variants": {name: {"median": taken, "min": taken, "rounds": 9} for name, taken in times.items()},
        "skipped": {},
        "percent_of_copy": {"cellops triton": 50.0, "cellops cuda": 25.0},
        "percent_of_dense": {"cellops triton": 50.0, "cellops cuda": 25.0},
        "teraflops_per_second": {"cellops triton": 200.0, "cellops cuda": 100.0},
        "gigabytes_per_second": {"cellops triton": 1000.0, "cellops cuda": 500.0, "copy": 4000.0},
        "peak_bytes": {"cellops triton": 150, "cellops cuda": 150},
        "output_bytes": 100,
        "im2col_bytes": 1000,
    }
    return {**row, **changes}


def all_records(**changes: Any) -> list[dict[str, Any]]:
    """A row for every point of a whole run."""
    points = importlib.import_module("on_gpu.shapes").points()
    names = ("key", "op", "dtype", "layout", "sweep")
    return [record(one.direction, **{name: getattr(one, name) for name in names}, **changes) for one in points]


def judged(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[str | None, bool | None]]:
    judge_all = importlib.import_module("on_gpu.targets").judge_all
    return {(row["op"], row["target"]): (row["value"], row["reached"]) for row in judge_all(rows)}


def test_targets_are_judged_by_the_default_backend() -> None:
    found = judged(all_records())
    assert found["deform_conv2d", "forward: time over cuDNN's dense conv"] == ("2.00x", True)
    assert found["deform_conv2d", "forward: extra memory, of the im2col buffer"] == ("5.00 %", True)
    assert found["deform_conv2d", "forward, float16: speed over torchvision"] == ("6.00x", True)
    assert found["frelu", "evaluation: of the copy bandwidth"] == ("50.0 %", False)
    assert found["frelu", "training: speed over torch.compile"] == ("3.00x", True)
    assert found["offset_sample2d", "forward: speed over grid_sample"] == (None, None), "no row has that peer"


def test_targets_need_every_row_and_a_right_answer() -> None:
    rows = all_records()
    of_target = [
        row
        for row in rows
        if (row["op"], row["dtype"], row["layout"], row["direction"], row["sweep"])
        == ("deform_conv2d", "bfloat16", "channels_last", "forward", False)
    ]
    assert len(of_target) > 1
    target = "deform_conv2d", "forward: time over cuDNN's dense conv"
    assert judged([row for row in rows if row is not of_target[0]])[target] == (None, None)
    assert judged([row for row in rows if row not in of_target[1:]])[target] == (None, None)
    of_target[0]["skipped"] = {"cellops cuda": "differs", "torchvision": "differs"}
    assert judged(rows)[target] == ("2.00x", True)
    of_target[0]["skipped"] = {"cellops triton": "differs"}
    assert judged(rows)[target] == (None, None)
    of_target[0] |= {"skipped": {}, "default": "not timed"}
    assert judged(rows)[target] == (None, None)


def test_table_of_a_gpu(tmp_path: Path) -> None:
    table = importlib.import_module("table")
    judge_all = importlib.import_module("on_gpu.targets").judge_all
    rows = [record("forward"), record("forward+backward"), {"key": "suite x", "kind": "suite", "summary": "9 passed"}]
    machine = {"name": "nvidia-h200", "gpu": "NVIDIA H200", "cpu": "some", "cores": 16, "instruction_set": "avx512"}
    versions = {"torch": "2.11", "torchvision": "0.26", "onnxruntime": "-", "openvino": "-", "cuda": "13.0"}
    results = {**HEAD, "machine": machine, "versions": versions, "date": "2026-11-21 10:00 UTC", "threads": 16}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({**results, "records": rows, "targets": judge_all(rows)}))
    machines = table.machines(tmp_path)
    text = table.details(machines)
    assert "**NVIDIA H200**" in text
    assert "| deform_conv2d forward: time over cuDNN's dense conv |" in table.summary(machines)
    assert "| `deform_conv2d` | 1024x64x56x56 | forward | triton | 1.000 | 2.000 |" in text


def test_bounds_page_comes_from_the_formulas() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, str(BENCHMARKS / "bounds.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_work_of_calls() -> None:
    """Bytes and products of two calls, counted by hand."""
    pytest.importorskip("triton", reason="triton is not installed")
    from cellops.testing import cases

    work = importlib.import_module("on_gpu.work")
    (frelu,) = cases("frelu", "bench")
    arguments = frelu.make(torch.bfloat16, "meta", torch.channels_last)
    done = work.of_triton(frelu, arguments, "forward", 1)
    image = 2 * 16 * 128 * 56 * 56
    assert done.floor_bytes == 2 * image + 2 * 128 * (9 + 2) == done.moved_bytes
    (case,) = (case for case in cases("deform_conv2d", "bench") if case.name == "8x128x28x28")
    done = work.of_triton(case, case.make(torch.bfloat16, "meta", torch.channels_last), "forward", 1)
    (kernel,) = done.kernels
    pixels = 8 * 28 * 28
    assert kernel.products == 2 * pixels * 128 * 128 * 9
    assert kernel.gathered_bytes == 4 * 2 * pixels * 128 * 9
    assert done.bound[0] >= done.floor_bytes / work.COPY_BYTES


def test_a_process_that_is_out_of_time_says_what_it_knows(request: pytest.FixtureRequest) -> None:
    """Ctrl-C first: pytest then names the tests that failed; what pays no heed to it is ended."""
    process, module = importlib.import_module("on_gpu.process"), progress()
    before = signal.getsignal(signal.SIGINT)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    process.heed_interrupts()
    slow = (
        "import time\nprint('one failed')\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('a summary')"
    )
    with pytest.raises(module.OutOfTime, match="one failed\na summary"):
        process.run([sys.executable, "-c", f"import time\n{slow}"], 16.0)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)"
    with pytest.raises(module.OutOfTime, match="deaf"):
        process.run([sys.executable, "-c", deaf], 3.0)


def test_what_an_unfinished_row_wrote_is_kept_until_it_is_done(tmp_path: Path) -> None:
    module = progress()
    results = module.Results(tmp_path / "r.json", HEAD)

    def unfinished(left: float) -> Any:
        raise module.OutOfTime("F test_one\n")

    module.run(module.Step("s", [module.Row("row", 0.0, unfinished)]), results, module.Budget(60), print)
    assert json.loads((tmp_path / "r.json").read_text())["wrote"] == {"row": "F test_one\n"}
    again = module.Results(tmp_path / "r.json", HEAD)
    done = module.Step("s", [module.Row("row", 0.0, lambda left: {"summary": "done"})])
    module.run(done, again, module.Budget(600), print)
    assert json.loads((tmp_path / "r.json").read_text())["wrote"] == {}
