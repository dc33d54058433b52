"""Networks, losses and weights of one's own: what does not fit is said before anything is trained or written."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from training_runs import NAME, TinyCells, finish, start, tiny_recipe

from cellops.models import create_model, list_models, register_network, registry
from cellops.models.training.checkpoint import CheckpointError, load_weights, read_weights, save_weights
from cellops.models.training.network import classifier_tensors
from cellops.models.training.notes import start_note
from cellops.models.training.recipe import RecipeError, dump_recipe


class TwoOutputs(TinyCells):
    def forward(self, x):
        features = self.forward_features(x)
        return self.forward_head(features), features


def own_network(num_classes: int, in_chans: int) -> nn.Module:
    return TinyCells(num_classes, in_chans, "batch", 0.0)


def own_of_six(num_classes: int, in_chans: int) -> nn.Module:
    """Has the wrong width, whatever was asked for."""
    return TinyCells(6, in_chans, "batch", 0.0)


def own_two_outputs(num_classes: int, in_chans: int) -> nn.Module:
    return TwoOutputs(num_classes, in_chans, "batch", 0.0)


def own_sequential(num_classes: int, in_chans: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_chans, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


class DeepHead(nn.Module):
    """A classifier of several layers, one of which is as wide as five classes."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_chans, 8, 3)
        layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5), nn.Linear(5, num_classes)]
        self.head = nn.Sequential(*layers, nn.BatchNorm1d(num_classes))

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x):
        return self.head(self.first(x).mean((2, 3)))


def own_deep_head(num_classes: int, in_chans: int) -> nn.Module:
    return DeepHead(num_classes, in_chans)


def own_deep_head_unnamed(num_classes: int, in_chans: int) -> nn.Module:
    return DeepHead(num_classes, in_chans)


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    """Registered for these tests alone: others look at every network there is."""
    list_models()  # so that all others are there
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for build in (own_network, own_of_six, own_two_outputs, own_sequential, own_deep_head):
        register_network(classifier="head")(build)
    register_network()(own_deep_head_unnamed)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": {"name": "own_of_six"}}, r"must return one tensor, logits \[1, 5\].*gave a tensor \[1, 6\]"),
        ({"model": {"name": "own_two_outputs"}}, r"own_two_outputs must return one tensor.*gave a tuple"),
        (
            {
                "model": {"name": "own_sequential"},
                "loss": {"name": "hybrid_triplet"},
                "mixing": {"mixup": 0, "cutmix": 0},
            },
            "loss hybrid_triplet needs features: own_sequential has no forward_features",
        ),
    ],
)
def test_networks_that_do_not_fit(tmp_path, changes, text):
    with pytest.raises(RecipeError, match=text):
        start(tmp_path / "run", tiny_recipe(**changes))
    assert not (tmp_path / "run").exists()


