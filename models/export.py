"""Networks as files that run elsewhere: ONNX with standard operators only, and programs of `torch.export`.

from cellops.models import create_model
from cellops.models.export import export_onnx
export_onnx(create_model("dresnet"), "dresnet.onnx", (3, 224, 224))
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cellops
from cellops.models import onnx_rules

OPSET = 20  # DeformConv came with 19, GridSample and Gelu as PyTorch has them with 20
TOLERANCE = 1e-4  # of the largest logit: of 1 would hide an untrained network's
INPUT, OUTPUT = "images", "logits"


class ExportError(RuntimeError):
    """A network cannot be exported, or what was exported computes something else."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: the file.
        size: its bytes.
        operators: how often it calls each operator; of ONNX only, else empty.
        difference: largest difference of its logits from the network's on random images, None if it was not checked.
    """

    path: Path
    size: int
    operators: dict[str, int]
    difference: float | None

    def __str__(self) -> str:
        text = f"{self.path}: {self.size / 2**20:.2f} MiB"
        if self.operators:
            text += ", " + ", ".join(f"{count} {name}" for name, count in self.operators.items())
        if self.difference is not None:
            text += f"; logits differ by {self.difference:.1e} at most"
        return text


def export_onnx(
    model: nn.Module,
    path: str | Path,
    input_size: Sequence[int],
    dynamic_batch: bool = True,
    check: bool = True,
    metadata: Mapping[str, str] | None = None,
    images: Tensor | None = None,
) -> Exported:
    """Write a network in evaluation mode, its normalisations folded, as one ONNX file of standard operators.

    The file has the input "images" [N, C, H, W] and the output "logits". The network itself stays as it is.

    Args:
        model: takes one tensor of images and returns one tensor.
        path: of the file; it is replaced only when all has gone well.
        input_size: C, H and W.
        dynamic_batch: whether N may be any number, else 1.
        check: whether to compare the file, run by onnxruntime, with the network on random images of several N.
        metadata: texts that are kept in the file.
        images: [N, C, H, W], more images to check on.

    Raises:
        ValueError: `input_size` is wrong.
        ModuleNotFoundError: onnx or onnxscript is not installed, or onnxruntime where it is to check.
        ExportError: the network cannot be exported, the file cannot be written, onnxruntime lacks one of its operators,
            or it computes something else.
    """
    _need("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    example = _example(model, input_size, 2 if dynamic_batch else 1)
    network = _evaluated(model)
    cellops.accelerate(network)  # other libraries' deformable convolutions have no rule of ours
    cellops.fuse(network)
    program = _program(network, example, dynamic_batch).run_decompositions(onnx_rules.decompositions())
    with _written(path) as temporary:
        try:
            converted = torch.onnx.export(
                program,
                (),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamo=True,
                custom_translation_table=onnx_rules.translations(),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"the network has what ONNX lacks: {_last_line(error)}") from error
        assert converted is not None
        # The exporter's traces: paths of this machine, and half of a small file.
        for node in converted.model.graph.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
        converted.model.metadata_props.update(metadata or {})
        converted.save(temporary, external_data=False)
        operators = _operators(temporary)
        difference = None
        if check:
            session = _session_to_check(temporary)
            checked = _random_images(example, 1, dynamic_batch) + (
                [] if images is None else _split(images, dynamic_batch)
            )
            difference = _difference(
                _evaluated(model), lambda x: torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0]), checked
            )
    return Exported(Path(path), Path(path).stat().st_size, operators, difference)


def export_program(
    model: nn.Module,
    path: str | Path,
    input_size: Sequence[int],
    dynamic_batch: bool = True,
    check: bool = True,
    train: bool = False,
) -> Exported:
    """Write a network as a program of `torch.export`, which runs, and trains, without the network's code.

    import cellops, torch  # the program calls the ops of cellops
    network = torch.export.load("file.pt2").module()

    Args:
        model: takes one tensor of images and returns one tensor.
        path: of the file; it is replaced only when all has gone well.
        input_size: C, H and W.
        dynamic_batch: whether N may be any number, else 2 in training and 1 in evaluation.
        check: whether to compare the file with the network on random images of several N.
        train: whether the program is the network in training (its normalisations by the batch, dropout at work, and
            buffers updated) or in evaluation. A program keeps the mode that it was made in.

    Raises:
        ValueError: `input_size` is wrong.
        ExportError: the network cannot be exported, the file cannot be written, or it computes something else.
    """
    example = _example(model, input_size, 2 if dynamic_batch or train else 1)
    network = _evaluated(model).train(train)
    program = _program(network, example, dynamic_batch)
    for module in program.graph_module.modules():  # the exporter's traces: paths of this machine
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    with _written(path) as temporary:
        buffer = io.BytesIO()  # given a file, torch ends the process where the disk is full
        torch.export.save(program, buffer)
        temporary.write_bytes(buffer.getbuffer())
        del buffer
        difference = None
        if check:
            loaded = torch.export.load(temporary).module()
            twin = copy.deepcopy(network)  # both may update their buffers
            difference = _difference(twin, loaded, _random_images(example, 2 if train else 1, dynamic_batch))
    return Exported(Path(path), Path(path).stat().st_size, {}, difference)


def export_weights(run: str | Path, path: str | Path) -> Path:
    """Write the weights of a run as a file to hand over, which `Predictor.load` and `cellops predict` read.

    The header of a run's own weights has its whole recipe. Here it is without data.path, the name of the data set,
    model.weights, and the texts that people wrote (title, setting, notes, paper). Classes stay, data.options too.

    Args:
        run: folder of a run with one part, or a file of weights of it.
        path: of the file, ending in .safetensors.

    Raises:
        ValueError: there is no such run, it has several networks, or `path` does not end so or is that of the run.
        CheckpointError: the weights are damaged, not from `cellops train`, or cannot be written.
    """
    from cellops.models.training.apply import check_facts, weight_files
    from cellops.models.training.checkpoint import read_weights, save_weights

    files, path = weight_files(Path(run)), Path(path)
    if len(files) > 1:
        raise ValueError(f"{run} has {len(files)} networks, one a fold: give the weights of one, as {files[0]}")
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    if path.exists() and path.samefile(files[0]):
        raise ValueError(f"path must be another file than the run's, {path}")
    weights, facts = read_weights(files[0])
    check_facts(files[0], facts)
    recipe = dict(facts["recipe"])
    recipe |= {"title": "", "setting": "", "notes": "", "paper": ""}
    recipe["data"] = {**recipe["data"], "path": None}
    recipe["model"] = {**recipe["model"], "pretrained": False, "weights": None}
    kept = {name: facts[name] for name in ("classes", "synthetic", "epoch") if name in facts}
    save_weights(path, weights, {"recipe": recipe, **kept})
    return path


def onnx_session(file: Path | bytes, threads: int | None = None) -> Any:
    """onnxruntime's session of a file on the CPU, with torch's number of threads or another.

    Of a file's content (bytes) that names other files for its weights, as none of `export_onnx` does, it is an error.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # its warnings are about its own optimizations
    if isinstance(file, Path):
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    with tempfile.TemporaryDirectory() as nothing:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", nothing)
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _session_to_check(file: Path) -> Any:
    """onnxruntime's session of a file that was just written."""
    import onnxruntime

    try:
        return onnx_session(file)
    except Exception as error:  # onnxruntime's own kinds
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot run the file: {_last_line(error)}. DeformConv needs 1.25 or "
            "newer; without a check (--no-check, check=False) the file is written for other runtimes"
        ) from error


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"exporting needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _example(model: nn.Module, input_size: Sequence[int], batch: int) -> Tensor:
    if len(input_size) != 3 or any(not isinstance(size, int) or size < 1 for size in input_size):
        raise ValueError(f"input_size must be three positive integers (channels, height, width), got {input_size!r}")
    like = next(model.parameters(), torch.empty(0))
    return torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(0)).to(like.dtype)


