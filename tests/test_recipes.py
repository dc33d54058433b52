"""Recipes: their syntax, the shipped ones against the papers, and two steps of each on a small tree."""

from __future__ import annotations

import json
import re

import pytest
import torch
import trees
from training_runs import finish, start

from cellops.models import create_model
from cellops.models.data import build_augmentation
from cellops.models.training.log import read_log
from cellops.models.training.losses import build_loss
from cellops.models.training.optim import NAMES, build_schedule
from cellops.models.training.recipe import (
    RecipeError,
    build_recipe,
    dump_recipe,
    load_recipe,
    recipe_families,
    recipe_names,
    recipe_values,
)
from cellops.models.training.tables import load_table, table_names, train_table, write_table

SHIPPED = recipe_names()
OPTIMIZER = "optimizer: {name: sgd, learning_rate: 0.1}\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))


def write(folder, text, name="mine.yaml"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("trainig: {epochs: 3}", "unknown key trainig: did you mean 'training'?"),
        ("training: {epoch: 3}", "unknown key training.epoch: did you mean 'epochs'?"),
        ("training: {epochs: many}", "training.epochs must be an integer, got 'many'"),
        ("training: {epochs: 1.5}", "training.epochs must be an integer"),
        ("training: {epochs: 0}", "training.epochs must be at least 1"),
        ("training: {ema: 1}", "training.ema must lie between 0 and 1"),
        ("training: {channels_last: 1}", "training.channels_last must be true or false"),
        ("training: {sampler: balancd}", "'balancd' is not known, did you mean 'balanced'?"),
        ("training: {sampler: balanced, class_weights: true}", "both balance the classes"),
        ("training: {patience: 3}", "needs a validation part"),
        ("training: 3", "training must be a mapping"),
        ("data: {input_size: [1, 2, 3]}", "data.input_size must be"),
        ("data: {folds: 3, test_fraction: 0.2}", "is of a single split"),
        ("training: {epochs: 3, epochs: 4}", "the key 'epochs' stands twice"),
        ("training: {epochs: [}", "is not valid YAML"),
        ("loss: " + 2000 * "[", "is nested too deeply"),
        (
            "".join(f"x{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}' if i else 'a'])}]\n" for i in range(9)),
            "has more than 50,000 values",
        ),
        ("name: ../../elsewhere", "name must be a plain name"),
        ("- a\n- b", "is no recipe"),
        ("variants: 3", "variants must be a mapping"),
        ("extends: dmeo", "there is no recipe 'dmeo': did you mean 'demo'?"),
        ("extends: mine.yaml", "extends itself"),
    ],
)
def test_wrong_recipes(tmp_path, text, error):
    path = write(tmp_path, ("" if text[0] == "-" else OPTIMIZER) + text)
    with pytest.raises(RecipeError, match=re.escape(error)):
        load_recipe(path)


