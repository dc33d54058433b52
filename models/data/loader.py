"""Batches in an order, and with augmentations, that depend on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cellops.models.data.samplers import SAMPLERS, epoch_batches
from cellops.models.data.store import ImageStore

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass
class Batch:
    """Images for one step.

    Attributes:
        images: float32 [N, 3, H, W].
        targets: int64 [N].
        index: int64 [N], into the data set's samples.
        valid: bool [N]; False for a repetition that fills the last batch of several processes.
    """

    images: Tensor
    targets: Tensor
    index: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return len(self.targets)


class Draw(NamedTuple):
    """One image of an epoch: what its augmentation depends on, and whether it counts."""

    epoch: int
    image: int  # its index in the store
    repeat: int  # how often the image came before in this epoch
    valid: bool


class _Images(Dataset[Batch]):
    """Makes batches of draws, in this process or in a worker."""

    def __init__(self, store: ImageStore, labels: np.ndarray, augmentation: Augmentation, seed: int) -> None:
        self.store = store
        self.labels = labels
        self.augmentation = augmentation
        self.seed = seed

    def __getitems__(self, draws: list[Draw]) -> Batch:
        generator = torch.Generator()
        images = []
        for draw in draws:
            # SeedSequence spreads neighbouring numbers; torch's own seeding of similar numbers draws similar ones.
            words = np.random.SeedSequence((self.seed, draw.epoch, draw.image, draw.repeat)).generate_state(
                1, np.uint64
            )
            generator.manual_seed(int(words[0] >> np.uint64(1)))
            pixels = torch.from_numpy(np.array(self.store[draw.image])).permute(2, 0, 1)
            images.append(self.augmentation(pixels, generator))
        index = torch.tensor([draw.image for draw in draws])
        return Batch(
            images=torch.stack(images),
            targets=torch.from_numpy(self.labels[index.numpy()]),
            index=index,
            valid=torch.tensor([draw.valid for draw in draws]),
        )


class _Plan:
    """The batches that the workers are to make next."""

    def __init__(self) -> None:
        self.batches: Sequence[list[Draw]] = ()

    def __iter__(self) -> Iterator[list[Draw]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _same(batch: Any) -> Any:
    return batch


class BatchLoader:
    """Iterates over batches of a store.

    What an image looks like depends on (seed, epoch, index, how often the index came before in the epoch) only, not on
    workers, on the batch size or on where the epoch was resumed.

    Args:
        store: the images.
        labels: [len(store)] class of each image of the store.
        indices: the images to use, as positions in the store.
        batch_size: images of a batch in this process.
        augmentation: see `build_augmentation`.
        seed: of order and augmentation.
        sampler: "sequential"; "shuffle"; "balanced" draws with replacement so that classes are equally frequent; "pxk"
            puts `samples_per_class` images of each of `batch_size / samples_per_class` classes in every batch.
        samples_per_class: K of "pxk".
        drop_last: leave out a last batch that is not full.
        workers: processes that prepare batches ahead; 0 prepares them here.
        rank, world_size: this process among those that share each step; together they see every image, those that fill
            up the last step marked in `Batch.valid`.

    Raises:
        ValueError: an argument is out of range, or the sampler cannot serve these labels.
    """

    def __init__(
        self,
        store: ImageStore,
        labels: Sequence[int] | np.ndarray,
        indices: Sequence[int],
        batch_size: int,
        augmentation: Augmentation,
        *,
        seed: int,
        sampler: str = "sequential",
        samples_per_class: int = 4,
        drop_last: bool = False,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.indices = np.asarray(indices, dtype=np.int64)
        if len(self.labels) != len(store):
            raise ValueError(f"labels: {len(self.labels)} for {len(store)} images")
        if not len(self.indices):
            raise ValueError("indices: no images to load")
        if self.indices.min() < 0 or self.indices.max() >= len(store):
            raise ValueError(
                f"indices must be from 0 to {len(store) - 1}, got {self.indices.min()} to {self.indices.max()}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.batch_size = batch_size
        self.seed = seed
        self.sampler = sampler
        self.samples_per_class = samples_per_class
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._images = _Images(store, self.labels, augmentation, seed)
        self._planned: tuple[int, list[list[Draw]]] | None = None
        self._plan = _Plan()
        self._workers: DataLoader[Batch] | None = None
        if workers:
            self._workers = DataLoader(
                self._images,
                batch_sampler=self._plan,  # type: ignore[arg-type]
                num_workers=workers,
                collate_fn=_same,
                persistent_workers=True,
                generator=torch.Generator(),  # it draws seeds for its workers, else from the numbers that dropout takes
            )
        if not self.plan():
            raise ValueError(
                f"batch_size {batch_size} x {world_size} processes leaves no batch of {len(self.indices)} images"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that order and augmentation depend on."""
        self.epoch = epoch

    def plan(self) -> list[list[Draw]]:
        """The draws of every batch of this epoch, for this process."""
        if self._planned is None or self._planned[0] != self.epoch:
            batches = epoch_batches(
                self.sampler,
                self.labels,
                self.indices,
                self.batch_size * self.world_size,
                random=np.random.default_rng((self.seed, self.epoch)),
                samples_per_class=self.samples_per_class,
                drop_last=self.drop_last,
            )
            self._planned = self.epoch, [self._share(batch) for batch in self._drawn(batches)]
        return self._planned[1]

    def _drawn(self, batches: list[np.ndarray]) -> Iterator[list[Draw]]:
        before: dict[int, int] = {}
        for batch in batches:
            draws = []
            for index in batch.tolist():
                draws.append(Draw(self.epoch, index, before.get(index, 0), True))
                before[index] = before.get(index, 0) + 1
            yield draws

    def _share(self, draws: list[Draw]) -> list[Draw]:
        """This process's part of a step: every world_size-th image, so that each part has a like mix."""
        lacking = -len(draws) % self.world_size
        filled = draws + [draws[place % len(draws)]._replace(valid=False) for place in range(lacking)]
        return filled[self.rank :: self.world_size]

    def __len__(self) -> int:
        return len(self.plan())

    def __iter__(self) -> Iterator[Batch]:
        return self.batches_from(0)

    def batches_from(self, step: int) -> Iterator[Batch]:
        """The batches of this epoch from number `step` on, the same as if those before had been taken.

        Raises:
            ValueError: the epoch has no such step.
        """
        plan = self.plan()
        if not 0 <= step <= len(plan):
            raise ValueError(f"step must be from 0 to {len(plan)}, got {step}")
        if self._workers is None:
            return map(self._images.__getitems__, plan[step:])
        self._plan.batches = plan[step:]
        return iter(self._workers)
