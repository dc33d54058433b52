"""What a network costs: parameters, file size, multiply-adds, memory and latency; and the table of `cellops models`."""

from __future__ import annotations

import csv
import gc
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cellops import DepthwiseConv2d, EfficientChannelAttention, GroupConv1x1, SpatialAttention, SqueezeExcite
from cellops.models.registry import create_model, list_models, model_source

MEBI = 2**20
STYLES = ("text", "csv", "markdown")
ATTENTIONS = (EfficientChannelAttention, SpatialAttention, SqueezeExcite)
COLUMNS = ("network", "source", "input", "parameters", "file MiB", "M MAC", "torchstat MiB", "peak MiB", "latency ms")
RUNS, SECONDS = 9, 1.0
"""How often the latency is measured, and for how long at most; twice at least."""


@dataclass(frozen=True)
class Cost:
    """What one image costs in evaluation.

    Attributes:
        parameters: how many numbers are trained.
        megabytes: MiB of parameters and buffers, as a file of the `state_dict` holds them.
        macs: multiply-adds of convolutions and products (half of what torch's counter reports), bilinear samples
            included as four each.
        torchstat_bytes: torchstat's "total memory": the outputs of all innermost modules in float32. Activations that
            a network applies by functions are not in it, a fused module counts its output once.
        peak_bytes: the largest sum at any time of parameters, buffers, and what torch's allocator gave out during the
            forward pass; None where it was not measured. Scratch of cellops' kernels (about 2 MiB a thread) and of the
            libraries below torch is not in it.
        latency_seconds: median of repeated calls; None where it was not measured.
    """

    parameters: int
    megabytes: float
    macs: int
    torchstat_bytes: int
    peak_bytes: int | None = None
    latency_seconds: float | None = None


def cost(model: nn.Module, input_size: Sequence[int] = (3, 224, 224), measure: bool = True) -> Cost:
    """Count and measure a network in evaluation, where its parameters are; its mode is put back.

    Args:
        model: any network of one image tensor.
        input_size: (channels, height, width) of the one image.
        measure: whether to run the network for peak memory and latency. Without it everything is found from shapes,
            for a network on the meta device too.

    Raises:
        ValueError: `input_size` is not three positive integers, or `measure` is asked of a network on the meta device.
    """
    if len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"input_size must be (channels, height, width), all positive, got {tuple(input_size)}")
    tensors = [*model.parameters(), *model.buffers()]
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    device = tensors[0].device if tensors else torch.device("cpu")
    if measure and device.type == "meta":
        raise ValueError("measure must be False for a network on the meta device")
    with _evaluation(model), torch.no_grad():
        macs, torchstat_bytes = _count(model, input_size, dtype)
        peak = latency = None
        if measure:
            image = torch.randn(1, *input_size, device=device, dtype=dtype)
            latency = _latency(lambda: model(image), device)
            peak = sum(map(_bytes, tensors)) + peak_bytes(lambda: model(image), device)
    kept = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # a shared one is saved once
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        megabytes=sum(_bytes(tensor) for tensor in kept.values()) / MEBI,
        macs=macs,
        torchstat_bytes=torchstat_bytes,
        peak_bytes=peak,
        latency_seconds=latency,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _count(model: nn.Module, input_size: Sequence[int], dtype: torch.dtype) -> tuple[int, int]:
    """Multiply-adds and torchstat's bytes, from shapes alone."""
    image = torch.empty(1, *input_size, device="meta", dtype=dtype)
    with _without_values(model), FlopCounterMode(display=False) as counter, _outputs_of_innermost(model) as outputs:
        model(image)
    return counter.get_total_flops() // 2, 4 * sum(outputs)


@contextmanager
def _without_values(model: nn.Module) -> Iterator[None]:
    """Has the network hold meta tensors meanwhile; `functional_call` does not put shared modules back."""
    held = []
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            held += [(slots, name, tensor) for name, tensor in slots.items() if tensor is not None]
    try:
        for slots, name, tensor in held:
            slots[name] = tensor.to("meta")
        yield
    finally:
        for slots, name, tensor in held:
            slots[name] = tensor


