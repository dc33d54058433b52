"""predictions.csv: it grows batch by batch, and after a crash goes on at the last batch that is whole.

FOLDER/predictions.csv    image, predicted, confidence and the probability of every class
FOLDER/predictions.json   what the table was made with and by, the working directory that its names are relative to, and
                          how many of its bytes are good
FOLDER/unreadable.csv     the images that could not be read, with the reason; absent where there is none
FOLDER/contact_sheet.png, gradcam_sheet.png
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import re
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import cellops
from cellops.models.data.layouts.listing import check_class
from cellops.models.prediction.predictor import Name, Prediction
from cellops.models.training.checkpoint import write_text
from cellops.models.training.folder import try_lock

TABLE, STATE, UNREADABLE = "predictions.csv", "predictions.json", "unreadable.csv"
CONTACT_SHEET, GRADCAM_SHEET = "contact_sheet.png", "gradcam_sheet.png"
WRITTEN = (TABLE, STATE, UNREADABLE, CONTACT_SHEET, GRADCAM_SHEET)
FORMAT = 1
COMMIT_SECONDS = 1.0
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "onnxruntime")
# A spreadsheet computes what begins so; ./NAME is the same file.
COMPUTED = re.compile(r"[\s=+\-@\uff1d\uff0b\uff0d\uff20]")


def made_by() -> dict[str, str]:
    """The versions of what computes probabilities."""
    found = {"cellops": cellops.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class PredictionTable:
    """The results of one folder, written by one process at a time; a context manager.

    At any moment the first `committed` bytes that predictions.json names are whole batches that reached the disk;
    what follows them is written again when it is resumed.

    Args:
        folder: of the results; made where it is missing.
        classes: names of the columns.
        settings: what the probabilities depend on, as JSON can hold it.
        resume: go on with what is there; where there is nothing, begin.
        overwrite: begin anew whatever is there.

    Raises:
        ValueError: there are results and neither flag is given, or they are of other weights or settings, damaged, or
            being written by another process; or without a table there is a file of a name that is written, or the
            table is no regular file; or a class would be a formula in a spreadsheet. Nothing has been changed then.
        OSError: the table cannot be written, as on a full disk; names the file.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        settings: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        if resume and overwrite:
            raise ValueError("--resume goes on with the results in the folder, --overwrite begins anew: give one")
        for name in classes:
            check_class(name)
        self.folder, self.classes = folder, tuple(classes)
        self.settings = json.loads(json.dumps(settings))
        self.rows = self.unreadable = 0
        self.counts: Counter[str] = Counter()
        self.committed = 0
        self.directory = os.getcwd()
        """What relative names in the table are relative to."""
        self.made_by = [made_by()]
        """One for each time that other versions went on with it."""
        self._whole = 0  # bytes of the table, up to the last batch that was written to its end
        self._digests = np.empty(0, dtype="S16")
        self._time = 0.0
        self._listed: BinaryIO | None = None
        path = folder / TABLE
        if (folder / "run.json").is_file():
            raise ValueError(f"{folder} is a training run, whose own predictions lie there: choose another --output")
        if path.exists() and path.stat().st_size and not (resume or overwrite):
            raise ValueError(f"{path} is there already: --resume goes on with it, --overwrite begins anew")
        if not path.exists() and not overwrite:
            strange = next((folder / name for name in WRITTEN if (folder / name).exists()), None)
            if strange is not None:
                raise ValueError(f"{strange} is there without {TABLE}: take another --output, or --overwrite it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.is_symlink() or (path.exists() and not stat.S_ISREG(path.stat().st_mode)):
                raise ValueError(f"{path} is a link or no regular file: take another --output")
            self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")
        except OSError as error:
            raise ValueError(f"--output {folder} is no folder to write in: {error.strerror or error}") from None
        try:
            if not try_lock(self.file):
                raise ValueError(f"{path} is being written by another process")
            if resume:
                self._read_state()
            try:
                self._begin()
            except OSError as error:
                raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> PredictionTable:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        """Whether an image was in the table when it was opened, under whatever spelling of its path."""
        digest = np.array(_digest(os.path.abspath(name)), dtype="S16")
        place = int(np.searchsorted(self._digests, digest))
        return place < len(self._digests) and bool(self._digests[place] == digest)

    def add(self, rows: Sequence[Prediction]) -> None:
        """Write a batch; about once a second it is made to last through a power cut."""
        self._write([self._line(row) for row in rows])
        self.rows += len(rows)
        self.counts.update(row.predicted for row in rows)
        if time.monotonic() - self._time >= COMMIT_SECONDS:
            self.commit()

    def cannot_read(self, path: Path, reason: str) -> None:
        """List a file that cannot be read."""
        if self._listed is None:
            self._listed = (self.folder / UNREADABLE).open("wb")
            self._listed.write(_encoded([("image", "reason")]))
        self._listed.write(_encoded([(self._name(path), reason.removeprefix(f"{path}: "))]))
        self._listed.flush()
        self.unreadable += 1

    def commit(self) -> None:
        """Make the batches that are whole last, and say so in predictions.json."""
        os.fsync(self.file.fileno())
        self.committed = self._whole
        self._write_state()

    def close(self) -> None:
        """Commit, and let others write."""
        if not self.file.closed:
            try:
                self.commit()
            finally:
                self.file.close()
                if self._listed is not None:
                    self._listed.close()

    def first(self, count: int) -> list[tuple[Path, str, float]]:
        """File, class and confidence of the first rows."""
        rows = self._read(self._whole)
        next(rows)
        found = [(Path(self.directory, row[0]), row[1], float(row[2])) for row in islice(rows, count)]
        self.file.seek(self._whole)
        return found

    def _write(self, lines: Sequence[Sequence[str]]) -> None:
        self.file.write(_encoded(lines))
        self.file.flush()
        self._whole = self.file.tell()

    def _name(self, image: Name) -> str:
        """An image as the table names it: as it was given, unless that was relative to another directory."""
        if not isinstance(image, Path):
            return str(image)
        name = os.path.abspath(image) if os.getcwd() != self.directory else str(image)
        return f"./{name}" if COMPUTED.match(name) else name

    def _line(self, row: Prediction) -> list[str]:
        probabilities = (f"{value:.9g}" for value in row.probabilities.values())
        return [self._name(row.image), row.predicted, f"{row.confidence:.6f}", *probabilities]

    @property
    def _header(self) -> list[str]:
        return ["image", "predicted", "confidence", *(f"p_{name}" for name in self.classes)]

    def _begin(self) -> None:
        if not self.committed:
            self._write_state()  # first, so that whoever is killed here leaves a table of 0 good bytes
        self.file.truncate(self.committed)
        self._whole = self.file.seek(self.committed)
        (self.folder / UNREADABLE).unlink(missing_ok=True)  # they are tried again
        if not self.committed:
            self._write([self._header])
            self.commit()

    def _write_state(self) -> None:
        state = {
            "format": FORMAT,
            "made_by": self.made_by,
            "settings": self.settings,
            "directory": self.directory,
            "rows": self.rows,
            "committed": self.committed,
        }
        write_text(self.folder / STATE, json.dumps(state, indent=1))
        self._time = time.monotonic()

    def _read_state(self) -> None:
        """What is there already: the good bytes, and which images are in them.

        Raises:
            ValueError: it is of other settings, or not as it was left.
        """
        path, size = self.folder / TABLE, os.fstat(self.file.fileno()).st_size
        try:
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            kept, committed = dict(state["settings"]), int(state["committed"])
            directory = str(state.get("directory", self.directory))
            known = state["format"] == FORMAT
            earlier = [dict(one) for one in state.get("made_by", [{"cellops": state.get("cellops", "")}])]
        except FileNotFoundError:
            if size:
                raise ValueError(
                    f"{path} cannot be resumed, as {STATE} is not beside it; --overwrite begins anew"
                ) from None
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / STATE} is damaged ({error}); --overwrite begins anew") from None
        differing = [name for name in sorted({*kept, *self.settings}) if kept.get(name) != self.settings.get(name)]
        if differing or not known:
            what = ", ".join(differing) or "format"
            raise ValueError(f"{path} was made with other {what}; take another --output, or --overwrite it")
        if size < committed:
            raise ValueError(f"{path} has {size} bytes, fewer than the {committed} that were written; --overwrite it")
        self.committed = committed
        if committed:
            self.directory = directory
            self.made_by = earlier if earlier[-1:] == self.made_by else earlier + self.made_by
        self._digests = np.sort(np.fromiter(self._kept_rows(committed), dtype="S16"))

    def _kept_rows(self, committed: int) -> Iterator[bytes]:
        """Digests of the images in the good part, which are counted."""
        if not committed:
            return
        path = self.folder / TABLE
        rows = self._read(committed)
        if next(rows, None) != self._header:
            raise ValueError(f"{path} has other columns than it was written with; --overwrite begins anew")
        for row in rows:
            if len(row) != len(self._header):
                raise ValueError(f"{path}: row {self.rows + 2} is not as it was written; --overwrite begins anew")
            self.rows += 1
            self.counts[row[1]] += 1
            yield _digest(os.path.normpath(os.path.join(self.directory, row[0])))

    def _read(self, size: int) -> Iterator[list[str]]:
        """The rows of the first bytes, by the file that holds the lock: on an SMB share no other may read it."""
        self.file.seek(0)
        text = io.TextIOWrapper(_Part(self.file, size), encoding="utf-8", errors="surrogateescape", newline="")
        return csv.reader(text)


class _Part(io.RawIOBase):
    """The first bytes of a file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self.file.read(min(len(buffer), self.left))
        buffer[: len(found)] = found
        self.left -= len(found)
        return len(found)


def _digest(path: str) -> bytes:
    return hashlib.blake2b(os.fsencode(path), digest_size=16).digest()


def _encoded(lines: Sequence[Sequence[str]]) -> bytes:
    """Lines of CSV; names that are no UTF-8 keep their bytes.

    A line with what other countries' spreadsheets take for the separator has its cells in quotes.
    """
    text = io.StringIO(newline="")
    for line in lines:
        foreign = any(";" in cell or "\t" in cell for cell in line)
        csv.writer(text, quoting=csv.QUOTE_ALL if foreign else csv.QUOTE_MINIMAL).writerow(line)
    return text.getvalue().encode("utf-8", "surrogateescape")
