"""How far a run on a GPU has come: rows in one JSON, written after each, that a later call of the same command goes on.

A row that was being measured when its call was cut off is marked so: it is not tried again, or one that hangs would
take the time of every call. A process that this call had to end is tried again only with more time than it had, so that
the same command always gets on: the first row that is left has a whole call, or is passed over after one.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Record = dict[str, Any]

WROTE = 6000  # characters of what an unfinished row wrote that are kept

FATAL = (
    *("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS_EXECUTION_FAILED"),
    *("illegal memory access", "device-side assert", "misaligned address", "launch failure"),  # Triton's words
)
"""In the text of an error after which a process can use its GPU no more."""

HARMLESS = ("NOT_SUPPORTED", "ALLOC_FAILED", "no kernel image", "out of memory")
"""In the text of one that also has words of `FATAL`, but after which the GPU can be used."""


class OutOfTime(Exception):
    """A row was not finished within what was left of the budget; it is tried again by the next call. Its text is what
    the row's process wrote."""


class Skipped(Exception):
    """A row cannot be measured here; its text says why. It does not count as done, nor as left by the call."""


class DeadDevice(Exception):
    """The process must be started anew: its context on the GPU is lost."""


def is_fatal(error: Exception) -> bool:
    """Whether the process can use its GPU no more."""
    text = str(error)
    return any(words in text for words in FATAL) and not any(words in text for words in HARMLESS)


