"""Training in several processes: what two find is what one finds, and what they leave behind serves any number."""

from __future__ import annotations

import json
import math
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from training_runs import (
    NAME,
    TinyCells,
    differences,
    finish,
    join_ranks,
    start,
    start_ranks,
    state,
    tiny_recipe,
    train_in_ranks,
)

from cellops import FReLU, GroupConv1x1
from cellops.models import create_model, register_network
from cellops.models.prediction.job import Settings, predict_images
from cellops.models.training.apply import evaluate_run
from cellops.models.training.checkpoint import read_weights
from cellops.models.training.console import Output
from cellops.models.training.evaluate import Predictions
from cellops.models.training.log import read_log
from cellops.models.training.losses import build_loss
from cellops.models.training.network import WithFeatures, unused_parameters
from cellops.models.training.recipe import RecipeError
from cellops.models.training.sharding import blocks
from cellops.models.training.sync_norm import SharedBatchNorm, synchronise

# Without chance, and by an optimizer that does not enlarge rounding: Adam divides a gradient that is only rounding by
# its own size. Even batches, as one that is filled up counts some images twice.
COMPARABLE = {
    "mixing": {"mixup": 0, "cutmix": 0},
    "optimizer": {"name": "sgd", "learning_rate": 0.05},
    "training": {"epochs": 2, "batch_size": 6, "drop_last": True},
    "evaluation": {"batch_size": 10, "worst": 1},  # 12 test images: the last batches are uneven
    "data": {"options": {"count": 61, "size": 32}},
}
HQNET = {
    "model": {"name": "hqnet_tiny", "arguments": {"drop_rate": 0.0, "width": 8}},
    "data": {"options": {"count": 61, "size": 32}, "input_size": 32},
    "training": {"distributed": "fsdp", "sync_batch_norm": True},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Stores of images in one place for all tests of this file."""
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))


def merged(*parts):
    """Nested settings, later ones over earlier ones."""
    result = {}
    for part in parts:
        for key, value in part.items():
            old = result.get(key)
            further = isinstance(value, dict) and isinstance(old, dict) and value.get("name") in (None, old.get("name"))
            result[key] = merged(old, value) if further else value
    return result


def train_two(folder, recipe, **limits):
    assert join_ranks(start_ranks(2, train_in_ranks, folder, recipe, limits)) == [0, 0]


def held(folder, rank):
    return json.loads((folder / f"held_{rank}.json").read_text())


def assert_same_results(first, second, atol):
    one, two = (Predictions.load(folder / "predictions.csv") for folder in (first, second))
    assert one.ids == two.ids
    np.testing.assert_allclose(one.probabilities, two.probabilities, atol=atol)
    metrics = [json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (first, second)]
    assert metrics[0] == pytest.approx(metrics[1], abs=10 * atol)
    for row, other in zip(read_log(first), read_log(second), strict=True):
        for name in ("loss", "validation_loss"):
            assert row[name] == pytest.approx(other[name], abs=atol)
        assert row["accuracy_micro"] == other["accuracy_micro"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": NAME, "arguments": {"norm": "group", "drop": 0.0}}},
        {"model": {"name": NAME, "arguments": {"drop": 0.0}}, "training": {"sync_batch_norm": True}},
        HQNET,
    ],
    ids=["ddp", "ddp with synchronised normalisation", "fsdp"],
)
def test_two_processes_give_the_results_of_one(tmp_path, changes):
    """Sums of float32 in another order: 1e-6 of the weights at each of 14 updates."""
    recipe = tiny_recipe(**merged(COMPARABLE, changes))
    finish(start(tmp_path / "one", recipe))
    train_two(tmp_path / "two", recipe)
    assert_same_results(tmp_path / "one", tmp_path / "two", atol=1e-4)
    one, two = (read_weights(tmp_path / name / "weights.safetensors")[0] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_each_process_holds_a_part(tmp_path):
    """Of every weight: rows of it, so that one of three rows is one or two."""
    folder = tmp_path / "run"
    train_two(folder, tiny_recipe(**merged(COMPARABLE, HQNET)), stop_after=1)
    parts = [held(folder, rank) for rank in (0, 1)]
    weights, _ = read_weights(folder / "checkpoints" / "best.safetensors")
    whole = {name: weight.numel() for name, weight in weights.items()}
    assert {name: sum(part[name] for part in parts) for name in parts[0]} == {name: whole[name] for name in parts[0]}
    total = sum(parts[0].values()) + sum(parts[1].values())
    assert total > 10_000 and all(0.45 < sum(part.values()) / total < 0.55 for part in parts)


def test_blocks_of_the_networks():
    """HQNet is gathered block by block; modules that read their children's weights are never taken apart."""
    with torch.device("meta"):
        network = create_model("hqnet", num_classes=5)
        assert list(blocks(network)) == [block for stage in network.stages for block in stage]
        largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks(network))
        total = sum(parameter.numel() for parameter in network.parameters())
        for name in ("shufflenet_v1_g3", "dresnet", "deform_resnet50"):
            for block in blocks(create_model(name, num_classes=5)):
                assert not type(block).__module__.startswith(("cellops.nn", "torch.nn"))
    assert largest < total / 3


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_resumed_by_another_number_of_processes(tmp_path, mode):
    """One epoch by two, one by one process, and the other way round, is what one process does in two epochs."""
    recipe = tiny_recipe(**merged(COMPARABLE, HQNET, {"training": {"distributed": mode, "ema": 0.9}}))
    finish(start(tmp_path / "one", recipe))
    train_two(tmp_path / "two_one", recipe, stop_after=1)
    assert finish(start(tmp_path / "two_one", resume=True))
    finish(start(tmp_path / "one_two", recipe), stop_after=1)
    train_two(tmp_path / "one_two", None)
    for name in ("two_one", "one_two"):
        assert_same_results(tmp_path / "one", tmp_path / name, atol=1e-4)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_what_sharded_training_leaves_serves_the_other_commands(tmp_path, mode):
    folder, quiet = tmp_path / "run", Output(quiet=True)
    train_two(folder, tiny_recipe(**merged(COMPARABLE, HQNET, {"training": {"distributed": mode, "epochs": 1}})))
    stored = json.loads((folder / "metrics.json").read_text())["metrics"]["accuracy_micro"]
    found = evaluate_run(folder, None, "auto", None, tmp_path / "evaluation", quiet)
    assert next(iter(found.values()))["metrics"]["accuracy_micro"] == stored
    from PIL import Image

    Image.new("RGB", (40, 40), (200, 120, 160)).save(tmp_path / "cell.png")
    assert predict_images(folder, [tmp_path / "cell.png"], tmp_path / "predicted", Settings(), quiet) == 0
    assert (folder / "report.html").is_file() and any((folder / "mistakes").iterdir())


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def undisturbed(request, tmp_path_factory):
    """A run of two processes with chance in it, each its own, and its recipe."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    recipe = tiny_recipe(
        model={"name": NAME},
        training={"batch_size": 6, "epochs": 3, "distributed": request.param, "checkpoint_updates": 1},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))
        train_two(folder, recipe)
    return folder, recipe


def test_resuming_two_processes_is_exact(undisturbed, tmp_path):
    folder, recipe = tmp_path / "run", undisturbed[1]
    train_two(folder, recipe, stop_after=1)
    train_two(folder, None, stop_after=1)
    train_two(folder, None)
    assert differences(state(folder), state(undisturbed[0])) == []
    assert (folder / "predictions.csv").read_bytes() == (undisturbed[0] / "predictions.csv").read_bytes()
    own = state(folder)["processes"]
    assert len(own) == 2 and differences(own[0]["random"], own[1]["random"]) != []


def test_killing_two_processes_loses_nothing(undisturbed, tmp_path):
    folder, recipe = tmp_path / "run", undisturbed[1]
    draw, kills = random.Random(0), 0
    while not (folder / "report.html").exists():
        ranks = start_ranks(2, train_in_ranks, folder, recipe)
        if kills < 2:
            waited, path = time.monotonic(), folder / "checkpoints" / "last.pt"
            before = path.stat().st_mtime_ns if path.exists() else 0
            while not (path.exists() and path.stat().st_mtime_ns > before) and time.monotonic() - waited < 120:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.1))
            for process in ranks:
                kills += process.is_alive() and process is ranks[0]
                process.kill()
        codes = join_ranks(ranks)
        assert codes == [0, 0] or set(codes) <= {-9, 0}
    assert kills == 2
    assert differences(state(folder), state(undisturbed[0])) == []


def shared_norm_of_halves(folder, kind):
    """Work of one of two processes: a module on its half of a batch; writes output and gradients."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    module, images = MODULES[kind](), torch.randn(7, 6, 5, 4)
    assert synchronise(module, torch.device("cpu")) == []
    mine = (images[:3] if rank == 0 else images[3:]).clone().requires_grad_()
    output = module(mine)
    (output * output.detach().cos()).sum().backward()
    found = {"output": output.detach(), "input": mine.grad, "state": dict(module.state_dict())}
    found["gradients"] = {name: value.grad for name, value in module.named_parameters()}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def timm_norm():
    from timm.layers import BatchNormAct2d

    return nn.Sequential(BatchNormAct2d(6, act_layer=nn.SiLU, inplace=False))


