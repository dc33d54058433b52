"""Prediction on the machines of a Ray cluster, by Ray Data: the files are read where they are predicted.

Run and images must be found under the same paths on every machine. Ray starts a worker again that died, and gives its
images to the others; the process that calls writes the table, and takes each image once, whatever Ray repeats.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellops.models.data.images import ImageError
from cellops.models.prediction.files import Found
from cellops.models.prediction.predictor import BATCH_SIZE, Note, Prediction, Predictor

WINDOW = 100_000
"""Files that are handed to Ray at a time, so that their names do not pile up."""
BATCHES_IN_A_TASK = 4
"""What is done again where a worker dies."""
CONNECT_SECONDS = 10


class EngineError(RuntimeError):
    """Ray gave up; what was predicted before is kept."""


def need_ray() -> None:
    """Raise ModuleNotFoundError, with what to install, where Ray is missing."""
    missing = [name for name in ("ray", "pyarrow") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"--engine ray needs {', '.join(missing)}: pip install 'cellops[ray]'")


@contextmanager
def ray_cluster(workers: int | None = None, address: str | None = None) -> Iterator[None]:
    """Ray meanwhile; one that this process has joined already is taken as it is.

    Args:
        workers: cores of a Ray that is started here; None is all.
        address: HOST:PORT of a running cluster, or "auto" for the one of this machine; None starts Ray here.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
        ValueError: the address has no port.
    """
    need_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": "warning", "log_to_driver": False}
    if address is None:
        ray.init(num_cpus=workers, include_dashboard=False, **quiet)
    else:
        if address != "auto":
            _reach(address)
        ray.init(address=address, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--address must be HOST:PORT or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"there is no Ray cluster at {address}: {error.strerror or error}") from None


class Worker:
    """The predictor of one process.

    Args:
        run: what `Predictor.load` takes.
        tta: views of each image.
        settings: of the predictor of the process that calls.
        batch_size: images at a time.
        device: of the network.

    Raises:
        ValueError: this machine has another run under the same path.
    """

    def __init__(self, run: str, tta: str, settings: dict[str, Any], batch_size: int, device: str) -> None:
        torch.set_num_threads(1)
        self.predictor = Predictor.load(run, tta, device)
        self.batch_size = batch_size
        if self.predictor.settings != settings:
            raise ValueError(f"{run} is another run here than where prediction was started")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Probabilities of each file [N, K], and why not where it cannot be read."""
        files = [Path(os.fsdecode(name)) for name in batch["image"]]
        problems: dict[str, str] = {}
        found = self.predictor.batches(
            ((file, None) for file in files),
            self.batch_size,
            lambda file, reason: problems.update({str(file): reason}),
        )
        rows = {str(row.image): list(row.probabilities.values()) for rows in found for row in rows}
        nothing = [float("nan")] * len(self.predictor.classes)
        return {
            "image": batch["image"],
            "problem": np.array([os.fsencode(problems.get(str(file), "")) for file in files], dtype=object),
            "probabilities": np.array([rows.get(str(file), nothing) for file in files], dtype=np.float64),
        }


def ray_batches(
    predictor: Predictor,
    run: str | Path,
    found: Iterator[Found],
    unreadable: Note | None = None,
    workers: int | None = None,
    address: str | None = None,
    batch_size: int = BATCH_SIZE,
    gpus: float = 0,
) -> Iterator[list[Prediction]]:
    """What `Predictor.batches` gives, from the processes of a Ray cluster; in the order in which they are done.

    Args:
        predictor: of `run`, in this process.
        run: its path, the same on every machine.
        found: files, and why not where that is known.
        unreadable: called with a file that cannot be read and the reason; without it such a file is an error.
        workers: processes; None is one a core of the cluster.
        address: of a running cluster; None starts Ray here, and stops it at the end.
        batch_size: images at a time.
        gpus: what each worker takes of a GPU.

    Raises:
        ModuleNotFoundError, ConnectionError, ValueError: see `ray_cluster`.
        ImageError: an image cannot be read, and there is no `unreadable`.
        EngineError: Ray lost images or workers for good.
    """
    with ray_cluster(workers, address):
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        while window := list(islice(found, WINDOW)):
            for path, problem in window:
                if problem is not None:
                    _note(unreadable, path, problem)
            files = [path for path, problem in window if problem is None]
            yield from _window(predictor, Path(run), files, unreadable, count, batch_size, gpus)


def _window(
    predictor: Predictor,
    run: Path,
    files: list[Path],
    unreadable: Note | None,
    workers: int,
    batch_size: int,
    gpus: float,
) -> Iterator[list[Prediction]]:
    import ray

    if not files:
        return
    waiting = {os.fsencode(file.absolute()): file for file in files}  # a worker has a working directory of its own
    # Enough blocks for every worker to have several, none much larger than what may be lost.
    blocks = min(len(files), max(4 * workers, -(-len(files) // (BATCHES_IN_A_TASK * batch_size))))
    data = ray.data.from_items([{"image": name} for name in waiting], override_num_blocks=blocks).map_batches(
        Worker,
        fn_constructor_args=(
            str(run.absolute()),
            predictor.tta,
            predictor.settings,
            batch_size,
            "cuda" if gpus else "cpu",
        ),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    for batch in _until_ray_fails(data.iter_batches(batch_size=None, batch_format="numpy")):
        rows = []
        for name, problem, probabilities in zip(batch["image"], batch["problem"], batch["probabilities"], strict=True):
            file = waiting.pop(bytes(name), None)
            if file is None:  # had already
                continue
            if problem:
                _note(unreadable, file, os.fsdecode(problem).replace(os.fsdecode(name), str(file), 1))
            else:
                rows.append(predictor.prediction(file, probabilities))
        yield rows
    if waiting:
        raise EngineError(f"Ray gave no answer for {len(waiting)} images, the first {next(iter(waiting.values()))}")


def _until_ray_fails(batches: Iterable[Any]) -> Iterator[Any]:
    import ray

    try:
        yield from batches
    except ray.exceptions.RayError as error:
        last = [line for line in str(error).splitlines() if line.strip()][-1:]
        raise EngineError(f"Ray gave up: {type(error).__name__}: {''.join(last).strip()}") from error


def _note(unreadable: Note | None, path: Path, problem: str) -> None:
    if unreadable is None:
        raise ImageError(problem)
    unreadable(path, problem)