def test_weights_of_another_number_of_classes(tmp_path, monkeypatch):
    """All but the classifier is taken over; the file is named with its checksum, and found from elsewhere."""
    before = create_model("own_network", num_classes=7)
    save_weights(tmp_path / "before.safetensors", before.state_dict(), {})
    monkeypatch.chdir(tmp_path)
    changes = {"model": {"name": "own_network", "weights": "before.safetensors"}}
    run = start(tmp_path / "run", tiny_recipe(**changes))
    model = run._first.model
    assert torch.equal(model.first.weight, before.first.weight) and model.head.weight.shape == (5, 16)
    digest = hashlib.sha256((tmp_path / "before.safetensors").read_bytes()).hexdigest()
    (note,) = [note for note in run.notes if "Training started from" in note]
    assert digest in note and "does not fit, so that head.bias and head.weight were drawn anew" in note
    assert not finish(run, stop_after=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    finish(start(tmp_path / "run", resume=True), stop_after=1)
    monkeypatch.chdir(tmp_path)
    run = start(tmp_path / "run", tiny_recipe(**changes), resume=True)  # the same file, again by its relative name
    run.lock.close()


def test_weights_of_as_many_classes_are_taken_over_whole(tmp_path):
    before = create_model("own_network", num_classes=5)
    save_weights(tmp_path / "before.safetensors", before.state_dict(), {})
    changes = {"model": {"name": "own_network", "weights": str(tmp_path / "before.safetensors")}}
    run = start(tmp_path / "run", tiny_recipe(**changes))
    run.lock.close()
    assert torch.equal(run._first.model.head.weight, before.head.weight)
    assert not any("drawn anew" in note for note in run.notes)


@pytest.mark.parametrize("name", ["shufflenet_v1_g3", "dresnet_025", "hqnet_tiny", "resnet18", "squeezenet1_1"])
def test_the_classifier_is_known(name, tmp_path):
    """Of every source; without the names, as the weights of a run are read, another number of classes is an error."""
    old, new = create_model(name, num_classes=7), create_model(name, num_classes=5)
    path = tmp_path / "old.safetensors"
    save_weights(path, old.state_dict(), {})
    with pytest.raises(CheckpointError, match="another network: 2 of another shape"):
        load_weights(new, path)
    names = classifier_tensors(new)
    drawn = {key: value.clone() for key, value in new.state_dict().items() if key in names}
    load_weights(new, path, names)
    for key, value in new.state_dict().items():
        assert torch.equal(value, drawn[key] if key in names else old.state_dict()[key])
    with pytest.raises(CheckpointError, match="another network"):
        load_weights(create_model(NAME, num_classes=5), path)


@pytest.mark.parametrize("name", ["own_deep_head", "own_deep_head_unnamed", "alexnet"])
@pytest.mark.parametrize("classes", [5, 7, 1])
def test_layers_before_the_last_one_are_taken_over(name, classes, tmp_path):
    """Of a classifier of several layers, only what has a value for each class is drawn anew."""
    old, new = create_model(name, num_classes=9), create_model(name, num_classes=classes)
    save_weights(tmp_path / "old.safetensors", old.state_dict(), {})
    drawn = {key: value.clone() for key, value in new.state_dict().items()}
    load_weights(new, tmp_path / "old.safetensors", classifier_tensors(new))
    before = old.state_dict()
    fitting = {key for key, value in drawn.items() if value.shape == before[key].shape and "head.5" not in key}
    assert fitting >= {"classifier.1.weight"} if name == "alexnet" else fitting >= {"head.0.weight", "head.3.bias"}
    for key, value in new.state_dict().items():
        assert torch.equal(value, before[key] if key in fitting else drawn[key]), key


def test_what_is_said_of_weights_reads_no_tensor(tmp_path, monkeypatch):
    """Shapes lie in the header of the file."""
    before = create_model("own_network", num_classes=7)
    path = tmp_path / "before.safetensors"
    save_weights(path, before.state_dict(), {})
    model = create_model("own_network", num_classes=5)
    names = classifier_tensors(model)
    monkeypatch.setattr("cellops.models.training.checkpoint.read_weights", None)
    assert "head.bias and head.weight were drawn anew" in start_note(model, path, names)
    assert start_note(before, path, names).endswith(f"(SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}).")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot read the weights .*before\.safetensors"):
        start_note(model, path, names)


def test_the_same_weights_have_one_checksum(tmp_path):
    """safetensors writes facts in an order of its own, another one for each file."""
    weights = create_model(NAME, num_classes=3).state_dict()
    facts = {f"fact {number}": {"of": number, "é": "µ"} for number in range(12)}
    written = set()
    for number in range(4):
        save_weights(tmp_path / f"{number}", weights, facts)
        written.add((tmp_path / f"{number}").read_bytes())
    assert len(written) == 1
    found, told = read_weights(tmp_path / "0")
    assert told == facts and all(torch.equal(found[name], value) for name, value in weights.items())


MODULE = """
from torch import nn
from torch.nn import functional
from cellops.models import register_network
from cellops.models.training.losses import LOSSES

@register_network(classifier="3")
def pooled(num_classes, in_chans, width=8):
    return nn.Sequential(nn.Conv2d(in_chans, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, num_classes))

class Poly(nn.Module):
    def __init__(self, num_classes, epsilon=1.0, class_weights=None):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, logits, targets, features=None):
        right = logits.softmax(1).gather(1, targets[:, None])
        return functional.cross_entropy(logits, targets) + self.epsilon * (1 - right).mean()

LOSSES["poly"] = (Poly, {"epsilon"})
"""


def test_a_module_outside_the_package(tmp_path):
    """As docs/models.md has it: a script that imports it is the command line, and its run goes through all commands."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "lab.py").write_text(
        "import sys\n\nimport mine\nfrom cellops.models.cli import main\n\nsys.exit(main())\n"
    )
    recipe = tiny_recipe(model={"name": "pooled", "arguments": {"width": 6}}, mixing={"mixup": 0, "cutmix": 0})
    recipe.loss = {"name": "poly", "epsilon": 0.5}
    recipe.training.epochs = 1
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    for line in ("train --recipe r.yaml --output run --quiet", "evaluate run", "export run --output run.onnx"):
        done = subprocess.run(
            [sys.executable, "lab.py", *line.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["loss"] == {"name": "poly", "epsilon": 0.5}
    assert (tmp_path / "run.onnx").is_file()