MODULES = {
    "norm": lambda: nn.Sequential(nn.BatchNorm2d(6)),
    "without momentum": lambda: nn.Sequential(nn.BatchNorm2d(6, momentum=None, affine=False)),
    "timm": timm_norm,
    "FReLU": lambda: FReLU(6),
    "GroupConv1x1": lambda: GroupConv1x1(6, 12, 3, shuffle=True),
}


@pytest.mark.parametrize("kind", MODULES)
def test_synchronised_normalisation(tmp_path, kind):
    """Two processes with 3 and 4 images normalise as one with 7; in cellops' modules, which fuse, too."""
    torch.manual_seed(0)
    module, images = MODULES[kind](), torch.randn(7, 6, 5, 4, requires_grad=True)
    output = module(images)
    (output * output.detach().cos()).sum().backward()
    assert join_ranks(start_ranks(2, shared_norm_of_halves, tmp_path, kind)) == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([one["output"] for one in found]), output.detach(), **close)
    torch.testing.assert_close(torch.cat([one["input"] for one in found]), images.grad, **close)
    for name, value in module.named_parameters():
        total = found[0]["gradients"][name] + found[1]["gradients"][name]
        # The bias of a convolution before the normalisation changes nothing: its gradient is 0, but for rounding.
        torch.testing.assert_close(
            total, value.grad, rtol=1e-4, atol=1e-3 if name == "conv_frelu.bias" else 1e-4, msg=name
        )
    assert found[0]["state"].keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(found[0]["state"][name], value, **close, msg=name)


