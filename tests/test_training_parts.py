"""The parts of training that need no run: mixed batches, optimizers, schedules."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trees
from rich.console import Console
from torch import nn
from training_runs import finish, start, tiny_recipe

from cellops.models import create_model
from cellops.models.data import Fold
from cellops.models.training import optim
from cellops.models.training.apply import RunImages, _learned, load_trained
from cellops.models.training.checkpoint import CheckpointError, read_checkpoint, read_weights
from cellops.models.training.console import Output
from cellops.models.training.mixing import mix
from cellops.models.training.packing import pack, unpack
from cellops.models.training.parts import Batches
from cellops.models.training.recipe import RecipeError, dump_recipe
from cellops.models.training.run import prepare
from cellops.models.training.settings import MixingSettings, OptimizerSettings, ScheduleSettings
from cellops.models.training.tables import Row, Table, train_table


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing(size, kind):
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand(size, 3, 8, 6, generator=generator), torch.arange(size) % 3
    settings = MixingSettings(**{kind: 1.0})
    for draw in range(20):
        mixed, soft = mix(images, targets, 3, settings, (0, draw))
        again, _ = mix(images, targets, 3, settings, (0, draw))
        assert torch.equal(mixed, again)
        torch.testing.assert_close(soft.sum(1), torch.ones(size))
        share = soft[0, targets[0]].item() if size > 1 and targets[0] != targets[-1] else None
        if kind == "cutmix" and share is not None:
            kept = (mixed[0] == images[0]).all(0).float().mean().item()
            assert kept == pytest.approx(share, abs=1e-6)
        elif share is not None:
            torch.testing.assert_close(mixed[0], share * images[0] + (1 - share) * images[-1])
    middle = size // 2
    if size % 2:
        torch.testing.assert_close(mixed[middle], images[middle])


def test_mixing_by_chance():
    images, targets = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    settings = MixingSettings(mixup=1.0, probability=0.0)
    mixed, soft = mix(images, targets, 3, settings, (0,))
    assert torch.equal(mixed, images) and torch.equal(soft.argmax(1), targets)


def test_optimizers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    kinds = {}
    for name in ("sgd", "nesterov", "adam", "adamp", "nadam", "adamw"):
        optimizer = optim.build_optimizer(OptimizerSettings(name, 0.1, weight_decay=0.01), model)
        kinds[name] = type(optimizer).__name__
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.01}
        assert all(group["lr"] == 0.1 for group in optimizer.param_groups)
    assert kinds == {
        "sgd": "SGD",
        "nesterov": "SGD",
        "adam": "Adam",
        "adamp": "AdamP",
        "nadam": "NAdam",
        "adamw": "AdamW",
    }
    plain = optim.build_optimizer(OptimizerSettings("sgd", 0.1, momentum=0.8, decay_norm_and_bias=True), model)
    assert [(group["nesterov"], group["momentum"]) for group in plain.param_groups] == [(False, 0.8)]
    assert optim.build_optimizer(OptimizerSettings("nesterov", 0.1), model).param_groups[0]["nesterov"]
    with pytest.raises(RecipeError, match="did you mean 'adamw'"):
        optim.build_optimizer(OptimizerSettings("adamww", 0.1), model)
    with pytest.raises(RecipeError, match="does not take"):
        optim.build_optimizer(OptimizerSettings("adamw", 0.1, arguments={"beta": 3}), model)


def rates(settings, epochs=6, updates=10):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = optim.build_schedule(settings, optimizer, epochs, updates)
    found = []
    for update in range(epochs * updates):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(update + 1)
    return np.array(found)


def test_schedules():
    assert np.allclose(rates(ScheduleSettings("constant")), 1)
    steps = rates(ScheduleSettings("multistep", milestones=[2, 4], gamma=0.1))
    assert np.allclose(steps, np.repeat([1, 0.1, 0.01], 20))
    cosine = rates(ScheduleSettings("cosine"))
    assert np.allclose(cosine, 0.5 * (1 + np.cos(np.pi * np.arange(60) / 60)))
    warm = rates(ScheduleSettings("cosine", warmup_epochs=1))
    assert np.allclose(warm[:10], np.arange(10) / 10) and np.allclose(warm[10:], cosine[10:])
    with pytest.raises(RecipeError, match="milestones"):
        rates(ScheduleSettings("multistep"))
    assert np.allclose(rates(ScheduleSettings("constant", warmup_epochs=9))[:31], np.arange(31) / 30)


def test_layer_decay_reaches_the_rates():
    """timm leaves the factor of a layer in its group; without the schedule it would do nothing, silently."""
    model = create_model("hqnet_tiny", num_classes=3)
    optimizer = optim.build_optimizer(OptimizerSettings("adamw", 0.1, arguments={"layer_decay": 0.5}), model)
    schedule = optim.build_schedule(ScheduleSettings("cosine", warmup_epochs=1), optimizer, 4, 10)
    for update in (5, 20):
        schedule.step_update(update)
        whole = 0.1 * (0.5 if update == 5 else 0.5 * (1 + np.cos(np.pi / 2)))
        assert all(group["lr"] == pytest.approx(whole * group["lr_scale"]) for group in optimizer.param_groups)
        assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(whole)
        assert len({group["lr"] for group in optimizer.param_groups}) > 4


def test_packed_tensors(tmp_path):
    """Values, dtypes and layouts come back; what is no dense block of memory comes back contiguous."""
    dense = torch.randn(2, 3, 4, 5)
    values = {
        "channels last": dense.to(memory_format=torch.channels_last),
        "turned": dense.permute(3, 0, 2, 1),
        "every second": dense[..., ::2],
        "one value for all": torch.tensor(1.5).expand(3),
        "nested": [(torch.tensor(3), "text", None), {"empty": torch.empty(0, 2), 7: torch.tensor([True, False])}],
        "half": torch.randn(3).bfloat16(),
        "large": torch.randn(2, 3, 300, 400).to(memory_format=torch.channels_last),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    torch.save(pack(values), tmp_path / "packed.pt")
    found = unpack(torch.load(tmp_path / "packed.pt", weights_only=True))
    assert found["nested"][0][1:] == ("text", None) and found["nested"][1]["empty"].shape == (0, 2)
    assert torch.equal(found["nested"][0][0], torch.tensor(3)) and found["nested"][1][7].tolist() == [True, False]
    for name in ("channels last", "turned", "every second", "one value for all", "half", "large", "bytes"):
        assert torch.equal(found[name], values[name]) and found[name].dtype == values[name].dtype
        wanted = values[name] if name in ("channels last", "turned", "large") else values[name].contiguous()
        assert found[name].stride() == wanted.stride() and found[name].storage_offset() == 0


def test_a_packed_tensor_takes_no_memory_that_it_has_not():
    packed = pack({"a": torch.zeros(3)})
    name, offset, _, _ = packed["values"]["a"]["__tensor__"]
    packed["values"]["a"]["__tensor__"] = (name, offset, (1 << 40,), (0,))
    with pytest.raises(ValueError, match="1099511627776"):
        unpack(packed)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar(terminal):
    """Only where there is a terminal; lines are printed everywhere."""
    output, text = Output(), io.StringIO()
    output.console = Console(file=text, force_terminal=terminal, width=100, highlight=False)
    with output.bar("epoch 3", total=4) as bar:
        bar.advance("loss 0.5", 4)
    output.line("done [1]")
    assert ("epoch 3" in text.getvalue() and "4/4" in text.getvalue() and "loss 0.5" in text.getvalue()) == terminal
    assert "done [1]" in text.getvalue()


@pytest.mark.parametrize("count", [1, 3, 128, 200, 300])
def test_some_training_images_are_spread_over_all(count):
    """They lie class by class: the first half would miss the second class."""
    fold = Fold(train=tuple(range(200)), validation=(), test=())
    chosen = RunImages(SimpleNamespace(images=list), fold).training(count)
    gaps = np.diff([*chosen, 200])
    assert len(chosen) == min(count, 200) and chosen[0] == 0 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("packed", [False, True])
def test_checkpoints_of_another_version(packed, tmp_path):
    """The first format lay in the file as it was, then packed."""
    state = {"format": 1, "progress": {"epoch": 3}, "model": {}, "random": torch.zeros(3)}
    torch.save(pack(state) if packed else state, tmp_path / "last.pt")
    with pytest.raises(
        CheckpointError, match=r"last\.pt was written by an earlier version \(format 1\); train anew or"
    ):
        read_checkpoint(tmp_path / "last.pt")
    torch.save({"weights": state}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt is no checkpoint of a training run"):
        read_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize(
    ("images", "size", "synchronised", "batches"),
    [
        *((count, 1, False, batches) for count, batches in ((16, 2), (17, 2), (18, 3))),
        *((count, 4, False, batches) for count, batches in ((3, 1), (16, 2), (17, 2), (20, 2), (21, 3))),
        (17, 4, True, 2),
        (20, 4, True, 3),
    ],
)
def test_a_process_never_has_a_batch_of_one_image(images, size, synchronised, batches):
    """Batches of 8 over all processes, the last of which may be smaller."""
    fold = Fold(train=tuple(range(images)), validation=(), test=())
    recipe = tiny_recipe(training={"batch_size": 8, "sync_batch_norm": synchronised})
    labels = np.arange(images) % 3
    loader = Batches(recipe, SimpleNamespace(labels=labels), labels, 0, size).training(fold, 0)
    assert len(loader) == batches
    if images > 8 and not synchronised:
        assert min(len(draws) for draws in loader.plan()) >= 2


def same_weights(one, other):
    weights = [read_weights(folder / "weights.safetensors")[0] for folder in (one, other)]
    return all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_one_split_for_several_seeds(tmp_path, monkeypatch):
    """By data.split_seed; without it the run's seed decides on both. Resuming and evaluating honour it."""
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path / "cache"))
    data = trees.class_folders(tmp_path / "data", ("a", "b"), count=30)

    def trained(name, seed, split_seed, **limits):
        settings = {"path": str(data), "options": {"count": None, "size": None}, "train_fraction": 0.5}
        recipe = tiny_recipe(seed=seed, data={**settings, "split_seed": split_seed}, training={"epochs": 2})
        finish(start(tmp_path / name, recipe), **limits)
        return tmp_path / name

    def split(folder):
        return json.loads((folder / "folds_paper.json").read_text())["folds"]

    def used(folder):
        return [one["train"] for one in (_learned(load_trained(folder, torch.device("cpu")), folder),)]

    plain, given = trained("plain", 3, None), trained("given", 3, 3)
    assert split(plain) == split(given) and same_weights(plain, given)  # as before there was the setting
    other, alone = trained("other", 4, 3, stop_after=1), trained("alone", 4, None)
    finish(start(other, resume=True))
    assert split(other) == split(plain) != split(alone) and not same_weights(other, plain)
    assert used(other) == used(plain) != used(alone)
    assert tiny_recipe(seed=4).split_seed == 4 and tiny_recipe(seed=4, data={"split_seed": 0}).split_seed == 0
    with pytest.raises(ValueError, match=r"data\.split_seed was 3, is now 5"):
        prepare(None, other, True, Output(quiet=True), ["data.split_seed=5"])


def test_rows_of_a_table_are_trained_again_on_one_split(tmp_path, monkeypatch):
    """With another seed, and the folds of the first."""
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(data={"folds": 2, "test_fraction": None}, training={"epochs": 1}, evaluation={"worst": 0})
    (tmp_path / "tiny.yaml").write_text(dump_recipe(recipe))
    table = Table("mine", "Mine", "drawn cells", ["accuracy_micro"], [Row("tiny", "tiny.yaml")])
    for seed in (0, 1):
        changes = [f"seed={seed}", "data.split_seed=5"]
        assert train_table(table, tmp_path / str(seed), changes, "", None, None, Output(quiet=True)) == 0
    folds = [json.loads((tmp_path / seed / "tiny.yaml" / "folds_paper.json").read_text()) for seed in "01"]
    assert folds[0]["folds"] == folds[1]["folds"] and {one["seed"] for one in folds} == {5}
    assert not same_weights(*(tmp_path / seed / "tiny.yaml" / "fold_1" for seed in "01"))