def _evaluated(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in evaluation."""
    return copy.deepcopy(model).cpu().eval()


def _program(network: nn.Module, images: Tensor, dynamic_batch: bool) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic_batch else None
    try:
        with torch.set_grad_enabled(network.training):
            return torch.export.export(network, (images,), dynamic_shapes=shapes)
    except Exception as error:  # of any kind, from the network's own code as well
        raise ExportError(f"torch.export cannot follow the network: {_last_line(error)}") from error


@contextmanager
def _written(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place at the end."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file, but {path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    temporary.write_bytes(b"")  # where it cannot be, that shows before the work
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _operators(path: Path) -> dict[str, int]:
    """How often each operator is called.

    Raises:
        ExportError: the file is no valid ONNX, or an operator is not of the standard.
    """
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=model.ByteSize() < 2**30)
    others = sorted({node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")})
    if others or model.functions:
        names = ", ".join(others or (function.name for function in model.functions))
        raise ExportError(f"operators outside the ONNX standard: {names}")
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def _random_images(example: Tensor, smallest: int, dynamic_batch: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    batches = (smallest, 3, 5) if dynamic_batch else (len(example),)
    return [torch.randn(batch, *example.shape[1:], generator=generator).to(example.dtype) for batch in batches]


def _split(images: Tensor, dynamic_batch: bool) -> list[Tensor]:
    return list(images.split(16 if dynamic_batch else 1))


def _difference(network: nn.Module, other: Any, batches: list[Tensor]) -> float:
    """The largest difference of two networks' outputs on some images.

    Raises:
        ExportError: it is more than rounding.
    """
    largest = 0.0
    for x in batches:
        state = torch.get_rng_state()  # dropout in training
        with torch.no_grad():
            wanted = network(x)
            torch.set_rng_state(state)
            found = other(x)
        if found.shape != wanted.shape:
            raise ExportError(f"for {len(x)} images the file gives {tuple(found.shape)}, not {tuple(wanted.shape)}")
        difference = float((found - wanted).abs().max())
        scale = float(wanted.abs().max())
        if not difference <= TOLERANCE * scale:
            raise ExportError(f"for {len(x)} images the file's logits, up to {scale:.2e}, differ by {difference:.2e}")
        largest = max(largest, difference)
    return largest


def _last_line(error: BaseException) -> str:
    """What an exporter's long text comes down to."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
