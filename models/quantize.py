"""Networks with 8-bit weights and activations, by onnxruntime: an ONNX file in, an ONNX file out.

from cellops.models.quantize import quantize_onnx
quantize_onnx("cells.onnx", "cells_int8.onnx", images)
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cellops.models.export import INPUT, ExportError, onnx_session
from cellops.models.training.checkpoint import write_atomically

QUANTIZED = ("Conv", "Gemm", "MatMul")
"""Operators in 8 bits; what moves no weights stays in float32: onnxruntime has no 8-bit DeformConv or GridSample."""


@dataclass(frozen=True)
class Measured:
    """What a file costs and says.

    Attributes:
        size: its bytes.
        latency: median seconds of one image.
        accuracy: part of the images whose class is the label's, None without labels.
        agreement: part of the images whose class is that of the first file.
        images: how many.
    """

    size: int
    latency: float
    accuracy: float | None
    agreement: float
    images: int


def quantize_onnx(path: str | Path, output: str | Path, images: Tensor, batch: int = 16) -> Path:
    """Write a file that computes convolutions and linear layers in 8 bits, with weights scaled by channel.

    Smaller is not always faster: onnxruntime's grouped convolutions in 8 bits can take many times their float32's time.
    `compare` tells.

    Args:
        path: what `export_onnx` wrote, with a dynamic batch.
        output: the file to write.
        images: [N, C, H, W], what the ranges of activations are found on; a hundred of the training part do.
        batch: images at a time.

    Raises:
        ValueError: there are no images, or they do not fit the file's input.
        ExportError: nothing in the file could be quantised.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    wanted = onnx_session(Path(path)).get_inputs()[0].shape
    if images.dim() != 4 or len(images) < 1 or list(images.shape[1:]) != list(wanted[1:]):
        raise ValueError(f"images must be at least one of shape {tuple(wanted[1:])}, got {tuple(images.shape)}")

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Tensor] = iter(images.split(batch))

        def get_next(self) -> dict[str, Any] | None:
            found = next(self.left, None)
            return None if found is None else {INPUT: found.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        prepared, written = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(written),
            Batches(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=not _has_wide_products(),
            op_types_to_quantize=list(QUANTIZED),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        import onnx

        model = onnx.load(written)
        if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            raise ExportError(f"{path} has no {', '.join(QUANTIZED)} to quantise")
        del model.metadata_props[:]  # what the tools wrote into it; what `export_onnx` did stays
        model.metadata_props.extend(onnx.load(path, load_external_data=False).metadata_props)
        write_atomically(Path(output), lambda file: file.write(model.SerializeToString()))
    return Path(output)


def compare(
    paths: Sequence[str | Path], batches: Iterable[tuple[Tensor, Tensor | None]], runs: int = 20
) -> list[Measured]:
    """Size, latency of one image on one core, and what each file says about some images.

    Args:
        paths: the first is what the others are compared with.
        batches: images [N, C, H, W] with their labels [N], or None for all of them; one batch is held at a time.
        runs: calls that latency is the median of; the files have their turns in every round.

    Raises:
        ValueError: there are no images.
    """
    sessions = [onnx_session(Path(path), threads=1) for path in paths]
    taken: list[list[float]] = [[] for _ in sessions]
    right, agreeing, count, labelled = [0] * len(sessions), [0] * len(sessions), 0, True
    for images, labels in batches:
        if not count:
            one = {INPUT: images[:1].numpy()}
            for _ in range(runs):
                for session, times in zip(sessions, taken, strict=True):
                    start = time.perf_counter()
                    session.run(None, one)
                    times.append(time.perf_counter() - start)
        said = [_answers(torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])) for session in sessions]
        count += len(images)
        labelled = labelled and labels is not None
        for number, found in enumerate(said):
            agreeing[number] += int((found == said[0]).sum())
            right[number] += 0 if labels is None else int((found == labels).sum())
    if not count:
        raise ValueError("batches must hold at least one image")
    return [
        Measured(
            Path(path).stat().st_size,
            statistics.median(taken[number]),
            right[number] / count if labelled else None,
            agreeing[number] / count,
            count,
        )
        for number, path in enumerate(paths)
    ]


def _answers(logits: Tensor) -> Tensor:
    """The classes [N] that logits [N, K] say; a single one is of the second of two classes."""
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()


def _has_wide_products() -> bool:
    """Whether sums of 8-bit products cannot overflow 16 bits here: x86 without VNNI wants weights of 7 bits."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return "avx" not in text or "vnni" in text
