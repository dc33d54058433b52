"""What a person sees: lines, and a progress bar where the output is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """One task of a progress bar; does nothing where there is no terminal."""

    def __init__(self, progress: Progress | None, task: Any = None) -> None:
        self.progress, self.task = progress, task

    def advance(self, text: str = "", steps: int = 1) -> None:
        """Move on by some steps and show a text at the right."""
        if self.progress is not None:
            self.progress.update(self.task, advance=steps, text=text)


class Output:
    """The console of a run.

    Args:
        quiet: print nothing (the other ranks of a distributed run, tests).
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line; brackets in it are plain text."""
        self.console.print(text, style=style, markup=False)

    @contextmanager
    def bar(self, title: str, total: int | None, done: int = 0) -> Iterator[Bar]:
        """A progress bar that vanishes when it is done; without a total it counts."""
        if not self.console.is_terminal or self.console.quiet:
            yield Bar(None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.console, transient=True, refresh_per_second=5) as progress:
            yield Bar(progress, progress.add_task(title, total=total, completed=done, text=""))

    @contextmanager
    def counter(self, title: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """A progress bar for work that calls back with (done, total)."""
        with self.bar(title, total) as bar:
            before = 0

            def show(done: int, _: int) -> None:
                nonlocal before
                bar.advance(steps=done - before)
                before = done

            yield show
