"""Checkpoints and weights that survive a crash: written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import secrets
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cellops.models.training.packing import pack, unpack

FORMAT = 2
LAST = "last.pt"
PREVIOUS = "previous.pt"
BEST = "best.safetensors"


class CheckpointError(RuntimeError):
    """A file that could not be written or read; names it and says what is left."""


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder last through a power failure, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # what some shares say of any folder
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` with a temporary file beside `path`, flush it to the disk and rename it to `path`.

    Raises:
        CheckpointError: writing failed, for example because the disk is full; `path` is as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Containers that share a folder have processes of one number; "x" takes no file or link that is there already.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except Exception as error:
        # torch's zip writer hides the system's error in a RuntimeError of its own; the first cause tells more.
        cause: BaseException = error
        while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        kept = "the earlier one is untouched" if path.exists() else "nothing was there before"
        raise CheckpointError(f"cannot write {path}: {cause} ({kept})") from error
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def save_checkpoint(folder: Path, state: Mapping[str, Any], keep_previous: bool = True) -> None:
    """Write `last.pt`; the one before becomes `previous.pt`. At every moment one of them is whole.

    What a killed process left half written is removed: a folder has one that writes.

    Raises:
        CheckpointError: see `write_atomically`.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    link = folder / f".{PREVIOUS}.tmp"
    for left in folder.glob(f".{LAST}.*.tmp"):
        left.unlink(missing_ok=True)

    def write(file: BinaryIO) -> None:
        torch.save(pack(state), file)
        if keep_previous and last.exists():
            link.unlink(missing_ok=True)
            try:
                os.link(last, link)
            except OSError:  # a file system without hard links: exFAT, some network shares
                shutil.copyfile(last, link)
            os.replace(link, previous)

    write_atomically(last, write)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU, tensors and plain values only.

    Raises:
        CheckpointError: the file is missing, truncated, of another kind or of another version's format; names it.
    """
    if not path.is_file():  # a pipe would be read for ever
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("its parts are compressed, which torch does not do")
        packed = torch.load(path, map_location="cpu", weights_only=True)
        values = packed.get("values", packed) if isinstance(packed, dict) else {}  # the first ones were not packed
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, which could run a program, or is damaged; it is not read"
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error
    if not isinstance(values, dict) or not {"format", "progress"} <= values.keys():
        raise CheckpointError(f"{path} is no checkpoint of a training run")
    if (version := values["format"]) != FORMAT:
        when = "an earlier" if isinstance(version, int) and version < FORMAT else "a later"
        raise CheckpointError(
            f"the checkpoint {path} was written by {when} version (format {version}); train anew or with that version"
        )
    try:
        return unpack(packed)
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(f"the checkpoint {path} ({path.stat().st_size} bytes) is damaged or truncated: {reason}")


def made_of(seed: int, classes: Any, images: Iterable[tuple[str, int]]) -> str:
    """SHA-256 of what makes a training the one that it is: its seed, its classes and its images with their labels."""
    return hashlib.sha256(json.dumps([seed, classes, sorted(images)]).encode()).hexdigest()


def latest_checkpoint(folder: Path, made: str = "") -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that can be read (None if there is no file at all), and what was wrong with newer ones.

    Args:
        folder: of the checkpoints.
        made: what `made_of` says of the training; those of versions that did not keep it are taken too.

    Raises:
        CheckpointError: there are files, and none can be read, or the newest is of another training.
    """
    problems: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            try:
                state = read_checkpoint(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if made and state.get("made_of", made) != made:
                raise CheckpointError(f"the checkpoint {path} is of another run: of another seed, classes or images")
            return state, problems
    if problems:
        raise CheckpointError("; ".join(problems))
    return None, []


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write weights as safetensors, with facts about them in the header.

    Args:
        path: the file.
        weights: a state dict.
        metadata: plain values, kept as JSON texts.

    Raises:
        CheckpointError: see `write_atomically`.
    """
    from safetensors.torch import save

    # A clone each: safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    header = {name: json.dumps(value) for name, value in metadata.items()}
    parts = _in_order(save(tensors, header))
    write_atomically(path, lambda file: file.writelines(parts))


def _in_order(data: bytes) -> tuple[bytes, memoryview]:
    """The header of a safetensors file with its facts in the order of their names, and the tensors, not copied.

    The library writes facts in another order each time, and two runs that agree to the last bit should have one
    checksum.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format keeps tensors at multiples of 8
    return len(text).to_bytes(8, "little") + text, memoryview(data)[8 + length :]


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a safetensors file, and the facts in its header.

    Raises:
        CheckpointError: the file is missing, truncated or of another kind; names it.
    """
    return _read(path, True)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts in the header of a safetensors file, without its tensors.

    Raises:
        CheckpointError: see `read_weights`.
    """
    return _read(path, False)[1]


def _read(path: Path, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no file of weights {path}")
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in (file.keys() if tensors else ())}
            header = file.metadata() or {}
    except Exception as error:
        raise CheckpointError(
            f"the weights {path} ({path.stat().st_size} bytes) are damaged or truncated: {error}"
        ) from error
    facts = {}
    for name, text in header.items():
        try:
            facts[name] = json.loads(text)
        except (ValueError, RecursionError):  # weights of another program
            facts[name] = text
    return weights, facts


def load_weights(model: torch.nn.Module, path: Path, classifier: Collection[str] = ()) -> dict[str, Any]:
    """Put the weights of a file into a model and return the header's facts.

    Args:
        model: it is changed.
        path: of the file.
        classifier: names of tensors that stay as they are where the file has none, or has those of another number of
            classes.

    Raises:
        CheckpointError: the file cannot be read, holds the weights of another network, or values that are no numbers.
    """
    weights, facts = read_weights(path)
    own = model.state_dict()
    if _unfit(own, weights, classifier):
        weights |= {name: own[name] for name in classifier}
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    both = sorted(own.keys() & weights.keys())
    shapes = [name for name in both if own[name].shape != weights[name].shape]
    kinds = [name for name in both if own[name].is_floating_point() != weights[name].is_floating_point()]
    if missing or unknown or shapes or kinds:
        faults = {"missing": missing, "unknown": unknown, "of another shape": shapes, "of another type": kinds}
        told = [f"{len(names)} {what}, the first {names[0]}" for what, names in faults.items() if names]
        raise CheckpointError(f"{path} holds the weights of another network: {'; '.join(told)}")
    if nans := [name for name in both if weights[name].is_floating_point() and weights[name].isnan().any()]:
        raise CheckpointError(f"{path}: {len(nans)} of {len(own)} tensors hold NaN, the first {nans[0]}")
    model.load_state_dict(weights)
    return facts


def _unfit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], classifier: Collection[str]) -> bool:
    """Whether a file's classifier cannot be taken over."""
    return any(name not in weights or own[name].shape != weights[name].shape for name in classifier)