def test_missing_keys(tmp_path):
    with pytest.raises(RecipeError, match="optimizer is missing"):
        load_recipe(write(tmp_path, "training: {epochs: 3}"))
    with pytest.raises(RecipeError, match=r"optimizer\.learning_rate is missing"):
        load_recipe(write(tmp_path, "optimizer: {name: sgd}"))
    with pytest.raises(RecipeError, match=r"there is no recipe file .*nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


def test_numbers_and_words(tmp_path):
    text = (
        "optimizer: {name: adam, learning_rate: 1e-4}\ntraining: {ema: 9e-1, compile: true}\ndata: {input_size: 64}\n"
    )
    recipe = load_recipe(write(tmp_path, text + "title: no\n"))
    assert recipe.optimizer.learning_rate == 1e-4 and recipe.training.ema == 0.9
    assert recipe.training.compile is True and recipe.data.input_size == [64, 64] and recipe.title == "no"


def test_overrides(tmp_path):
    path = write(tmp_path, OPTIMIZER + "loss: {name: focal, gamma: 2}\naugmentation: {rotation: 90}\n")
    recipe = load_recipe(
        path,
        [
            "training.epochs=5",
            "optimizer.learning_rate=1e-3",
            "data.input_size=[48, 64]",
            "loss.gamma=null",
            "augmentation.normalise={mean: 0.5, std: 0.25}",
            "data.path='2024'",
        ],
    )
    assert (recipe.training.epochs, recipe.optimizer.learning_rate, recipe.data.input_size) == (5, 1e-3, [48, 64])
    assert recipe.loss == {"name": "focal"} and recipe.data.path == "2024"
    assert recipe.augmentation == {"rotation": 90, "normalise": {"mean": 0.5, "std": 0.25}}
    for wrong, text in (("epochs", "must read key=value"), ("training.epochs.x=3", "is no section"), ("a=[", "YAML")):
        with pytest.raises(RecipeError, match=text):
            load_recipe(path, ["training.epochs=5", wrong])


def test_extends_variants_and_twins(tmp_path):
    text = OPTIMIZER + "loss: {name: focal, gamma: 3}\nmodel: {name: resnet18, arguments: {drop_rate: 0.1}}"
    write(tmp_path, text, "base.yaml")
    path = write(
        tmp_path,
        "extends: base.yaml\nmodel: {name: resnet34}\nloss: {name: cross_entropy}\n"
        "optimizer: {name: adam, learning_rate: 0.01}\ntraining: {epochs: 7}\n",
    )
    recipe = load_recipe(path)
    assert recipe.model.name == "resnet34" and recipe.model.arguments == {"drop_rate": 0.1}
    assert recipe.loss == {"name": "cross_entropy"}  # another name starts anew: gamma would not fit
    assert recipe.optimizer.learning_rate == 0.01 and recipe.training.epochs == 7 and recipe.name == "mine"


@pytest.mark.parametrize("name", SHIPPED)
def test_written_out_it_is_the_same(name, tmp_path):
    recipe = load_recipe(name)
    again = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert recipe_values(again) == recipe_values(recipe)
    assert recipe.name == name and recipe.title


@pytest.mark.parametrize("name", SHIPPED)
def test_every_part_of_it_can_be_built(name):
    """On the meta device, so that 470 million parameters cost nothing."""
    recipe = load_recipe(name)
    outputs = recipe.model.outputs or 6
    with torch.device("meta"):
        model = create_model(recipe.model.name, num_classes=outputs, **recipe.model.arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e4
    size = tuple(recipe.data.input_size)
    for train in (True, False):
        transform = build_augmentation(recipe.augmentation, size, train)
        pixels = torch.zeros(3, *(recipe.data.store_size or size), dtype=torch.uint8)
        assert transform(pixels, torch.Generator()).shape == (3, *size)
    loss = build_loss(recipe.loss, outputs)
    assert recipe.optimizer.name in NAMES
    build_schedule(recipe.schedule, torch.optim.SGD([torch.zeros(1)], 0.1), recipe.training.epochs, 10)
    assert not (loss.needs_features and recipe.mixing.mixup)


def test_twins_of_pretrained_rows():
    """Where a paper starts from ImageNet weights, the row also runs from scratch, and says that it does."""
    for name in SHIPPED:
        recipe = load_recipe(name)
        if recipe.model.pretrained:
            twin = load_recipe(f"{name}_scratch")
            assert not twin.model.pretrained and "from scratch" in twin.setting
            assert (twin.model.name, twin.loss, twin.augmentation) == (
                recipe.model.name,
                recipe.loss,
                recipe.augmentation,
            )


def test_the_settings_of_the_papers():
    hybrid = load_recipe("hybrid_ghostnet")
    assert hybrid.loss == {
        "name": "hybrid_triplet",
        "margin": 1.0,
        "weight": 1.0,
        "mining": "all",
        "label_smoothing": 0.1,
    }
    sgd = hybrid.optimizer
    assert (sgd.name, sgd.learning_rate, sgd.momentum, sgd.weight_decay) == ("sgd", 1e-4, 0.9, 5e-3)
    assert (hybrid.schedule.milestones, hybrid.training.epochs, hybrid.training.batch_size) == ([30, 60], 100, 16)
    assert hybrid.data.folds == 5 and hybrid.model.pretrained
    lung = load_recipe("lung_resnet50")
    assert (lung.data.input_size, lung.training.batch_size, lung.training.epochs) == ([240, 320], 8, 20)
    assert (lung.optimizer.name, lung.optimizer.learning_rate, lung.training.patience) == ("adam", 1e-4, 5)
    assert lung.model.outputs == 1 and lung.loss["name"] == "bce"
    convnext = load_recipe("hep2_convnext_base")
    assert (convnext.optimizer.name, convnext.optimizer.learning_rate, convnext.training.epochs) == ("adam", 4e-6, 30)
    assert (convnext.mixing.mixup, convnext.mixing.cutmix, convnext.loss["label_smoothing"]) == (0.8, 1.0, 0.1)
    assert convnext.training.batch_size == 32 and convnext.data.validation == 0.5
    coat = load_recipe("hep2_coat_mini")
    assert (coat.optimizer.name, coat.optimizer.learning_rate, coat.optimizer.weight_decay) == ("adamp", 1e-5, 0.1)
    assert (coat.schedule.name, coat.schedule.warmup_epochs, coat.training.epochs) == ("cosine", 10, 50)
    hqnet = load_recipe("hqnet")
    assert hqnet.optimizer.name == "nadam" and hqnet.data.test_fraction == 0.3
    dresnet = load_recipe("dresnet")
    assert dresnet.loss["name"] == "focal" and dresnet.optimizer.name == "sgd" and dresnet.schedule.gamma == 0.1
    assert 440_000 < dresnet.training.epochs * 23 < 460_000  # 917 images, 5 folds, batches of 32
    for name in ("hybrid_ghostnet", "lung_resnet50", "hep2_coat_mini", "hqnet", "dresnet"):
        assert load_recipe(name).data.protocol == "both"


def test_every_row_of_the_tables_has_a_recipe():
    assert {"hqnet", "dresnet_size", "dresnet_light", "hybrid_loss", "lung", "hep2"} <= set(table_names())
    papers = {told["paper"][:3] for family in recipe_families().values() for told in family.values() if told["paper"]}
    assert papers == {"000", "001", "002", "003", "004"}
    for name in table_names():
        for row in load_table(name).rows:
            assert row.recipe in SHIPPED, f"{name}: {row.recipe}"
            assert set(row.paper) <= set(load_table(name).columns)
            assert all(50 < value < 100 for value in row.paper.values())
    with pytest.raises(RecipeError, match="did you mean 'hybrid_loss'"):
        load_table("hybrid_los")


def tree(folder, recipe):
    """A small data set in the layout that the recipe is for."""
    paper = recipe.paper[:3]
    if paper == "001":
        return trees.herlev(folder / "herlev", scans=6, cells=2)
    if paper == "003":
        return trees.class_folders(folder / "lung", classes=("benign", "malignant"), count=24)
    if paper == "004":
        return trees.hep2(folder / "hep2", specimens=4, cells=4)
    if paper:
        return trees.sipakmed(folder / "sipakmed", clusters=8, cells=2)
    if recipe.data.layout == "cric":
        return trees.cric(folder / "cric", parents=8, crops=3)
    return "synthetic" if recipe.name == "demo" else trees.pbc(folder / "pbc", count=12)


SMALL = {
    "hqnet": "{depths: [1, 1, 1, 1], width: 8}",
    "hqnet_dcn": "{depths: [1, 1, 1, 1], width: 8}",
    "coat_mini": "{img_size: 32}",
}


def two_steps(name, folder):
    """Train the recipe on its tree for an epoch of two batches, everything else as it stands but the input size."""
    recipe = load_recipe(name)
    changes = [
        f"data.path='{tree(folder, recipe)}'",
        f"data.input_size={64 if recipe.model.name == 'alexnet' else 32}",
        "data.store_size=null",
        "data.protocol=grouped",
        "training.epochs=1",
        "training.device=cpu",
        "model.pretrained=false",
        "evaluation.bootstrap=0",
        "evaluation.worst=1",
        "evaluation.cost=false",
        "evaluation.grad_cam=false",
        "data.train_fraction=1",
    ]
    if not load_recipe(name).data.layout.startswith("hep2"):
        changes += ["data.folds=1", "data.test_fraction=0.3"]
    if recipe.data.path == "synthetic":
        changes += ["data.options={count: 50, size: 32}", "data.protocol=paper"]
    if recipe.model.name in SMALL:
        changes.append(f"model.arguments={SMALL[recipe.model.name]}")
    run = start(folder / "run", load_recipe(name, changes))
    count = len(run._first.batches.indices)
    run.lock.close()
    changes.append(f"training.batch_size={max(count // 2, 2)}")
    changes += ["training.sampler=shuffle"]
    run = start(folder / "two", load_recipe(name, changes))
    trainer = run._first
    assert finish(run)
    assert 2 <= trainer.progress.updates <= 3
    assert read_log(folder / "two")[0]["loss"] > 0
    assert (folder / "two" / "report.html").stat().st_size > 20_000


@pytest.mark.parametrize("name", ["hqnet", "dresnet_025_short", "hybrid_shufflenetv2_scratch", "demo"])
def test_two_steps(name, tmp_path):
    if name not in SHIPPED:
        pytest.skip(f"{name} is not shipped")
    two_steps(name, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SHIPPED)
def test_two_steps_of_every_recipe(name, tmp_path):
    two_steps(name, tmp_path)


def test_pretrained_weights_that_cannot_be_had(tmp_path, monkeypatch):
    import cellops.models.registry as registry

    def missing(**options):
        raise OSError("no route to host")

    registry.list_models()  # so that no later import finds the name taken
    monkeypatch.setitem(registry._entries, "ghostnet_100", registry.Entry("ghostnet_100", "timm", missing))
    data = trees.sipakmed(tmp_path / "data", clusters=6, cells=2)
    recipe = load_recipe("hybrid_ghostnet", [f"data.path='{data}'", "data.input_size=32", "data.folds=2"])
    with pytest.raises(RecipeError, match="Train from scratch with --recipe hybrid_ghostnet_scratch") as told:
        start(tmp_path / "run", recipe)
    assert "with --set model.pretrained=false --set model.weights=FILE.safetensors" in str(told.value)
    recipe.name = "mine"  # which has no twin
    with pytest.raises(RecipeError, match=r"Train from scratch with --set model\.pretrained=false, or"):
        start(tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_table_within_a_budget(tmp_path, monkeypatch):
    """No time: nothing is trained. Then fold by fold over the rows, and again where it stopped; a relative --data."""
    from cellops.models.training.console import Output

    torch.set_num_threads(1)
    trees.sipakmed(tmp_path / "data", clusters=6, cells=2)
    monkeypatch.chdir(tmp_path)
    changes = [
        "data.path=data",
        "data.input_size=32",
        "data.folds=2",
        "data.protocol=grouped",
        "training.epochs=1",
        "training.batch_size=8",
        "evaluation.worst=0",
        "evaluation.cost=false",
        "evaluation.bootstrap=0",
        "model.name=shufflenet_v2_x1_0",
    ]
    table, quiet = load_table("hybrid_loss"), Output(quiet=True)
    assert train_table(table, tmp_path / "t", changes, "scratch", 0.0, "ghostnet", quiet) == 0
    text = (tmp_path / "t" / "table.md").read_text()
    assert "| GhostNet* | – | 0 of 0 | – (96.39) |" in text
    assert train_table(table, tmp_path / "t", changes, "scratch", None, "hybrid_ghostnet", quiet) == 0
    text = (tmp_path / "t" / "table.md").read_text()
    assert "| GhostNet* | grouped | 2 of 2 |" in text and "from scratch, not the paper's setting" in text
    before = (tmp_path / "t" / "hybrid_ghostnet_scratch" / "fold_1" / "metrics.json").stat().st_mtime_ns
    assert train_table(table, tmp_path / "t", changes, "scratch", None, "hybrid_ghostnet", quiet) == 0
    assert (tmp_path / "t" / "hybrid_ghostnet_scratch" / "fold_1" / "metrics.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="no row of hybrid_loss"):
        train_table(table, tmp_path / "t", changes, "scratch", None, "nothing", quiet)


@pytest.mark.parametrize("lacking", [0, 3])
def test_table_tells_which_means_leave_a_class_out(tmp_path, lacking):
    table = load_table("cells")
    found = {"folds": 5, "folds_done": 5, "mean": {"accuracy_macro": 0.775}, "lacking": lacking}
    found["together"] = {"accuracy_micro": 0.825, "accuracy_macro": 0.485}
    folder = tmp_path / table.rows[0].recipe
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"grouped": found}))
    text = write_table(table, table.rows[:1], tmp_path, "", {})
    told = "grouped: 3 test parts lack a class, which their class means leave out. Of all images together: "
    assert "77.50" in text and (f"{told}accuracy_macro 48.50." in text) == bool(lacking)


def test_rows_of_a_table_on_other_pixels_read_their_own(tmp_path):
    """HEp-2 with and without masks: the second row must not be given the first one's images."""
    from cellops.models.training.console import Output

    torch.set_num_threads(1)
    data = trees.hep2(tmp_path / "data", specimens=4, cells=4)
    changes = [
        f"data.path='{data}'",
        "data.input_size=32",
        "data.protocol=paper",
        "training.epochs=1",
        "training.batch_size=4",
        "evaluation={worst: 0, cost: false, bootstrap: 0}",
        "model={name: shufflenet_v2_x1_0, pretrained: false}",
        "model.arguments={}",
    ]
    table, quiet = load_table("hep2"), Output(quiet=True)
    assert train_table(table, tmp_path / "t", changes, "scratch", None, "hep2_coat_mini", quiet) == 0
    texts = {
        name: (tmp_path / "t" / f"hep2_coat_mini{name}_scratch" / "predictions.csv").read_text()
        for name in ("", "_unmasked")
    }
    assert texts[""] != texts["_unmasked"]
    notes = (tmp_path / "t" / "hep2_coat_mini_unmasked_scratch" / "run.json").read_text()
    assert "The masks were not used" in notes


def test_build_recipe_from_values():
    recipe = build_recipe({"optimizer": {"name": "adam", "learning_rate": 1}})
    assert recipe.training.epochs == 10
    with pytest.raises(RecipeError, match="a recipe must be a mapping"):
        build_recipe([])
