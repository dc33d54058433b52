"""Exported networks: what onnxruntime and another process compute from the files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import shipped
from torch import Tensor, nn

import cellops
from cellops import testing
from cellops.models import create_model, onnx_rules
from cellops.models.cli import main
from cellops.models.data import read_image
from cellops.models.export import ExportError, export_onnx, export_program, onnx_session
from cellops.models.prediction import Predictor
from cellops.models.prediction.preparation import Preparation

onnx = pytest.importorskip("onnx")
for package in ("onnxruntime", "onnxscript", "timm"):
    pytest.importorskip(package)

has_deform_conv = pytest.mark.skipif(
    tuple(map(int, version("onnxruntime").split(".")[:2])) < (1, 25),
    reason="onnxruntime has DeformConv since 1.25, which there is none of for Python 3.10",
)

SMALL: dict[str, dict[str, Any]] = {
    "hqnet_tiny": {"depths": (1, 1), "width": 8},
    "hqnet_dcn": {"depths": (1, 1), "width": 8},
    "lung_resnet50": {"depths": (1, 1), "width": 8},
    "shufflenet_v1_g3": {"depths": (1, 2, 1)},
}
"""Networks of fewer layers, which hold all that the full ones do."""
DEFORMABLE = ("hqnet_dcn", "deform_resnet50")
FULL = [name for name in shipped("cellops") if name != "hqnet"]  # 1.8 GiB; hqnet_tiny has its layers


def drawn(name: str, **options: Any) -> nn.Module:
    """A network whose every branch shows: some normalisations start at 0."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, cellops.DeformConv2dPack):
            nn.init.normal_(module.conv_offset.weight, std=0.1)
    return model


