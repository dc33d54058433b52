"""Training: what resumes is what would have been, and nothing that goes wrong costs more than the last minutes."""

from __future__ import annotations

import json
import random
import resource
import time

import numpy as np
import pytest
import torch
from torch import nn
from training_runs import (
    child,
    differences,
    finish,
    start,
    state,
    tiny_recipe,
)

from cellops.models.training.checkpoint import (
    CheckpointError,
    load_weights,
    read_checkpoint,
    read_weights,
    save_checkpoint,
    save_weights,
)
from cellops.models.training.evaluate import Predictions
from cellops.models.training.log import RunLog, read_log
from cellops.models.training.loop import NonFiniteLoss
from cellops.models.training.metrics import bootstrap_intervals
from cellops.models.training.stopping import Interrupted


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Stores of images in one place for all tests of this file."""
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))
        finish(start(folder))
    return folder


def predictions(folder):
    return (folder / "predictions.csv").read_bytes()


def same_run(folder, whole):
    assert differences(state(folder), state(whole)) == []
    assert predictions(folder) == predictions(whole)
    columns = [{name: value for name, value in row.items() if name != "seconds"} for row in read_log(folder)]
    assert columns == [{name: value for name, value in row.items() if name != "seconds"} for row in read_log(whole)]


def test_leaves_what_it_promises(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"recipe.yaml", "environment.json", "run.json", "folds_paper.json", "log.csv", "log.jsonl"} <= names
    assert {"weights.safetensors", "predictions.csv", "metrics.json", "results.json", "report.html"} <= names
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"last.pt", "previous.pt", "best.safetensors"}
    assert len(read_log(whole)) == 4
    found = json.loads((whole / "metrics.json").read_text())
    assert found["judged_on"] == "test" and found["training"]["images"] == {"train": 38, "validation": 10, "test": 12}
    loaded = Predictions.load(whole / "predictions.csv")
    assert np.mean(loaded.found == loaded.targets) == pytest.approx(found["metrics"]["accuracy_micro"])


def test_two_and_two_epochs_are_four(whole, tmp_path):
    assert not finish(start(tmp_path / "run"), stop_after=2)
    assert len(read_log(tmp_path / "run")) == 2
    assert finish(start(tmp_path / "run", resume=True))
    same_run(tmp_path / "run", whole)


def test_stops_and_goes_on_within_an_epoch(whole, tmp_path):
    """As Ctrl-C does, after every second update."""
    folder, stops = tmp_path / "run", 0
    while True:
        run = start(folder, resume=folder.exists())
        trainer = run._first
        update = trainer.update

        def ask(trainer=trainer, update=update):
            update()
            trainer.stopping.asked = trainer.progress.updates % 2 == 0

        trainer.update = ask
        try:
            finish(run)
            break
        except Interrupted:
            stops += 1
    assert stops >= 7
    same_run(folder, whole)


def kill_at_random_moments(folder, whole, kills, seed):
    """Kill -9 a training process `kills` times, each time go on, and compare the end."""
    draw, recipe, done, attempts = random.Random(seed), tiny_recipe(training={"checkpoint_updates": 1}), 0, 0
    while not (folder / "report.html").exists():
        process, begun = child(folder, recipe)
        assert begun.wait(60), "the training process did not begin"
        attempts += 1
        process.join(draw.uniform(0.0, 0.25) if done < kills else 60)
        if process.exitcode is None:
            process.kill()
            done += 1
        process.join()
        assert attempts < 4 * kills + 5
    assert done >= kills, f"it was over after {done} kills"
    same_run(folder, whole)


def test_kill_9_loses_nothing(whole, tmp_path):
    kill_at_random_moments(tmp_path / "run", whole, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_kill_9_at_many_moments(whole, tmp_path, seed):
    kill_at_random_moments(tmp_path / "run", whole, kills=5, seed=seed)


def test_truncated_checkpoint(whole, tmp_path):
    folder = tmp_path / "run"
    finish(start(folder), stop_after=2)
    last = folder / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    assert finish(start(folder, resume=True))  # from the one before
    same_run(folder, whole)


def test_no_checkpoint_is_left(tmp_path):
    folder = tmp_path / "run"
    finish(start(folder), stop_after=2)
    for name in ("last.pt", "previous.pt"):
        path = folder / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"last\.pt \(1000 bytes\) is damaged or truncated.*previous\.pt"):
        finish(start(folder, resume=True))


def test_checkpoint_of_another_network(tmp_path):
    folder = tmp_path / "run"
    finish(start(folder), stop_after=1)
    found = read_checkpoint(folder / "checkpoints" / "last.pt")
    found["model"]["head.weight"] = torch.zeros(3, 16)
    save_checkpoint(folder / "checkpoints", found)
    with pytest.raises(CheckpointError, match="another network"):
        finish(start(folder, resume=True))


def test_settings_may_not_change_on_the_way(tmp_path):
    folder = tmp_path / "run"
    finish(start(folder), stop_after=1)
    with pytest.raises(ValueError, match=r"training\.batch_size was 5, is now 7"):
        start(folder, tiny_recipe(training={"batch_size": 7}), resume=True)
    start(folder, tiny_recipe(training={"workers": 0, "checkpoint_seconds": 5}), resume=True).lock.close()
    with pytest.raises(ValueError, match="is not empty"):
        start(folder)
    with pytest.raises(ValueError, match="no run to resume"):
        start(tmp_path / "other", resume=True)


def test_one_process_a_folder(tmp_path):
    run = start(tmp_path / "run")
    with pytest.raises(ValueError, match="another process"):
        start(tmp_path / "run", resume=True)
    run.lock.close()


class Spoiled(nn.Module):
    """A loss that is NaN for some calls."""

    needs_features = False

    def __init__(self, loss, calls):
        super().__init__()
        self.loss, self.calls, self.count = loss, calls, 0

    def forward(self, logits, targets, features=None):
        self.count += 1
        value = self.loss(logits, targets, features)
        return value * float("nan") if self.count in self.calls else value


def spoil(run, calls):
    run._first.criterion = Spoiled(run._first.criterion, calls)
    return run


def test_nan_loss_is_left_out(tmp_path):
    run = spoil(start(tmp_path / "run"), {3, 9})
    trainer = run._first
    assert finish(run)
    assert trainer.progress.non_finite == 2
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    left_out = [event for event in events if event["event"] == "non_finite"]
    assert [(event["epoch"], event["step"], len(event["ids"])) for event in left_out] == [(1, 2, 5), (2, 0, 5)]
    known = {sample.id for sample in run.data.samples}
    assert all(set(event["ids"]) <= known for event in left_out)
    for weights in (trainer.model.state_dict(), trainer.ema.module.state_dict()):
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["training"]["left_out_batches"] == 2


def test_only_nan_stops(tmp_path):
    run = spoil(start(tmp_path / "run", tiny_recipe(training={"non_finite_limit": 4})), set(range(10, 1000)))
    trainer = run._first
    with pytest.raises(NonFiniteLoss, match="4 batches in a row"):
        finish(run)
    assert trainer.progress.best_epoch <= 1
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())


def test_an_epoch_without_updates_is_never_the_best(tmp_path):
    run = spoil(start(tmp_path / "run", tiny_recipe(training={"epochs": 1, "non_finite_limit": 100})), range(1, 100))
    trainer = run._first
    assert finish(run)
    assert trainer.progress.updates == 0 and trainer.progress.best_epoch == 0
    assert not (tmp_path / "run" / "checkpoints" / "best.safetensors").exists()


def test_nan_image_does_not_reach_the_running_statistics(tmp_path):
    run = start(tmp_path / "run")
    trainer = run._first
    batch = next(iter(trainer.batches))
    trainer.backward(batch)
    trainer.update()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    batch.images[0, 0, 3, 3] = float("nan")
    trainer.open_log()
    trainer.backward(batch)
    trainer.update()
    assert differences(before, dict(trainer.model.state_dict())) == []
    run.lock.close()


def test_infinite_gradient_is_left_out(tmp_path):
    run = start(tmp_path / "run", tiny_recipe(training={"non_finite_limit": 3, "accumulate": 1}))
    trainer = run._first
    trainer.model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLoss, match="the gradient is not finite"):
        finish(run)
    assert trainer.progress.updates == 0


def test_disk_full(whole, tmp_path):
    """The system refuses to write more than some bytes of a file; what was there stays, and training goes on later."""
    folder = tmp_path / "run"
    finish(start(folder), stop_after=2)
    files = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    run = start(folder, resume=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*File too large.*the earlier one is untouched"):
            finish(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == files
    assert finish(start(folder, resume=True))
    same_run(folder, whole)


def test_weights_file(tmp_path):
    model = nn.Linear(3, 2)
    path = tmp_path / "w.safetensors"
    save_weights(path, model.state_dict(), {"classes": ["a", "b"]})
    weights, facts = read_weights(path)
    assert facts == {"classes": ["a", "b"]} and torch.equal(weights["weight"], model.weight)
    with pytest.raises(CheckpointError, match="another network: 1 of another shape, the first weight"):
        load_weights(nn.Linear(4, 2), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"w\.safetensors .* damaged or truncated"):
        read_weights(path)


def test_accumulation_is_a_larger_batch(tmp_path):
    """Three batches of 6 for an update give what one of 18 gives, in a network without batch statistics."""
    plain = {
        "mixing": {"mixup": 0, "cutmix": 0},
        "model": {"arguments": {"norm": "group", "drop": 0.0}},
        "augmentation": {},
        "evaluation": {"worst": 0},
    }
    small = {"epochs": 2, "batch_size": 6, "accumulate": 3, "ema": None, "drop_last": True}
    large = {"epochs": 2, "batch_size": 18, "accumulate": 1, "ema": None, "drop_last": True}
    states = []
    for name, training in (("small", small), ("large", large)):
        run = start(tmp_path / name, tiny_recipe(**plain, training=training))
        finish(run)
        states.append(state(tmp_path / name))
    assert states[0]["progress"]["updates"] == states[1]["progress"]["updates"] == 4
    for name, tensor in states[0]["model"].items():
        torch.testing.assert_close(tensor, states[1]["model"][name], rtol=1e-4, atol=1e-5)


def test_early_stopping_and_the_best_epoch(tmp_path):
    run = start(tmp_path / "run", tiny_recipe(training={"epochs": 30, "patience": 2, "ema": None}))
    trainer = run._first
    values = iter([0.2, 0.5, 0.4, 0.9, 0.4, 0.8])
    losses = iter([1.0, 1.0, 0.1, 0.5, 0.1, 0.1])

    def validate():
        return (value := next(values)), (loss := next(losses)), {"loss": loss, "accuracy_micro": value}

    trainer._validate = validate
    finish(run)
    assert trainer.progress.best_epoch == 4
    assert [row["epoch"] for row in trainer.history] == [1, 2, 3, 4, 5, 6]


def test_ties_go_to_the_lower_loss_and_patience_ends(tmp_path):
    run = start(tmp_path / "run", tiny_recipe(training={"epochs": 30, "patience": 2, "ema": None}))
    trainer = run._first
    kept = {}
    values, losses = iter([0.5, 0.5, 0.5, 0.4]), iter([1.0, 0.9, 0.95, 0.1])

    def validate():
        kept[trainer.progress.epoch + 1] = trainer.model.head.weight.detach().clone()
        return (value := next(values)), (loss := next(losses)), {"loss": loss, "accuracy_micro": value}

    trainer._validate = validate
    finish(run)
    assert trainer.progress.best_epoch == 2 and trainer.progress.epoch == 4
    assert "no better accuracy_micro for 2 epochs" in trainer.progress.stopped
    weights, facts = read_weights(tmp_path / "run" / "weights.safetensors")
    assert facts["epoch"] == 2 and torch.equal(weights["head.weight"], kept[2])


def test_folds_and_both_protocols(tmp_path):
    recipe = tiny_recipe(
        data={"options": {"count": 150}, "folds": 2, "protocol": "both", "test_fraction": None},
        training={"epochs": 1},
        evaluation={"worst": 0},
    )
    folder = tmp_path / "run"
    assert not finish(start(folder, recipe), parts=2)
    assert (folder / "grouped" / "fold_1" / "metrics.json").exists(), "every protocol's first fold comes first"
    (one,) = (json.loads(path.read_text()) for path in folder.glob("grouped/*/metrics.json"))
    summary = json.loads((folder / "results.json").read_text())
    assert summary["grouped"]["interval"] == one["intervals"] and summary["grouped"]["folds_done"] == 1
    first = predictions(folder / "paper" / "fold_1")
    assert finish(start(folder, resume=True))
    assert predictions(folder / "paper" / "fold_1") == first
    summary = json.loads((folder / "results.json").read_text())
    assert {name: (one["folds_done"], one["folds"]) for name, one in summary.items()} == {
        "paper": (2, 2),
        "grouped": (2, 2),
    }
    for protocol in ("paper", "grouped"):
        ids = [
            name
            for fold in (1, 2)
            for name in Predictions.load(folder / protocol / f"fold_{fold}" / "predictions.csv").ids
        ]
        assert len(ids) == len(set(ids)) == summary[protocol]["images"] == 150
        together = Predictions.join(
            [Predictions.load(folder / protocol / f"fold_{fold}" / "predictions.csv") for fold in (1, 2)]
        )
        samples = json.loads((folder / f"folds_{protocol}.json").read_text())["samples"]
        wanted = bootstrap_intervals(
            together.probabilities,
            together.targets,
            recipe.evaluation.bootstrap,
            groups=[samples[name]["group"] for name in together.ids],
        )
        assert summary[protocol]["interval"]["f1_macro"] == pytest.approx(wanted["f1_macro"])
    assert "Both splits side by side" in (folder / "report.html").read_text()


def test_deadline(whole, tmp_path):
    folder = tmp_path / "run"
    run = start(folder)
    assert not run._first.run(deadline=time.monotonic())
    run.lock.close()
    assert state(folder)["progress"]["updates"] == 1
    assert finish(start(folder, resume=True))
    same_run(folder, whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"precision": "bfloat16", "epochs": 1}},
        {"training": {"precision": "float16", "epochs": 1}},
        {"training": {"channels_last": True, "epochs": 1}},
        {"training": {"sampler": "balanced", "epochs": 1}},
        {"training": {"class_weights": True, "epochs": 1}},
        {"training": {"epochs": 1}, "evaluation": {"tta": "dihedral"}},
        {"training": {"epochs": 1}, "data": {"train_fraction": 0.5}},
        {"training": {"epochs": 1, "select": "last"}, "data": {"validation": 0.0}},
        {"training": {"epochs": 1, "monitor": "f1_macro"}},
        {"training": {"epochs": 1, "tensorboard": True}},
        {"loss": {"name": "bce"}, "training": {"epochs": 1}},
        {
            "loss": {"name": "hybrid_triplet"},
            "training": {"epochs": 1, "sampler": "pxk", "samples_per_class": 2, "batch_size": 6},
            "mixing": {"mixup": 0, "cutmix": 0},
        },
        {
            "loss": {"name": "bce"},
            "model": {"outputs": 1},
            "mixing": {"mixup": 0, "cutmix": 0},
            "data": {
                "options": {"classes": {"few": ["dyskeratotic", "koilocytotic"], "many": ["metaplastic", "parabasal"]}}
            },
            "training": {"epochs": 1},
        },
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
def test_settings_train(tmp_path, changes):
    run = start(tmp_path / "run", tiny_recipe(**changes))
    assert finish(run)
    assert np.isfinite(read_log(tmp_path / "run")[-1]["loss"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"training": {"monitor": "accuracy"}}, "training.monitor: 'accuracy' is not known"),
        ({"training": {"monitor": "f1_binary"}}, "training.monitor: 'f1_binary' is not known"),  # of five classes
        ({"model": {"outputs": 3}}, "model.outputs is 3, but the data has 5 classes"),
        ({"model": {"arguments": {"colour": 1}}}, "model.arguments do not fit"),
        ({"model": {"name": "resnet188"}}, "resnet18"),
        ({"loss": {"name": "hybrid_triplet"}}, "mixed images belong to no class"),
        ({"training": {"device": "toaster"}}, "toaster"),
        ({"model": {"name": "alexnet"}}, "data.input_size: alexnet does not take images of 16 x 16"),
        ({"augmentation": {"rotate": 3}}, "rotate"),
        ({"model": {"pretrained": True}}, "pretrained"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, changes, text):
    with pytest.raises(ValueError, match=text):
        start(tmp_path / "run", tiny_recipe(**changes))
    assert not (tmp_path / "run").exists()


def test_torn_line_of_the_log(tmp_path):
    log = RunLog(tmp_path)
    log.event("first")
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "hal')
    RunLog(tmp_path).event("second")
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == ["first", "second"]


@pytest.mark.slow
def test_compiled_step(tmp_path):
    """The compiled network trains as the plain one does, and leaves weights under the same names."""
    changes = {"model": {"arguments": {"drop": 0.0}}, "mixing": {"mixup": 0, "cutmix": 0}}
    changes["optimizer"] = {"name": "sgd", "learning_rate": 0.05}
    for name in ("plain", "compiled"):
        compiled = name == "compiled"
        run = start(tmp_path / name, tiny_recipe(**changes, training={"epochs": 2, "compile": compiled}))
        assert (run._first.call is not run._first.network) == compiled
        assert finish(run)
    plain, compiled = (read_log(tmp_path / name) for name in ("plain", "compiled"))
    for row, other in zip(plain, compiled, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert row["validation_loss"] == pytest.approx(other["validation_loss"], abs=1e-4)
    weights = [read_weights(tmp_path / name / "weights.safetensors")[0] for name in ("plain", "compiled")]
    assert weights[0].keys() == weights[1].keys()


def test_bfloat16_computes_in_bfloat16(tmp_path):
    """Convolutions in bfloat16; weights, running statistics and loss in float32."""
    run = start(tmp_path / "run", tiny_recipe(training={"precision": "bfloat16"}))
    trainer, seen = run._first, []
    trainer.model.second.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss, _, _ = trainer.backward(next(iter(trainer.batches)))
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    assert {value.dtype for value in trainer.model.state_dict().values()} == {torch.float32, torch.int64}
    assert {value.grad.dtype for value in trainer.model.parameters()} == {torch.float32}
    run.lock.close()
