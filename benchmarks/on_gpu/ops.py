"""Every op beside its peers on the device: medians, bandwidth or operations a second, percent of a copy, peak memory.

Every backend that the op has there is timed in the same turns, so that the choice between them can follow the numbers.
Answers are compared before anything is timed. What raises or differs says so in the row and costs no other variant.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cellops import _backend, testing
from cellops.ops._deform_conv2d_launch import first_of_gpu
from on_gpu import clock, peers, shapes
from on_gpu.progress import Record, Row, Setup, Step, in_a_line, is_fatal
from on_gpu.shapes import Point
from on_gpu.work import floor_bytes

COPY = "copy"
"""A kernel that reads and writes as many bytes: a GPU's own copies reach three fifths of its rate."""

MIXED = "by direction"
"""The default where forward and backward take different backends."""

LARGEST_ERROR = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""A variant's largest difference from the first, by its norm; single elements may fall on another side of a kink."""

EAGER_MEMORY = 8 << 30
"""Bytes of the columns that the eager deformable convolution makes; where they are more, it is not run."""

LEAST = 20.0  # seconds that a row must have: this process cannot stop it
CALLS = 200  # of a tiny tensor, for the cost of a call


def step(setup: Setup) -> Step:
    """A row for every point, then the cost of a call of every op."""
    allow_tf32()
    rows = [
        Row(point.key, 1.0 if setup.small else 40.0 if _is_compiled(point) else LEAST, partial(_measure, point, setup))
        for point in shapes.points(small=setup.small)
    ]
    timed = shapes.OPS[-1:] if setup.small else shapes.OPS
    rows += [Row(f"ops {op} overhead", 1.0 if setup.small else LEAST, partial(_overhead, op, setup)) for op in timed]
    return Step("ops", rows)