def real_images(size: int) -> Tensor:
    """Cells of blood and of a cervical smear, as networks see them, [N, 3, size, size]."""
    root = Path(os.environ.get("CELLOPS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    files = [next(iter(sorted(folder.glob("*.*g"))), None) for folder in sorted(root.glob("*/*"))]
    files += sorted(root.glob("cric/crops/*/*.png"))[:4]
    chosen = [file for file in files if file is not None][:8]
    if not chosen:
        pytest.skip(f"no real images: {root} holds none (CELLOPS_DATA names another folder)")
    preparation = Preparation((size, size), (size, size))
    return torch.stack([preparation(read_image(file)) for file in chosen])


def assert_exported(model: nn.Module, path: Path, size: int, real: Tensor | None = None) -> None:
    """One file of standard operators that computes the same for any batch; the network stays as it was."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = model.training
    written = export_onnx(model, path, (3, size, size), metadata={"classes": '["a", "b"]'})
    assert model.training == training and model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert sorted(path.parent.iterdir()) == [path] and written.size == path.stat().st_size
    assert b"site-packages" not in path.read_bytes() and b"forward(" not in path.read_bytes()  # traces of this machine
    loaded = onnx.load(path)
    assert {node.domain for node in loaded.graph.node} == {""} and not loaded.functions
    assert {entry.key: entry.value for entry in loaded.metadata_props}["classes"] == '["a", "b"]'
    session = onnx_session(path)
    for images in [torch.randn(7, 3, size, size), *([] if real is None else [real, real[:1]])]:
        with torch.no_grad():
            wanted = model.eval()(images)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
        assert written.difference is not None and float(wanted.abs().max()) > 1e-3


def marked(names: list[str]) -> list[Any]:
    """Names, of networks with deformable convolutions only where onnxruntime has them."""
    return [pytest.param(name, marks=has_deform_conv if name in DEFORMABLE else ()) for name in names]


@pytest.mark.parametrize("name", marked(list(SMALL)))
def test_small_networks_in_onnxruntime(name: str, tmp_path: Path) -> None:
    assert_exported(drawn(name, **SMALL[name]), tmp_path / "network.onnx", 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(FULL))
def test_networks_in_onnxruntime(name: str, tmp_path: Path) -> None:
    """On random images, and on real ones where they are at hand."""
    assert_exported(drawn(name), tmp_path / "network.onnx", 96, real_images(96))


class EveryRule(nn.Module):
    """Each op with each of its settings, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        groups = [
            cellops.GroupConv1x1(12, 12, 3, activation=name, shuffle=name in ("relu", "silu"), norm=name != "gelu")
            for name in onnx_rules.ACTIVATIONS
            if "sigmoid" not in name
        ]
        attention = [
            cellops.SqueezeExcite(12, rd_channels=4, act=act, gate=gate)
            for act in ("relu", "silu")
            for gate in ("sigmoid", "hard_sigmoid")
        ]
        self.body = nn.Sequential(
            *groups,
            *attention,
            cellops.EfficientChannelAttention(12),
            cellops.SpatialAttention(12, 3),
            cellops.SpatialAttention(mode="pool"),
            cellops.FReLU(12, 5),
            cellops.FReLU(12, norm=False),
            cellops.ConvOffset2d(12, init_std=0.5),
            cellops.ConvOffset2d(12, "interleaved", init_std=0.5),
        )
        self.predict = nn.Conv2d(12, 3 * 2 * 9, (3, 2), (2, 1), (2, 1), (1, 2))
        self.conv = cellops.DeformConv2d(12, 6, 3, 1, 1, groups=3)
        self.pack = cellops.DeformConv2dPack(6, 4, (3, 2), (2, 1), (2, 1), (1, 2), offset_groups=2, modulated=False)
        nn.init.normal_(self.pack.conv_offset.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        offset = x.new_full((1, 18, 1, 1), 0.4).expand(x.shape[0], -1, *x.shape[2:])
        return self.pack(self.conv(x, offset + x[:, :1], x[:, :9].sigmoid())).flatten(1)


def test_an_operator_that_onnxruntime_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(file: Path) -> Any:
        raise NotImplementedError("[ONNXRuntimeError] : 9 : Could not find an implementation for DeformConv(19)")

    monkeypatch.setattr("cellops.models.export.onnx_session", lacking)
    with pytest.raises(ExportError, match=r"onnxruntime \S+ cannot run the file: .*DeformConv\(19\)\. .*--no-check"):
        export_onnx(nn.Conv2d(3, 4, 1), tmp_path / "network.onnx", (3, 8, 8))
    assert not list(tmp_path.iterdir())
    export_onnx(nn.Conv2d(3, 4, 1), tmp_path / "network.onnx", (3, 8, 8), check=False)


@has_deform_conv
def test_every_setting_of_every_op_in_onnxruntime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EveryRule().eval()
    written = export_onnx(model, tmp_path / "rules.onnx", (12, 9, 11))
    assert written.operators["DeformConv"] == 2 and written.operators["GridSample"] == 2
    fixed = export_onnx(model, tmp_path / "fixed.onnx", (12, 9, 11), dynamic_batch=False)
    assert fixed.difference is not None
    shape = onnx.load(tmp_path / "fixed.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [1, 12, 9, 11]


@pytest.mark.parametrize("case", [case for case in testing.CASES if hasattr(onnx_rules, case.op)], ids=lambda c: c.name)
def test_rules_on_the_cases_of_their_ops(case: testing.Case) -> None:
    """The formulas that the files are made of, in float64, where no rounding hides a difference."""
    if case.op == "offset_sample2d" and ("nan" in case.name or "special" in case.name):
        pytest.skip("GridSample does not say what becomes of a NaN")
    arguments = case.make(torch.float64)
    operator = getattr(torch.ops.cellops, case.op).default
    names = [argument.name for argument in operator._schema.arguments if argument.name != "backend"]
    defaults = {argument.name: argument.default_value for argument in operator._schema.arguments}
    values = [arguments.get(name, defaults[name]) for name in names]
    torch.testing.assert_close(getattr(onnx_rules, case.op)(*values), operator(*values), rtol=1e-9, atol=1e-9)


def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), cellops.EfficientChannelAttention(8), nn.Flatten())
    path = tmp_path / "network.onnx"
    path.write_text("an older file")
    monkeypatch.setattr(onnx_rules, "eca", lambda input, weight, backend=None: input * 1.01)
    table = {torch.ops.cellops.eca.default: onnx_rules.eca}
    monkeypatch.setattr(onnx_rules, "decompositions", lambda: table)
    with pytest.raises(ExportError, match=r"logits, up to .* differ by"):
        export_onnx(model, path, (3, 6, 6))
    assert path.read_text() == "an older file" and list(tmp_path.iterdir()) == [path]


class DependsOnValues(nn.Module):
    """What no graph can say."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_bad_input_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match="input_size must be three positive integers"):
        export_onnx(model, tmp_path / "x.onnx", (3, 8))
    with pytest.raises(ExportError, match=r"torch\.export cannot follow the network"):
        export_onnx(DependsOnValues(), tmp_path / "x.onnx", (3, 8, 8))
    with pytest.raises(ValueError, match="is a folder"):
        export_program(model, tmp_path, (3, 8, 8))
    wrong = {
        "does not end in .onnx, .pt2 or .safetensors": ["dresnet_025", "--output", str(tmp_path / "x.bin")],
        "did you mean 'dresnet_025'": ["dresnet_25", "--output", str(tmp_path / "x.onnx")],
        "--train is of --format pt2": ["dresnet_025", "--train", "--output", str(tmp_path / "x.onnx")],
        "need a run": ["dresnet_025", "--images", str(tmp_path), "--output", str(tmp_path / "x.onnx")],
        "--int8 needs a trained run": ["dresnet_025", "--int8", "--output", str(tmp_path / "x.onnx")],
        "--int8 is of --format onnx": ["dresnet_025", "--int8", "--output", str(tmp_path / "x.pt2")],
        "--calibrate is of --int8": ["dresnet_025", "--calibrate", str(tmp_path), "--output", str(tmp_path / "x.onnx")],
    }
    for text, arguments in wrong.items():
        assert main(["export", *arguments]) == 2
        assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


ELSEWHERE = """
import sys
import torch
import cellops

torch.manual_seed(0)
assert not any(name.startswith("cellops.models.zoo") or name == "timm" for name in sys.modules)
images = torch.load(sys.argv[2])
network = torch.export.load(sys.argv[1]).module()
if sys.argv[3] == "run":
    with torch.no_grad():
        torch.save([network(images), network(images[:1])], sys.argv[4])
else:
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    targets = torch.arange(len(images)) % 5
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
        losses.append(float(loss))
    changed = sum(not torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    torch.save([torch.tensor(losses), torch.tensor(changed)], sys.argv[4])
"""


def elsewhere(path: Path, images: Tensor, what: str) -> list[Tensor]:
    """What another process finds, which knows cellops and no network."""
    given, found = path.with_suffix(".images"), path.with_suffix(".found")
    torch.save(images, given)
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(path), str(given), what, str(found)], check=True, timeout=300)
    return torch.load(found)


def test_programs_run_and_train_in_another_process(tmp_path: Path) -> None:
    model = drawn("lung_resnet50", depths=(1, 1), width=8)
    images = torch.randn(10, 3, 32, 32)
    assert export_program(model, tmp_path / "run.pt2", (3, 32, 32)).difference is not None
    many, one = elsewhere(tmp_path / "run.pt2", images, "run")
    with torch.no_grad():
        wanted = model.eval()(images)
    torch.testing.assert_close(many, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, wanted[:1], rtol=1e-4, atol=1e-5)

    export_program(model, tmp_path / "train.pt2", (3, 32, 32), train=True)
    losses, changed = elsewhere(tmp_path / "train.pt2", images, "train")
    assert losses[-1] < 0.8 * losses[0]
    assert int(changed) == sum(1 for _ in model.buffers())

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for wanted_loss in losses[:3]:
        loss = nn.functional.cross_entropy(model(images), torch.arange(10) % 5)
        torch.testing.assert_close(loss.detach(), wanted_loss, rtol=1e-3, atol=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 60 drawn cells."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = ["data.options.count=60", "data.input_size=32", "data.options.size=32", "evaluation.bootstrap=0"]
    settings = [word for setting in settings for word in ("--set", setting)]
    arguments = ["train", "--recipe", "demo", "--model", "dresnet_025", "--epochs", "1", "--quiet", *settings]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))
        assert main([*arguments, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def few_images(tmp_path: Path) -> Path:
    """A folder of three."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        pixels = (torch.rand(40, 50, 3, generator=torch.Generator().manual_seed(i)) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def said(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.slow
def test_command(trained: Path, few_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run's file says what a user of it must know, and predicts as the run does."""
    path = tmp_path / "x.onnx"
    assert main(["export", str(trained), "--output", str(path), "--images", str(few_images)]) == 0
    assert "Conv, " in capsys.readouterr().out
    assert len(json.loads(said(path)["classes"])) == 5 and said(path)["model"] == "dresnet_025"
    assert said(path)["trained_on_synthetic_images"] == "True" and json.loads(said(path)["normalise"]) == "imagenet"
    for tta in ("none", "dihedral"):
        of_run = list(Predictor.load(trained, tta=tta)(few_images))
        of_file = list(Predictor.load(path, tta=tta)(few_images))
        for one, other in zip(of_run, of_file, strict=True):
            assert one.image == other.image and other.probabilities == pytest.approx(one.probabilities, abs=1e-4)
    assert main(["export", str(trained), "--output", str(tmp_path / "x.pt2")]) == 0
    assert main(["export", str(trained), "--classes", "3", "--output", str(tmp_path / "y.pt2")]) == 2
    assert main(["export", "dresnet_025", "--size", "32", "--output", str(path)]) == 0
    with pytest.raises(ValueError, match="does not say how images are prepared"):
        Predictor.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Predictor.load(path)


def test_another_size_than_the_runs(trained: Path, tmp_path: Path) -> None:
    """Images are not shrunk to the run's 32 pixels and enlarged again."""
    path = tmp_path / "x.onnx"
    assert main(["export", str(trained), "--output", str(path), "--size", "96", "64", "--no-check"]) == 0
    preparation = json.loads(said(path)["preparation"])
    assert preparation["input_size"] == preparation["store_size"] == [96, 64]


@pytest.mark.slow
def test_command_in_8_bits(trained: Path, few_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What the command says of accuracy is what the file does on the held-out images."""
    path = tmp_path / "small.onnx"
    assert main(["export", str(trained), "--output", str(path), "--int8", "--calibration-images", "16"]) == 0
    out = capsys.readouterr().out
    first = path.read_bytes()
    metrics = json.loads((trained / "metrics.json").read_text())
    count = metrics["training"]["images"]["test"]
    assert f"in float32 {metrics['metrics']['accuracy_micro']:.1%}" in out and "ranges from 16 images" in out
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "QuantizeLinear" in operators and {node.domain for node in onnx.load(path).graph.node} == {""}
    from cellops.models.training.apply import run_images
    from cellops.models.training.console import Output

    session, right, seen = onnx_session(path), 0, 0
    for images, labels in run_images(trained, Output(quiet=True)).judged():
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0]).argmax(1)
        right, seen = right + int((found == labels).sum()), seen + len(labels)
    assert seen == count and f"accuracy on {count} held-out images: {right / seen:.1%}" in out
    assert len(list(Predictor.load(path)(few_images))) == 3
    assert main(["export", str(trained), "--output", str(path), "--int8", "--calibrate", str(few_images)]) == 0
    assert "ranges from 3 images" in capsys.readouterr().out and path.read_bytes() != first
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((trained / "weights.safetensors").read_bytes())
    assert main(["export", str(weights), "--output", str(tmp_path / "y.onnx"), "--int8"]) == 2
    assert "lies in no run, whose images it could be judged on" in capsys.readouterr().err
    assert not (tmp_path / "y.onnx").exists()
