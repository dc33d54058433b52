"""The image store and the loader: complete or absent, and the same batches whoever makes them."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trees
from torch import Tensor

from cellops.models.data import BatchLoader, CellData, ImageError, ImageStore, build_augmentation, open_data
from cellops.models.data import store as stores
from cellops.models.data.samplers import epoch_batches
from cellops.models.data.store import resized


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> tuple[CellData, ImageStore]:
    """60 drawn cells and their store."""
    data = open_data("synthetic", count=60, size=40)
    return data, ImageStore.open(data, (24, 28), folder=tmp_path_factory.mktemp("store"))


VARIED: dict[str, Any] = {"rotation": 180, "horizontal_flip": 0.5, "erasing": {"probability": 0.5}}


def loader_of(cells: tuple[CellData, ImageStore], **options: Any) -> BatchLoader:
    """A loader of all cells, augmented."""
    data, store = cells
    arguments = {"indices": range(len(data)), "batch_size": 8, "seed": 3, "sampler": "shuffle", **options}
    augmentation = arguments.pop("augmentation", build_augmentation(VARIED, (24, 28), True))
    return BatchLoader(store, data.labels, augmentation=augmentation, **arguments)


def test_store_holds_the_resized_images(tmp_path: Path) -> None:
    data = open_data(trees.pbc(tmp_path / "data", count=3))
    calls: list[tuple[int, int]] = []
    folder = tmp_path / "store"
    store = ImageStore.open(
        data, (16, 18), folder=folder, progress=lambda done, total: calls.append((done, total)), workers=3
    )
    assert len(store) == 24 and store.size == (16, 18) and calls == [(done, 24) for done in range(1, 25)]
    for index in (0, 11, 23):
        np.testing.assert_array_equal(store[index], resized(data.read(index), (16, 18), "squash"))
    assert [path.suffix for path in folder.iterdir()] == [".npy"]
    calls.clear()
    again = ImageStore.open(data, (16, 18), folder=folder, progress=lambda done, total: calls.append((done, total)))
    assert not calls and again.path == store.path
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store))[5], store[5])


def test_store_is_of_these_files_in_this_state(tmp_path: Path) -> None:
    root = trees.pbc(tmp_path / "data", count=2)
    data = open_data(root)
    first = ImageStore.open(data, (16, 16), folder=tmp_path / "store")
    assert ImageStore.open(data, (16, 20), folder=tmp_path / "store").path != first.path
    assert ImageStore.open(data, (16, 16), folder=tmp_path / "store", resize="pad").path != first.path
    changed = trees.write(root / "basophil" / "BA_000000.jpg", trees.picture(77))
    os.utime(changed, ns=(1, 1))
    second = ImageStore.open(open_data(root), (16, 16), folder=tmp_path / "store")
    assert second.path != first.path and not np.array_equal(second[0], first[0])
    assert len(ImageStore.open(data.without([data.samples[0].id]), (16, 16), folder=tmp_path / "store")) == 15


def test_resizing() -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :10], wide[:, 10:30], wide[:, 30:] = 50, 200, 50
    assert resized(wide, (20, 20), "squash")[10, [1, 10, 18], 0].tolist() == [50, 200, 50]
    assert (resized(wide, (20, 20), "crop")[..., 0] > 180).all()
    padded = resized(wide, (20, 20), "pad")
    assert (padded[:4] == 50).all() and (padded[-4:] == 50).all() and padded[10, 10, 0] > 180
    assert resized(wide, (31, 7), "pad").shape == resized(wide, (31, 7), "crop").shape == (31, 7, 3)


def test_wrong_stores_are_named(tmp_path: Path) -> None:
    data = open_data(trees.pbc(tmp_path / "data", count=2))
    for size, resize, message in (
        ((16, 16), "stretch", "resize must be one of squash, crop, pad"),
        ((0, 16), "squash", "size must be"),
        ((16, 5000), "squash", "size must be"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageStore.open(data, size, folder=tmp_path / "store", resize=resize)
    (tmp_path / "data" / "ig" / "IG_000001.jpg").write_text("no image")
    with pytest.raises(ImageError, match=r"IG_000001.jpg: not an image"):
        ImageStore.open(open_data(tmp_path / "data"), (16, 16), folder=tmp_path / "store")
    assert not list((tmp_path / "store").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        ImageStore.open(data, (16, 16), folder=tmp_path / "file")


def test_full_disk_leaves_nothing_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(trees.pbc(tmp_path / "data", count=2))

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(stores.os, "fsync", full)
        with pytest.raises(
            OSError, match=r"cannot write the image store .* MiB\): No space left.*CELLOPS_CACHE"
        ) as error:
            ImageStore.open(data, (16, 16), folder=tmp_path / "store")
    assert error.value.errno == errno.ENOSPC and not list((tmp_path / "store").iterdir())
    assert len(ImageStore.open(data, (16, 16), folder=tmp_path / "store")) == 16


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a device that is always full")
def test_really_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written through a file that the kernel refuses to grow, as on a full disk."""
    data = open_data("synthetic", count=40, size=64)
    real = Path.open

    def open_full(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return real(Path("/dev/full") if self.suffix == ".tmp" else self, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match="No space left on device"):
        ImageStore.open(data, (64, 64), folder=tmp_path)
    assert not list(tmp_path.iterdir())


SLOW_STORE = """
import sys, time
from pathlib import Path
from cellops.models.data import ImageStore, open_data
data = open_data("synthetic", count=40, size=32)
print("ready", flush=True)
ImageStore.open(data, (16, 16), folder=Path(sys.argv[1]), workers=0, progress=lambda done, total: time.sleep(0.02))
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    """What a killed process leaves is never taken for a store; it is removed a day later."""
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_STORE, str(tmp_path)], stdout=subprocess.PIPE, env=environment, cwd=root
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".tmp"
    data = open_data("synthetic", count=40, size=32)
    assert len(ImageStore.open(data, (16, 16), folder=tmp_path)) == 40 and left.exists()
    os.utime(left, (1, 1))
    ImageStore.open(data, (16, 20), folder=tmp_path)
    assert not left.exists()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path / "mine"))
    data = open_data("synthetic", count=10, size=32)
    assert ImageStore.open(data, (16, 16)).path.parent == tmp_path / "mine" / "images"
    monkeypatch.delenv("CELLOPS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert stores.cache_folder() == tmp_path / "cellops"


def same(left: Any, right: Any) -> bool:
    """Whether two batches are bit for bit the same."""
    return all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in ("images", "targets", "index", "valid")
    )


def test_batches(cells: tuple[CellData, ImageStore]) -> None:
    data, _ = cells
    loader = loader_of(cells)
    batches = list(loader)
    assert len(batches) == len(loader) == 8 and [len(batch) for batch in batches] == [8] * 7 + [4]
    assert batches[0].images.shape == (8, 3, 24, 28) and batches[0].images.dtype == torch.float32
    index = torch.cat([batch.index for batch in batches])
    assert index.dtype == torch.int64 and sorted(index.tolist()) == list(range(60)) != index.tolist()
    assert torch.cat([batch.targets for batch in batches]).tolist() == data.labels[index].tolist()
    assert all(batch.valid.all() for batch in batches)
    assert len(loader_of(cells, drop_last=True)) == 7
    plain = loader_of(cells, sampler="sequential", indices=[7, 3, 5], batch_size=2)
    assert [batch.index.tolist() for batch in plain] == [[7, 3], [5]]


@pytest.mark.parametrize("sampler", ["sequential", "shuffle", "balanced", "pxk"])
def test_same_batches_again_and_from_any_step(cells: tuple[CellData, ImageStore], sampler: str) -> None:
    loader = loader_of(cells, sampler=sampler)
    loader.set_epoch(4)
    whole = list(loader)
    other = loader_of(cells, sampler=sampler)
    other.set_epoch(2)
    before = list(other)
    other.set_epoch(4)
    for step in range(len(whole) + 1):
        assert all(itertools.starmap(same, zip(other.batches_from(step), whole[step:], strict=True)))
    if sampler != "sequential":
        assert [batch.index.tolist() for batch in before] != [batch.index.tolist() for batch in whole]
    assert not any(torch.equal(a.images, b.images) for a, b in zip(before, whole, strict=True))
    with pytest.raises(ValueError, match="step must be from 0 to"):
        loader.batches_from(len(whole) + 1)


def test_workers_make_the_same_batches(cells: tuple[CellData, ImageStore]) -> None:
    here, there = loader_of(cells, sampler="balanced"), loader_of(cells, sampler="balanced", workers=2)
    for epoch in (0, 1):
        for loader in (here, there):
            loader.set_epoch(epoch)
        for step in (0, 3):
            random = torch.get_rng_state()
            assert all(itertools.starmap(same, zip(here.batches_from(step), there.batches_from(step), strict=True)))
            assert torch.equal(torch.get_rng_state(), random)  # which dropout draws from


def test_an_image_looks_the_same_in_any_batch(cells: tuple[CellData, ImageStore]) -> None:
    """The draws depend on seed, epoch, index and repetition, not on order, batch size or what came before."""

    def pictures(**options: Any) -> dict[int, Tensor]:
        loader = loader_of(cells, **options)
        loader.set_epoch(1)
        return {int(i): image for batch in loader for i, image in zip(batch.index, batch.images, strict=True)}

    shuffled, ordered = pictures(), pictures(sampler="sequential", batch_size=5)
    assert all(torch.equal(shuffled[index], ordered[index]) for index in range(60))
    assert not torch.equal(pictures(seed=4)[0], ordered[0])
    repeated = loader_of(cells, sampler="balanced", indices=[0, 1, 2, 3, 4], batch_size=5)
    repeated.set_epoch(2)
    (batch,) = repeated
    twice = next(index for index, count in Counter(batch.index.tolist()).items() if count > 1)
    first, second = [image for index, image in zip(batch.index, batch.images, strict=True) if index == twice][:2]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("sampler", ["sequential", "shuffle", "balanced", "pxk"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_each_step(cells: tuple[CellData, ImageStore], sampler: str, world_size: int) -> None:
    """Together the valid images of a step are those that one process would have taken."""
    options = {"sampler": sampler, "indices": range(55)}
    alone = list(loader_of(cells, batch_size=8 * world_size, **options))
    parts = [list(loader_of(cells, rank=rank, world_size=world_size, **options)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {len(alone)}
    for step, batch in enumerate(alone):
        shares = [part[step] for part in parts]
        assert len({len(share) for share in shares}) == 1
        kept = torch.cat([share.index[share.valid] for share in shares])
        assert sorted(kept.tolist()) == sorted(batch.index.tolist())
        invalid = sum(int((~share.valid).sum()) for share in shares)
        assert invalid == sum(map(len, shares)) - len(batch) < world_size
        pictures = {int(i): image for share in shares for i, image in zip(share.index, share.images, strict=True)}
        if sampler in ("sequential", "shuffle"):
            assert all(torch.equal(pictures[int(i)], im) for i, im in zip(batch.index, batch.images, strict=True))


def test_balanced_classes_are_equally_frequent() -> None:
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    random = np.random.default_rng(0)
    batches = epoch_batches("balanced", labels, np.arange(1000), 50, random=random)
    drawn = np.bincount(labels[np.concatenate(batches)])
    assert drawn.sum() == 1000 and drawn.min() > 270


@pytest.mark.parametrize(("classes", "per_batch"), [(5, 3), (5, 5), (3, 4)])
def test_pxk_batches(classes: int, per_batch: int) -> None:
    sizes = [40, 30, 20, 10, 2][:classes]
    labels = np.repeat(np.arange(classes), sizes)
    batches = epoch_batches(
        "pxk", labels, np.arange(len(labels)), 4 * per_batch, random=np.random.default_rng(1), samples_per_class=4
    )
    assert len(batches) == len(labels) // (4 * per_batch)
    for batch in batches:
        counts = Counter(labels[batch].tolist())
        assert set(counts.values()) == ({4} if per_batch <= classes else {4, 8})
        assert len(counts) == min(per_batch, classes)
    seen = np.bincount(labels[np.concatenate(batches)], minlength=classes)
    assert seen.max() - seen.min() <= 4  # classes take turns, whatever their size
    walked = [index for batch in batches for index in batch.tolist() if labels[index] == 0]
    assert len(set(walked)) == len(walked)  # none twice before all others of its class


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"sampler": "random"}, "sampler must be one of sequential, shuffle, balanced, pxk"),
        ({"workers": -1}, "workers must not be negative"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"indices": []}, "indices: no images to load"),
        ({"indices": [60]}, "indices must be from 0 to 59, got 60 to 60"),
        ({"indices": [1, 2], "drop_last": True}, "batch_size 8 x 1 processes leaves no batch of 2 images"),
        ({"sampler": "pxk", "batch_size": 6}, "pxk needs a batch of at least 2 x 4 images, a multiple"),
        ({"sampler": "pxk", "batch_size": 4}, "pxk needs a batch of at least 2 x 4 images"),
        ({"sampler": "pxk", "samples_per_class": 1}, "samples_per_class must be at least 2"),
        ({"sampler": "pxk", "indices": [0]}, "pxk needs two classes, got 1"),
    ],
)
def test_wrong_arguments_are_named(cells: tuple[CellData, ImageStore], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader_of(cells, **options)
