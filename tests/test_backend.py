"""The choice of a backend: what `backend=None` takes, and that an explicit one runs or says why not."""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch

import cellops
from cellops import _backend, _native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def fresh_choices():
    _backend.choose.cache_clear()
    _backend._warn_library_missing.cache_clear()
    yield
    _backend.choose.cache_clear()
    _backend._warn_library_missing.cache_clear()


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "error", ImportError("the library was taken away"))


@pytest.fixture
def every_kernel(monkeypatch):
    monkeypatch.setitem(_backend.OPS, "some_op", ("cpu", "triton", "cuda"))
    monkeypatch.setattr(_backend, "_why_no_triton", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("op", _backend.OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_tensors_take_the_native_kernel(op, dtype):
    choice = _backend.choose(op, "cpu", dtype)
    assert choice.name == "cpu"
    assert set(choice.reasons) == set(_backend.BACKENDS) - {"cpu"}


@pytest.mark.parametrize("device_type", ["mps", "xpu"])
def test_devices_without_a_kernel_take_the_reference(every_kernel, device_type):
    choice = _backend.choose("some_op", device_type, torch.float32)
    assert choice.name == "reference"
    assert all(choice.reasons[name] for name in ("cpu", "cuda", "triton"))


def test_gpu_takes_the_first_kernel_that_runs(every_kernel, monkeypatch):
    assert _backend.choose("some_op", "cuda", torch.float16).name == "triton"
    assert _backend.choose("some_op", "cuda", torch.float64).name == "reference"
    monkeypatch.setitem(_backend.OPS, "other_op", ("cpu", "cuda"))
    choice = _backend.choose("other_op", "cuda", torch.float32)
    if _native.library().build_info()["cuda"].startswith("off"):
        assert choice.name == "reference"
        assert "without CUDA" in choice.reasons["cuda"]


def test_triton_on_cpu_tensors_needs_the_interpreter(every_kernel, monkeypatch):
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        _backend.choose("some_op", "cpu", torch.float32, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _backend.choose("some_op", "cpu", torch.float32, "triton").name == "triton"
    assert _backend.choose("some_op", "cpu", torch.float32).name == "cpu"


def test_triton_not_installed(monkeypatch):
    monkeypatch.setitem(_backend.OPS, "some_op", ("cpu", "triton", "cuda"))
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"backend='triton' cannot run some_op.*triton is not installed"):
        _backend.choose("some_op", "cuda", torch.float32, "triton")
    assert _backend.choose("some_op", "cuda", torch.float32).reasons["triton"] == "triton is not installed"


@pytest.mark.parametrize("name", ["CPU", "torch", ""])
def test_unknown_name_lists_the_names(name):
    with pytest.raises(ValueError, match=r"backend must be one of 'cpu', 'cuda', 'triton', 'reference' or None, got"):
        _backend.choose("deform_conv2d", "cpu", torch.float32, name)


def test_explicit_backend_never_falls_back():
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run deform_conv2d on cuda with float32: "):
        _backend.choose("deform_conv2d", "cuda", torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=r"its dtypes are float32, float64, bfloat16, float16"):
        _backend.choose("deform_conv2d", "cpu", torch.int32, "cpu")
    assert _backend.choose("deform_conv2d", "cpu", torch.float32, "reference").name == "reference"


def test_refused_tensors():
    assert _backend.choose("deform_conv2d", "cpu", torch.float32, None, "too large").name == "reference"
    with pytest.raises(RuntimeError, match="too large"):
        _backend.choose("deform_conv2d", "cpu", torch.float32, "cpu", "too large")


def test_missing_library_warns_once(no_library):
    with pytest.warns(UserWarning, match="the library was taken away"):
        assert _backend.choose("deform_conv2d", "cpu", torch.float32).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backend.choose("deform_conv2d", "cpu", torch.float64).name == "reference"
        assert _backend.choose("deform_conv2d", "mps", torch.float32).name == "reference"
    with pytest.raises(ImportError, match=r"backend='cpu' cannot run .*the library was taken away"):
        _backend.choose("deform_conv2d", "cpu", torch.float32, "cpu")
    with pytest.raises(ImportError, match="the library was taken away"):
        _native.library()


def test_explain_says_what_runs():
    explanation = cellops.explain()
    text = str(explanation)
    assert repr(explanation) == text
    assert f"cellops {cellops.__version__}" in text
    assert f"torch {torch.__version__}" in text
    assert f"{_native.library().isa()} in use" in text
    for op in _backend.OPS:
        taken = {(row.device, dtype): row.backend for row in explanation.rows if row.op == op for dtype in row.dtypes}
        assert taken["cpu", "float32"] == "cpu"
        built = not _native.library().build_info()["cuda"].startswith("off")
        can_run = {"triton": find_spec("triton") is not None, "cuda": built, "cpu": False}
        kernels = [name for name in _backend.OPS[op] if can_run[name]]
        assert taken["cuda", "float32"] == (*kernels, "reference")[0]


def test_explain_without_the_library(no_library):
    explanation = cellops.explain()
    assert "missing: the library was taken away" in str(explanation)
    assert all(row.backend == "reference" for row in explanation.rows if row.device == "cpu")


def test_doctor_succeeds():
    done = subprocess.run([sys.executable, "-c", CLI, "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees with the reference" in done.stdout


def test_doctor_in_front_of_a_pipe_that_closes():
    """As `| head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", CLI, "doctor"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 1 and done.stderr == ""


def test_doctor_reports_a_wrong_result(monkeypatch, capsys):
    from cellops.models import doctor

    monkeypatch.setattr(doctor, "check_op", lambda op, device: f"{op}: wrong")
    assert doctor.main() == 1
    assert "problem: deform_conv2d: wrong" in capsys.readouterr().out


CLI = "import sys; from cellops.models.cli import main; sys.exit(main(sys.argv[1:]))"


def test_command_line(capsys, tmp_path, monkeypatch):
    from cellops import _source_tree
    from cellops.models import cli

    assert cli.main(["--version"]) == 0
    assert cellops.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert "cellops doctor" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--unknown"])
    assert stopped.value.code == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_source_tree, "ROOT", tmp_path)
    assert cli.main(["bench"]) == 2
    assert "from the root of a clone" in capsys.readouterr().err