def in_a_line(error: Exception) -> str:
    """An error's type and the first line of its text, which may be empty."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:200]


class Budget:
    """Seconds that a call may still take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """May be negative."""
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Setup:
    """What a call was asked for.

    Attributes:
        device: "cuda", or "cpu" to walk through every path where there is no GPU.
        small: tiny shapes and few rows.
        folder: where results go.
        data: of the experiments: it holds pbc/ and cric/.
        jobs: processes side by side where rows are processes.
        machine: its name in the names of files.
    """

    device: str
    small: bool
    folder: Path
    data: Path
    jobs: int
    machine: str


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    Attributes:
        key: names it, in the JSON too.
        seconds: about how long it takes; it is not begun with less left.
        measure: gives the record from the seconds that are left; may raise `OutOfTime` or `Skipped`.
        resumes: whether a row that ran out of time goes on, rather than starting again.
    """

    key: str
    seconds: float
    measure: Callable[[float], Record]
    resumes: bool = False


@dataclass
class Step:
    """Rows that belong together, most important first; `parallel` of them at a time."""

    name: str
    rows: list[Row]
    parallel: int = 1
    left: list[str] = field(default_factory=list)


class Results:
    """The JSON of a run: "records" of what was measured, failures too; "skipped", why other rows cannot be measured;
    "stopped", how many seconds a row had that was not finished in them, and "wrote", the end of what it wrote by then.

    Args:
        path: the file; what is in it is kept.
        head: machine, versions and commit of this call.

    Raises:
        ValueError: the file is of another machine, or of other versions.
    """

    def __init__(self, path: Path, head: Record) -> None:
        self.path, self._lock = path, threading.Lock()
        self.data: Record = {
            "format": 1,
            **head,
            "running": [],
            "skipped": {},
            "stopped": {},
            "wrote": {},
            "records": [],
        }
        if path.is_file():
            kept = json.loads(path.read_text())
            for what, there, here in (
                ("machine", kept["machine"]["name"], head["machine"]["name"]),
                ("versions", kept["versions"], head["versions"]),
            ):
                if there != here:
                    raise ValueError(
                        f"--output: {path} was measured elsewhere ({what}: {there}, here {here}); take another folder"
                    )
            self.data |= {name: kept[name] for name in ("skipped", "stopped", "wrote", "records") if name in kept}
            for key in kept.get("running", []):
                self._append(key, {"failed": "the call that measured it was cut off; not tried again"})
        self._write()

    def __contains__(self, key: str) -> bool:
        return any(record["key"] == key for record in self.data["records"])

    @property
    def records(self) -> list[Record]:
        """All rows, those of earlier calls first."""
        return self.data["records"]

    def forget(self, text: str) -> int:
        """Drop the rows with this text in their key, to be measured again; returns how many there were."""
        kept = [record for record in self.records if text not in record["key"]]
        dropped = len(self.records) - len(kept)
        self.data["records"] = kept
        self.data["stopped"] = {key: had for key, had in self.data["stopped"].items() if text not in key}
        self._write()
        return dropped

    def least_seconds(self, key: str) -> float:
        """That a row is to have which was stopped: a tenth more than it had."""
        return 1.1 * self.data["stopped"].get(key, 0.0)

    def begin(self, key: str) -> None:
        with self._lock:
            self.data["running"].append(key)
            self.data["skipped"].pop(key, None)
            self._write()

    def end(
        self,
        key: str,
        record: Record | None,
        *,
        skipped: str | None = None,
        stopped: float | None = None,
        wrote: str = "",
    ) -> None:
        """Keep a row; None if it is to be tried again, with why it was skipped or how many seconds were too few, and
        what it wrote in them."""
        with self._lock:
            self.data["running"].remove(key)
            self.data["stopped"].pop(key, None)
            self.data["wrote"].pop(key, None)
            if wrote.strip():
                self.data["wrote"][key] = wrote[-WROTE:]
            if record is not None:
                self._append(key, record)
            if skipped is not None:
                self.data["skipped"][key] = skipped
            if stopped is not None:
                self.data["stopped"][key] = round(stopped, 1)
            self._write()

    def update(self, **fields: Any) -> None:
        """Set fields of the head."""
        with self._lock:
            self.data |= fields
            self._write()

    def _append(self, key: str, record: Record) -> None:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        # GPUs of one name are lent in machines with different processors.
        origin = {"commit": self.data["commit"]["hash"], "date": now, "cpu": self.data["machine"]["cpu"]}
        origin |= {name: self.data[name] for name in ("library",) if name in self.data}
        self.data["records"].append({"key": key, **origin, **record})

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, self.path)


def run(step: Step, results: Results, budget: Budget, say: Callable[[str], None]) -> None:
    """Measure the rows of a step that are missing, as far as the time goes; `step.left` lists the others.

    Raises:
        DeadDevice: after an error that took the GPU from this process; the row is kept as failed.
    """
    missing = [row for row in step.rows if row.key not in results]
    dead: list[str] = []

    def measure(row: Row) -> None:
        had = budget.left
        if dead or had < max(row.seconds, results.least_seconds(row.key)):
            step.left.append(row.key)
            return
        results.begin(row.key)
        started = time.monotonic()
        try:
            record = row.measure(budget.left)
        except OutOfTime as unfinished:
            results.end(row.key, None, stopped=None if row.resumes else had, wrote=str(unfinished))
            step.left.append(row.key)
            say(f"{row.key}: not finished in {had:.0f} s")
            return
        except Skipped as reason:
            results.end(row.key, None, skipped=str(reason))
            say(f"{row.key}: skipped: {reason}")
            return
        except Exception as error:  # one row's failure must not cost the others
            record = {"failed": f"{type(error).__name__}: {error}"}
            if step.parallel == 1 and is_fatal(error):
                dead.append(row.key)
        record["took"] = round(time.monotonic() - started, 2)
        results.end(row.key, record)
        say(f"{row.key}: {summary(record)}")

    if step.parallel == 1:
        for row in missing:
            measure(row)
    else:
        with ThreadPoolExecutor(step.parallel) as pool:
            list(pool.map(measure, missing))
    if dead:
        raise DeadDevice(dead[0])


def summary(record: Record) -> str:
    """A row in a few words."""
    if "failed" in record:
        return "FAILED: " + why(record)
    if record.get("kind") == "gpu":
        times = (f"{name} {1e3 * timing['median']:.4f} ms" for name, timing in record["variants"].items())
        return ", ".join(times)
    return record.get("summary", "done")


def why(record: Record) -> str:
    """A failed row's last line."""
    return (record["failed"].strip() or "it wrote nothing").splitlines()[-1][:200]


def failures(records: Iterable[Record]) -> list[Record]:
    """The rows that failed."""
    return [record for record in records if "failed" in record]