def allow_tf32() -> None:
    """Alike for ours and the peers."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def _is_compiled(point: Point) -> bool:
    """Compiling takes about ten seconds: in the rows of the targets only."""
    return point.urgency == 0 and point.dtype == "bfloat16" and point.op != "deform_conv2d"


def _default(point: Point, arguments: dict[str, Any], backends: Sequence[str]) -> str:
    """The backend that is taken without `backend=`."""
    if point.case.op != "deform_conv2d" or not {"triton", "cuda"} <= set(backends):
        return backends[0]
    weight, groups = arguments["weight"], point.case.sizes["groups"]
    forward, of_backward = first_of_gpu(weight.shape[0] // groups)
    return forward if point.direction == "forward" or forward == of_backward else MIXED


def _measure(point: Point, setup: Setup, left: float) -> Record:
    device, factor = shapes.filled(point, setup)
    dtype, backward = shapes.DTYPES[point.dtype], point.direction != "forward"
    arguments = shapes.make(point, device, factor)
    backends = [name for name in _backend.OPS[point.case.op] if runs(name, point, device)]
    if not backends:
        raise RuntimeError(f"no kernel of {point.op} runs on {device.type} with {point.dtype}")
    makers = {
        f"cellops {name}": partial(call_of, partial(point.case.function, backend=name), arguments, backward)
        for name in backends
    }
    default = _default(point, arguments, backends)
    if default == MIXED:
        makers[f"cellops {MIXED}"] = partial(call_of, point.case.function, arguments, backward)
    calls, skipped, ours = tried(makers, set(makers), None, dtype)
    if ours is None:
        raise RuntimeError("; ".join(f"{name}: {text}" for name, text in skipped.items()))
    found, same = _peers(point, arguments, backward, setup)
    # grid_sample's gradients are those of its own arguments.
    others, theirs, _ = tried(found, same, ours[:1] if point.op == "offset_sample2d" else ours, dtype)
    calls |= others
    skipped |= theirs
    floor = floor_bytes(arguments, ours[0], point.direction)
    output_bytes = sum(one.nbytes for one in ours)
    del ours
    half = torch.zeros(max(floor // 8, 1), dtype=torch.int32, device=device)
    calls[COPY] = partial(torch.bitwise_not, half, out=torch.empty_like(half))
    timings, untimed = clock.compare(calls, device, 2 if setup.small else clock.ROUNDS)
    skipped |= untimed
    copy = timings[COPY]["median"]
    names = [name for name in timings if name.startswith("cellops ")]
    flops = point.case.flops * factor * (3 if backward else 1)
    record = {
        "kind": "gpu",
        "op": point.op,
        "case": point.case.name,
        "images": arguments["input"].shape[0],
        "shape": list(arguments["input"].shape),
        "sweep": point.sweep,
        "dtype": point.dtype,
        "layout": point.layout,
        "direction": point.direction,
        "default": default,
        "tf32": dtype == torch.float32,
        "variants": timings,
        "skipped": skipped,
        "floor_bytes": floor,
        "flops": flops,
        "gigabytes_per_second": {name: floor / timings[name]["median"] / 1e9 for name in (*names, COPY)},
        "teraflops_per_second": {name: flops / timings[name]["median"] / 1e12 for name in names},
        "percent_of_copy": {name: 100 * copy / timings[name]["median"] for name in names},
        "percent_of_dense": {
            name: 100 * timings["dense"]["median"] / timings[name]["median"] for name in names if "dense" in timings
        },
        "peak_bytes": {name: clock.peak_bytes(call, device) for name, call in calls.items() if name != COPY},
        "output_bytes": output_bytes,
        "im2col_bytes": _im2col_bytes(point, arguments),
    }
    return record | own_failures(skipped)


def own_failures(skipped: dict[str, str]) -> Record:
    """A backend that raises or differs is a defect, a peer that does is not."""
    texts = [f"{name}: {text}" for name, text in skipped.items() if name.startswith("cellops ")]
    return {"failed": "; ".join(texts)} if texts else {}


def runs(backend: str, point: Point, device: torch.device) -> bool:
    return _backend.why_not(backend, point.case.op, device.type, shapes.DTYPES[point.dtype]) is None


def _im2col_bytes(point: Point, arguments: dict[str, Any]) -> int | None:
    """Of the buffer that other implementations make."""
    if point.op != "deform_conv2d":
        return None
    input, weight, offset = (arguments[name] for name in ("input", "weight", "offset"))
    pixels = offset.shape[0] * offset.shape[2] * offset.shape[3]
    return pixels * input.shape[1] * weight.shape[2] * weight.shape[3] * input.element_size()


def _peers(
    point: Point, arguments: dict[str, Any], backward: bool, setup: Setup
) -> tuple[dict[str, Callable[[], clock.Call]], set[str]]:
    """What makes each peer's call, and which of them give the op's answer."""
    found: dict[str, Callable[[], clock.Call]] = {}
    eager = peers.eager(point.case.op)
    prepared = cache(lambda: peers.prepared(point.op, arguments))  # by the peers themselves: it may take much memory
    if (_im2col_bytes(point, arguments) or 0) * 4 < EAGER_MEMORY:
        found["eager"] = lambda: call_of(eager, prepared(), backward)
    if setup.small or _is_compiled(point):
        torch.compiler.reset()  # or the compiler gives up on a function that it has compiled for eight shapes
        compiled = torch.compile(eager, dynamic=False, backend="eager" if setup.small else "inductor")
        found["compiled"] = lambda: call_of(compiled, prepared(), backward)
    same = {"eager", "compiled"}
    for name, (function, same_answer) in peers.others(point.case.op).items():
        found[name] = partial(call_of, function, arguments, backward)
        same |= {name} if same_answer else set()
    return found, same


def tried(
    makers: dict[str, Callable[[], clock.Call]],
    same: set[str],
    ours: tuple[Tensor, ...] | None,
    dtype: torch.dtype,
) -> tuple[dict[str, clock.Call], dict[str, str], tuple[Tensor, ...] | None]:
    """The calls that run, what raised or differs and how, and the answer that the others are compared with.

    A call that gives another answer is among those that run: torchvision's kernels compute positions in float16 for
    float16, which is their time all the same.
    """
    calls: dict[str, clock.Call] = {}
    skipped: dict[str, str] = {}
    for name, maker in makers.items():
        try:
            call = maker()
            answer = call()
        except Exception as error:  # no such type, no such package, out of memory, a defect
            if is_fatal(error):
                raise
            skipped[name] = in_a_line(error)
            continue
        calls[name] = call
        ours = answer if ours is None else ours
        if name in same:
            try:
                _check(name, answer, ours, dtype)
            except Exception as error:
                if is_fatal(error):
                    raise
                skipped[name] = in_a_line(error)
        del answer
    return calls, skipped, ours


def _check(name: str, found: tuple[Tensor, ...], ours: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Compare answers, those that both have; gradients that are zero are left out, where peers have rounding errors.

    Raises:
        AssertionError: they differ.
    """
    for one, other in zip(found, ours, strict=False):
        size = other.double().norm()
        if size > 0:
            error = float((one.reshape(other.shape).double() - other.double()).norm() / size)
            assert error < LARGEST_ERROR[dtype], f"{name} differs from the first backend by {error:.1e} of the norm"