@contextmanager
def _outputs_of_innermost(model: nn.Module) -> Iterator[list[int]]:
    """Collects the sizes of what modules return that call no other module, and of modules of cellops.

    The latter call an op at their end whatever they call before; but a fused convolution that calls its convolution and
    its normalisation, as one with a stride does, is no more than these. The attentions, of which children with hooks
    would be called in place of the op, are looked at from outside.
    """
    sizes: list[int] = []
    calls_others: list[bool] = []

    def enter(module: nn.Module, arguments: Any) -> None:
        if calls_others:
            calls_others[-1] = True
        calls_others.append(False)

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        innermost = not calls_others.pop()
        of_cellops = type(module).__module__.startswith("cellops.nn")
        ends_in_op = of_cellops and not isinstance(module, (DepthwiseConv2d, GroupConv1x1))
        if isinstance(output, Tensor) and (innermost or ends_in_op):
            sizes.append(output.numel())

    attentions = [module for module in model.modules() if isinstance(module, ATTENTIONS)]
    inside = {child for module in attentions for child in module.modules()} - {*attentions}
    seen = [module for module in model.modules() if module not in inside]
    hooks = [module.register_forward_pre_hook(enter) for module in seen]
    hooks += [module.register_forward_hook(leave) for module in seen]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def peak_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes that torch's allocator has given out at a time during `call`, above what it had before.

    On a CPU from the events of torch's profiler, so free of what malloc keeps.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells stderr that it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _latency(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, the first ones left out."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    synchronize()
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < RUNS and sum(taken) < SECONDS):
        start = time.perf_counter()
        call()
        synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def table(
    names: Sequence[str] | None = None,
    *,
    input_size: Sequence[int] | None = None,
    num_classes: int = 1000,
    measure: bool = True,
    style: str = "text",
    progress: bool = True,
) -> str:
    """The costs of networks, one a line.

    Args:
        names: of the registry; None for all.
        input_size: (channels, height, width) of the image; None for each network's own.
        num_classes: of every network.
        measure: whether to run each network for peak memory and latency.
        style: "text" with a line that explains the columns, "csv" or "markdown".
        progress: whether to show a bar on stderr where that is a terminal.

    Raises:
        ValueError: a name, the size or the style is wrong, or a network does not take an image of that size.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(map(repr, STYLES))}, got {style!r}")
    names = list_models() if names is None else list(names)
    sources = [model_source(name) for name in names]
    rows = [list(COLUMNS)]
    with _bar(len(names), progress) as step:
        for name, source in zip(names, sources, strict=True):
            step(name)
            rows.append([name, source, *_row(name, input_size, num_classes, measure)])
    if style == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(rows)
        return file.getvalue()
    if style == "markdown":
        head, *lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([head, f"|{'---|' * len(COLUMNS)}", *lines]) + "\n"
    explanation = (
        f"{num_classes} classes, one image; M MAC: millions of multiply-adds, half of what torch's counter reports; "
        f"latency: {torch.get_num_threads()} threads"
    )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    return "\n".join([explanation, *lines]) + "\n"


def _row(name: str, input_size: Sequence[int] | None, num_classes: int, measure: bool) -> list[str]:
    with torch.device("cpu" if measure else "meta"):
        model = create_model(name, num_classes=num_classes, in_chans=input_size[0] if input_size else 3)
    size = tuple(input_size or model.default_cfg["input_size"])
    shown = "x".join(map(str, size))
    try:
        found = cost(model, size, measure)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name} does not take an image of {shown}: {error}") from error
    return [
        shown,
        str(found.parameters),
        f"{found.megabytes:.2f}",
        f"{found.macs / 1e6:.1f}",
        f"{found.torchstat_bytes / MEBI:.2f}",
        "" if found.peak_bytes is None else f"{found.peak_bytes / MEBI:.1f}",
        "" if found.latency_seconds is None else f"{1e3 * found.latency_seconds:.1f}",
    ]


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; what it gives is called with a name before each step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    disable = not wanted or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task("", total=total, completed=-1)

        def step(name: str) -> None:
            progress.update(task, advance=1, description=name)

        yield step
