"""Peak memory of one call above its inputs and outputs, measured in a process of its own with the default malloc.

python benchmarks/memory.py deform_conv2d 32x64x56x56 cellops forward+backward 2
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from machine import steady_environment

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_bytes(op: str, case: str, peer: str, direction: str, threads: int) -> int:
    """Run this file as a program and return what it prints.

    Raises:
        peers_<op>.Missing: the peer cannot run the case, or the system does not tell the peak.
    """
    missing = importlib.import_module(f"peers_{op}").Missing
    if not CLEAR.exists():
        raise missing(f"{CLEAR} is needed to measure a peak")
    environment = {name: value for name, value in os.environ.items() if name not in steady_environment(threads)}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, op, case, peer, direction, str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise missing(done.stderr.strip().splitlines()[-1])
    return int(done.stdout)


def _measure(op: str, case_name: str, peer: str, direction: str, threads: int) -> int:
    import torch

    from cellops import testing

    peers = importlib.import_module(f"peers_{op}")
    torch.set_num_threads(threads)
    backward = direction == "forward+backward"
    (case,) = (case for case in testing.cases(op) if case.name == case_name)
    problem = peers.Problem.of(case, torch.float32, "NCHW", threads)
    first_image = {
        name: value[:1] if isinstance(value, torch.Tensor) and value.dim() == 4 and name != "weight" else value
        for name, value in problem.arguments.items()
    }
    warm_up = replace(problem, arguments=first_image)  # loads code and starts threads
    peers.eager(peers.EAGER[peer], warm_up, backward=backward)()
    call = peers.eager(peers.EAGER[peer], problem, backward=backward)
    _give_free_memory_back()
    CLEAR.write_text("5")  # the peak starts again from here
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    outputs = list(result) if backward else [result]
    output_bytes = sum(tensor.nbytes for tensor in outputs)
    if backward:  # the forward's output lives until the call returns
        output_bytes += math.prod(peers.output_shape(problem)) * torch.float32.itemsize
    return max(0, peak - before - output_bytes)


def _status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert match is not None, f"{STATUS} has no {name}"
    return 1024 * int(match[1])


def _give_free_memory_back() -> None:
    ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    print(_measure(*sys.argv[1:5], int(sys.argv[5])))
