"""What a reader of a run must know beside its settings, in sentences: they are printed, and kept in run.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import nn

from cellops.models.data import Folds, ImageStore, near_duplicates, pairs_alike
from cellops.models.training.checkpoint import CheckpointError, file_hash


def look_alikes(store: ImageStore, folds: Mapping[str, Folds]) -> list[str]:
    """Sentences for each protocol that has near copies on two sides: of the test part, then of the validation part.

    Args:
        store: the images.
        folds: of them, by protocol.
    """
    pairs, notes = pairs_alike(store), []
    for protocol, cut in folds.items():
        for part, where, meaning in (
            ("test", "on the two sides of a split", ""),
            ("validation", "in training and validation part", ", which makes the choice of the epoch optimistic"),
        ):
            found = near_duplicates(store, cut, part=part, pairs=pairs)
            if found:
                examples = "; ".join(f"{one} and {other}" for one, other in found[:3])
                text = f"Protocol {protocol}: {len(found)} pairs {where} look alike ({examples}){meaning}."
                notes.append(text)
    return notes


def weight_shapes(path: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors in a safetensors file, from its header.

    Raises:
        CheckpointError: the file cannot be read; names it.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except Exception as error:
        raise CheckpointError(f"cannot read the weights {path}: {error}") from error


def start_note(model: nn.Module, path: Path, classifier: Collection[str] = ()) -> str:
    """A sentence about the file that `load_weights` started a model from.

    Args:
        model: it is not changed.
        path: of the file.
        classifier: as of `load_weights`.
    """
    own, there = model.state_dict(), weight_shapes(path)
    anew = any(there.get(name) != list(own[name].shape) for name in classifier)
    drawn = f"; its classifier does not fit, so that {' and '.join(sorted(classifier))} were drawn anew"
    return f"Training started from {path} (SHA-256 {file_hash(path)}){drawn if anew else ''}."


def unused_note(names: Sequence[str]) -> str:
    """A sentence about parameters that no loss reaches, in training by several processes."""
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(names)} parameters get no gradient ({some}): DDP looks for them in every update "
        "(find_unused_parameters), which takes time."
    )
