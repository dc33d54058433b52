"""One file for each command of `cellops`: its arguments, its examples, and `run`, which returns the exit code.

These files import nothing heavy at the top, so that `cellops --help` and `cellops doctor` start at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130

# Module of the [models] extra -> its name for pip.
NEEDED = {
    "yaml": "pyyaml",
    "rich": "rich",
    "timm": "timm",
    "torchvision": "torchvision",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "PIL": "pillow",
}


class CommandError(Exception):
    """What a command ends with; printed without a traceback.

    Args:
        text: what is wrong and what to do.
        code: the exit code.
    """

    def __init__(self, text: str, code: int = BAD_INPUT) -> None:
        super().__init__(text)
        self.code = code


def not_empty(text: str) -> str:
    """What an argument names; an empty one, as of a shell's variable without a value, is not the working directory.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def given_path(text: str) -> Path:
    """A path of the command line; see `not_empty`."""
    return Path(not_empty(text))


def need_models_extra() -> None:
    """Say at once which packages of the [models] extra are missing."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise CommandError(f"this command needs {', '.join(missing)}: pip install 'cellops[models]'")


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn the errors of reading and checking input into a CommandError with exit code 2."""
    from cellops.models.training.checkpoint import CheckpointError

    try:
        yield
    except (ValueError, TypeError, OverflowError, OSError, ModuleNotFoundError, CheckpointError) as error:
        if os.environ.get("CELLOPS_TRACEBACK"):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name in NEEDED:
            need_models_extra()
        raise CommandError(str(error) or type(error).__name__) from error


def report_errors(name: str, run: Callable[[], int]) -> int:
    """Call a command; print a CommandError as one line and return its exit code."""
    try:
        return run()
    except CommandError as error:
        print(f"cellops {name}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"cellops {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