def test_unknown_normalisations_are_named():
    class Own(nn.BatchNorm2d):
        pass

    network = nn.Sequential(nn.BatchNorm2d(2), Own(2))
    assert synchronise(network, torch.device("cpu")) == ["1 (Own)"]
    assert isinstance(network[0], SharedBatchNorm) and type(network[1]) is Own


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"training": {"precision": "float16"}}, "training.precision: float16"),
        ({"training": {"compile": True}}, "training.compile"),
        ({"optimizer": {"name": "adamp", "learning_rate": 0.1}}, "optimizer.name: adamp"),
    ],
)
def test_what_fsdp_cannot_do(changes, text):
    with pytest.raises(RecipeError, match=f"training.distributed fsdp does not go with {text}"):
        tiny_recipe(**merged({"training": {"distributed": "fsdp"}}, changes))


def begin_in_ranks(folder, recipe):
    """Work of one of several processes: prepare a run anew; writes what it is told."""
    try:
        start(folder, recipe)
    except ValueError as error:
        (folder / f"told_{torch.distributed.get_rank()}").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_several_processes_do_not_take_over_a_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("of another run")
    assert join_ranks(start_ranks(2, begin_in_ranks, tmp_path, tiny_recipe())) == [0, 0]
    for rank in (0, 1):
        assert "is not empty: --resume goes on with the run in it" in (tmp_path / f"told_{rank}").read_text()
    assert (tmp_path / "recipe.yaml").read_text() == "of another run"


