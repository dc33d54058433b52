"""`cellops predict`: any number of images to a table that can be resumed, by this machine or by Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from cellops.models.prediction.files import Found, image_files
from cellops.models.prediction.predictor import BATCH_SIZE, Prediction, Predictor
from cellops.models.prediction.table import CONTACT_SHEET, GRADCAM_SHEET, TABLE, UNREADABLE, WRITTEN, PredictionTable
from cellops.models.training.checkpoint import CheckpointError
from cellops.models.training.console import Output

ENGINES = ("local", "ray")


class Unfinished(RuntimeError):
    """A job that began and could not go on, as on a full disk; what it committed before is kept."""


@dataclass(frozen=True)
class Settings:
    """How a job is done; none of it but `tta` changes a probability by more than rounding.

    Attributes:
        tta: views of each image; None for the recipe's.
        batch_size: images at a time.
        resume: go on with the results that the folder holds.
        overwrite: replace them.
        sheet: images on the contact sheet; 0 for none.
        gradcam: images on the sheet of Grad-CAMs; 0 for none.
        engine: "local" or "ray".
        address: of a running Ray cluster; None starts Ray on this machine.
        workers: processes of Ray; None is one a core of the cluster.
    """

    tta: str | None = None
    batch_size: int = BATCH_SIZE
    resume: bool = False
    overwrite: bool = False
    sheet: int = 64
    gradcam: int = 0
    engine: str = "local"
    address: str | None = None
    workers: int | None = None

    def check(self) -> None:
        """Raise ValueError, naming the argument, for a value that is out of range."""
        from cellops.models.prediction.sheets import MOST

        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        for name, value in (("--sheet", self.sheet), ("--gradcam", self.gradcam)):
            if not 0 <= value <= MOST:
                raise ValueError(f"{name} must be from 0 to {MOST}, got {value}")
        if self.engine not in ENGINES:
            raise ValueError(f"--engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.engine != "ray" and (self.address is not None or self.workers is not None):
            raise ValueError("--address and --workers are of --engine ray")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")


def predict_images(run: Path, images: Sequence[Path], folder: Path, settings: Settings, output: Output) -> int:
    """Classify images: predictions.csv, contact_sheet.png and, where some cannot be read, unreadable.csv.

    Args:
        run: what `Predictor.load` takes.
        images: files and folders.
        folder: where the results go.
        settings: how.
        output: for progress and the summary.

    Returns:
        How many files cannot be read.

    Raises:
        ValueError: an argument is wrong, the run or a path does not exist, or the results in the folder are in the way.
        CheckpointError: the weights are damaged.
        Unfinished, EngineError: after the results were begun.
    """
    settings.check()
    files = image_files(images, leave_out=[folder / name for name in WRITTEN])
    predictor = Predictor.load(run, settings.tta)
    if settings.gradcam:
        from cellops.models.prediction.sheets import check_gradcam

        check_gradcam(predictor)
    with _engine(settings), _begun(folder, predictor, settings) as table:
        before = table.rows
        if before:
            output.line(f"{before} images are in {folder / TABLE} already")
        todo = (found for found in files if str(found[0]) not in table)
        with output.bar("predicting", None) as bar:
            for batch in _batches(predictor, run, todo, table, settings):
                table.add(batch)
                bar.advance(steps=len(batch))
        table.commit()
        _sheets(predictor, table, settings)
        _tell(predictor, table, before, output)
        return table.unreadable


@contextmanager
def _begun(folder: Path, predictor: Predictor, settings: Settings) -> Iterator[PredictionTable]:
    """The table, closed at the end; what its input cannot be blamed for is told from bad input."""
    try:
        with PredictionTable(
            folder, predictor.classes, predictor.settings, settings.resume, settings.overwrite
        ) as table:
            yield table
    except (OSError, CheckpointError) as error:
        raise Unfinished(str(error) or type(error).__name__) from error


def _engine(settings: Settings) -> AbstractContextManager[None]:
    if settings.engine == "local":
        return nullcontext()
    from cellops.models.prediction.on_ray import ray_cluster

    return ray_cluster(settings.workers, settings.address)


def _batches(
    predictor: Predictor, run: Path, todo: Iterator[Found], table: PredictionTable, settings: Settings
) -> Iterator[list[Prediction]]:
    if settings.engine == "local":
        return predictor.batches(todo, settings.batch_size, table.cannot_read)
    from cellops.models.prediction.on_ray import ray_batches

    return ray_batches(
        predictor,
        run,
        todo,
        unreadable=table.cannot_read,
        workers=settings.workers,
        batch_size=settings.batch_size,
    )


def _sheets(predictor: Predictor, table: PredictionTable, settings: Settings) -> None:
    from cellops.models.prediction.sheets import write_contact_sheet, write_gradcam_sheet

    if settings.sheet:
        write_contact_sheet(table.first(settings.sheet), table.folder / CONTACT_SHEET)
    if settings.gradcam:
        write_gradcam_sheet(predictor, table.first(settings.gradcam), table.folder / GRADCAM_SHEET)


def _tell(predictor: Predictor, table: PredictionTable, before: int, output: Output) -> None:
    if table.unreadable:
        seen = table.rows + table.unreadable
        output.line(
            f"{table.unreadable} of {seen} images cannot be read, see {table.folder / UNREADABLE}", style="yellow"
        )
    for name in predictor.classes:
        output.line(f"  {name:<32}{table.counts[name]:>7}")
    if predictor.synthetic:
        output.line("warning: this network was trained on SYNTHETIC images", style="yellow")
    new = f", {table.rows - before} of them new" if before else ""
    output.line(f"{table.rows} images{new} -> {table.folder / TABLE}", style="bold")
