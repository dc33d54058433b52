"""What a run writes down while it trains: `log.csv` (one row an epoch), `log.jsonl` (every event), TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellops.models.training.checkpoint import write_text

CSV = "log.csv"
JSONL = "log.jsonl"


def _plain(value: Any) -> Any:
    """NumPy and torch scalars as Python's."""
    return value.item() if hasattr(value, "item") else str(value)


class RunLog:
    """The log of one fold.

    Args:
        folder: where the files go; None writes nothing (the other ranks of a distributed run).
        tensorboard: whether to write TensorBoard's events too.

    Raises:
        ModuleNotFoundError: TensorBoard was asked for and is not installed.
    """

    def __init__(self, folder: Path | None, tensorboard: bool = False) -> None:
        self.folder = folder
        self.writer = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._drop_torn_line(folder / JSONL)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError:
                raise ModuleNotFoundError("training.tensorboard needs TensorBoard: pip install tensorboard") from None
            self.writer = SummaryWriter(str(folder / "tensorboard"))

    @staticmethod
    def _drop_torn_line(path: Path) -> None:
        """Cut off a last line that a killed process did not finish."""
        if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)

    def restore(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make the table hold these epochs only: those that the checkpoint to go on from knows."""
        if self.folder is None:
            return
        path = self.folder / CSV
        if not rows:
            path.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        write_text(path, text.getvalue())

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to the JSONL file."""
        if self.folder is None:
            return
        line = json.dumps({"event": kind, "time": round(time.time(), 3), **values}, default=_plain)
        with open(self.folder / JSONL, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Append the row of an epoch to the table, the events and TensorBoard."""
        if self.folder is None:
            return
        path = self.folder / CSV
        fresh = not path.exists()
        with open(path, "a", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(row))
            if fresh:
                table.writeheader()
            table.writerow(row)
        self.event("epoch", **row)
        if self.writer is not None:
            for name, value in row.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, row["epoch"])
            self.writer.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.writer is not None:
            self.writer.close()


def read_log(folder: Path) -> list[dict[str, float]]:
    """The epochs of a log as numbers; an empty field is NaN."""
    path = folder / CSV
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