def train_with_a_bad_batch(folder, recipe):
    """Training whose fourth batch, the second of an update, gives NaN."""
    run = start(folder, recipe)
    criterion, calls = run._first.criterion, []

    class Bad(nn.Module):
        def forward(self, *arguments):
            calls.append(1)
            return criterion(*arguments) * (math.nan if len(calls) == 4 else 1)

    run._first.criterion = Bad()
    run.train()
    run.ranks.close()


def test_a_bad_batch_leaves_the_gradients_before_it(tmp_path):
    """Of the same update; two processes with parts of the weights, clipped, find what one finds."""
    recipe = tiny_recipe(**merged(COMPARABLE, HQNET, {"training": {"accumulate": 2, "clip": 0.5, "ema": 0.9}}))
    train_with_a_bad_batch(tmp_path / "one", recipe)
    assert join_ranks(start_ranks(2, train_with_a_bad_batch, tmp_path / "two", recipe)) == [0, 0]
    assert [row["non_finite"] for row in read_log(tmp_path / "two")] == [1, 1]
    assert_same_results(tmp_path / "one", tmp_path / "two", atol=1e-4)


class Spare(TinyCells):
    """Has layers that no logit comes from."""

    def __init__(self, num_classes, in_chans):
        super().__init__(num_classes, in_chans, "batch", 0.0)
        self.spare = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))


def spare_layers(num_classes: int, in_chans: int) -> nn.Module:
    return Spare(num_classes, in_chans)


def train_with_spare_layers(folder, recipe, bad=False):
    """Training of a network that is registered here, so that no other test sees it."""
    register_network(classifier="head")(spare_layers)
    if bad:
        train_with_a_bad_batch(folder, recipe)
    else:
        train_in_ranks(folder, recipe)


SPARE = {"model": {"name": "spare_layers", "arguments": {}}, "training": {"sync_batch_norm": True}}


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("bad", [False, True], ids=["", "with a bad batch"])
def test_parameters_without_a_gradient(spare_registry, tmp_path, mode, bad):
    """They are found and told, and stay as drawn; DDP by itself waits for their gradients."""
    recipe = tiny_recipe(**merged(COMPARABLE, SPARE, {"training": {"distributed": mode}}))
    train_with_spare_layers(tmp_path / "one", recipe, bad)
    assert join_ranks(start_ranks(2, train_with_spare_layers, tmp_path / "two", recipe, bad)) == [0, 0]
    assert_same_results(tmp_path / "one", tmp_path / "two", atol=1e-4)
    one, two = (read_weights(tmp_path / name / "weights.safetensors")[0] for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith("spare"))
    told = [json.loads((tmp_path / name / "run.json").read_text())["notes"] for name in ("one", "two")]
    note = "3 parameters get no gradient (spare.0.weight, spare.0.bias, spare.1.weight): DDP looks for them"
    assert [any(note in line for line in notes) for notes in told] == [False, mode == "ddp"]


def test_looking_for_gradients_changes_nothing(spare_registry):
    """Statistics, gradients and random numbers; dropout draws some."""
    network = WithFeatures(create_model(NAME, num_classes=3, drop=0.5), False)
    before, drawn = {name: value.clone() for name, value in network.state_dict().items()}, torch.get_rng_state()
    assert unused_parameters(network, build_loss({}, 3), (16, 16), 3, torch.device("cpu")) == []
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn) and all(value.grad is None for value in network.parameters())
    network.model.head.weight.requires_grad_(False)  # asks for none
    network.model.extra = nn.Parameter(torch.zeros(2))
    assert unused_parameters(network, build_loss({}, 3), (16, 16), 3, torch.device("cpu")) == ["extra"]
    network.model.head = nn.Linear(3, 3)
    with pytest.raises(RecipeError, match=r"model\.name: the network does not train on 4 images of 16 x 16"):
        unused_parameters(network, build_loss({}, 3), (16, 16), 3, torch.device("cpu"))