def call_of(function: Callable[..., Any], arguments: dict[str, Any], backward: bool) -> clock.Call:
    """A call that gives the output, or with `backward` output and gradients to every tensor that the function uses."""
    if not backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                found = function(**arguments)
            return (found[0] if isinstance(found, tuple) else found,)

        return forward
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    given = {**arguments, **leaves}
    found = function(**given)
    output = found[0] if isinstance(found, tuple) else found
    generator = torch.Generator(output.device).manual_seed(1)
    drawn = torch.randn(output.shape, generator=generator, device=output.device)  # alike in both memory formats
    grad_output = torch.empty_like(output).copy_(drawn)
    del found, output, drawn

    def forward_and_backward() -> tuple[Tensor, ...]:
        found = function(**given)
        output = found[0] if isinstance(found, tuple) else found
        gradients = torch.autograd.grad(output, tuple(leaves.values()), grad_output, allow_unused=True)
        return (output.detach(), *(one for one in gradients if one is not None))

    return forward_and_backward


def _overhead(op: str, setup: Setup, left: float) -> Record:
    """Microseconds of a call on about 512 elements: by the wall in eager mode, and within a CUDA graph.

    Beside the op's backends its eager composition, and PyTorch's own batch normalisation: what one op costs there.
    """
    device = torch.device(setup.device)
    case = testing.cases(op, "small")[0]
    arguments = case.make(torch.float32, device)
    count = 3 if setup.small else CALLS
    variants: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    callers: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        f"cellops {name}": (partial(case.function, backend=name), arguments)
        for name in _backend.OPS[op]
        if _backend.why_not(name, op, device.type, torch.float32) is None
    }
    callers["eager"] = (peers.eager(op), peers.prepared(op, arguments))
    channels = arguments["input"].shape[1]
    callers["batch_norm"] = (
        partial(peers.batch_norm, running=torch.ones(2, channels, device=device)),
        {"input": arguments["input"], "weight": torch.ones(channels, device=device)},
    )
    for name, (function, given) in callers.items():
        for mode, backward in (("inference", False), ("forward and backward", True)):
            label = f"{name}, {mode}"
            try:
                call = call_of(function, given, backward)
                eager = _seconds(call, count, device)
            except Exception as error:
                if is_fatal(error):
                    raise
                skipped[label] = in_a_line(error)
                continue
            timings, untimed = clock.compare({label: call}, device, 2 if setup.small else clock.ROUNDS)
            skipped |= untimed
            variants[label] = {"eager": eager, "in a graph": timings[label]["median"] if timings else None}
    text = ", ".join(f"{name} {1e6 * taken['eager']:.1f} us" for name, taken in variants.items())
    record = {"kind": "gpu_overhead", "op": op, "case": case.name, "variants": variants, "summary": text}
    return record | own_failures(skipped)


def _seconds(call: clock.Call, count: int, device: torch.device) -> float:
    """Of a call by the wall, without waiting for the device between calls."""
    for _ in range(clock.WARM_UP):
        call()
    clock.synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        call()
    taken = time.perf_counter() - started
    clock.synchronize(device)
    return taken / count
