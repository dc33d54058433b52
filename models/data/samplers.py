"""Which images make up the batches of an epoch."""

from __future__ import annotations

import numpy as np

SAMPLERS = ("sequential", "shuffle", "balanced", "pxk")


def epoch_batches(
    sampler: str,
    labels: np.ndarray,
    indices: np.ndarray,
    batch_size: int,
    *,
    random: np.random.Generator,
    samples_per_class: int = 4,
    drop_last: bool = False,
) -> list[np.ndarray]:
    """The indices of each batch.

    Args:
        sampler: one of `SAMPLERS`.
        labels: [N] class of each image of the store.
        indices: the images to use.
        batch_size: images of a batch, over all processes.
        random: decides the order.
        samples_per_class: K of "pxk".
        drop_last: leave out a last batch that is not full.

    Raises:
        ValueError: "pxk" with a batch that is no multiple of K, or with fewer than two classes in a batch.
    """
    if sampler == "pxk":
        return _pxk(labels, indices, batch_size, random, samples_per_class)
    if sampler == "shuffle":
        order = random.permutation(indices)
    elif sampler == "balanced":
        _, inverse, counts = np.unique(labels[indices], return_inverse=True, return_counts=True)
        odds = 1.0 / counts[inverse]
        order = random.choice(indices, size=len(indices), p=odds / odds.sum())
    else:
        order = indices
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[:-1] if drop_last and len(batches[-1]) < batch_size else batches


def _pxk(
    labels: np.ndarray, indices: np.ndarray, batch_size: int, random: np.random.Generator, samples_per_class: int
) -> list[np.ndarray]:
    """Batches of P classes with K images each, as many as fit into the images.

    Every class walks through its own images in a random order and starts again with another, so that a small class
    repeats and none is drawn twice before all its others. A class with fewer than K images repeats within a batch.
    """
    if samples_per_class < 2:
        raise ValueError(
            f"samples_per_class must be at least 2, or no batch has two images of a class; got {samples_per_class}"
        )
    classes = np.unique(labels[indices])
    per_batch, rest = divmod(batch_size, samples_per_class)
    if rest or per_batch < 2:
        raise ValueError(
            f"sampler pxk needs a batch of at least 2 x {samples_per_class} images, a multiple of samples_per_class; "
            f"got {batch_size}"
        )
    if len(classes) < 2:
        raise ValueError(f"sampler pxk needs two classes, got {len(classes)}")
    members = {int(label): indices[labels[indices] == label] for label in classes}
    waiting: dict[int, list[int]] = {label: [] for label in members}
    deck: list[int] = []
    batches = []
    for _ in range(max(1, len(indices) // batch_size)):
        chosen: list[int] = []
        while len(chosen) < per_batch:
            # No class comes twice in a batch, unless the batch has room for more than there are.
            barred = set(chosen) if len(set(chosen)) < len(classes) else set()
            place = next((place for place, label in enumerate(deck) if label not in barred), None)
            if place is None:  # all classes come once before one comes again
                deck.extend(random.permutation(classes).tolist())
            else:
                chosen.append(deck.pop(place))
        batch: list[int] = []
        for label in chosen:
            while len(waiting[label]) < samples_per_class:
                waiting[label].extend(random.permutation(members[label]).tolist())
            batch.extend(waiting[label][:samples_per_class])
            del waiting[label][:samples_per_class]
        batches.append(np.array(batch, dtype=np.int64))
    return batches
