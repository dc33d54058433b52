"""What networks cost, beside counts made by hand and figures that others have published."""

from __future__ import annotations

import csv
import io
import re
import runpy
from pathlib import Path

import pytest
import torch
from networks import shipped
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")

import cellops
from cellops.models import create_model
from cellops.models.cost import COLUMNS, cost, peak_bytes, table
from cellops.models.twin import plain_twin

MEBI = 2**20


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.attention = cellops.SqueezeExcite(8, rd_channels=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(self.bn(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_by_hand(device: str) -> None:
    model = Small().to(device).train()
    found = cost(model, (3, 10, 6), measure=False)
    weights = 8 * 27 + 8 + 16 + (16 + 2 + 16 + 8) + 45
    assert found.parameters == weights
    assert found.megabytes == (4 * weights + 4 * 16 + 8) / MEBI, "running mean and variance, and a counter"
    assert found.macs == 60 * 8 * 27 + 2 * 16 + 40
    assert found.torchstat_bytes == 4 * (3 * 60 * 8 + 5)
    assert found.peak_bytes is None and found.latency_seconds is None
    assert model.training and model.bn.training, "the mode is put back"
    assert all(tensor.device.type == device for tensor in (*model.parameters(), *model.buffers()))


def test_measures() -> None:
    model = Small()
    found = cost(model, (3, 100, 60))
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    map_bytes = 4 * 8 * 6000
    assert held + 2 * map_bytes <= found.peak_bytes < held + 6 * map_bytes
    assert 0 < found.latency_seconds < 10


def test_peak_is_of_what_lives_at_a_time() -> None:
    def call() -> Tensor:
        first = torch.ones(1000)
        second = first + 1
        del first
        return second * 2

    assert 8000 <= peak_bytes(call) < 8500


@pytest.mark.parametrize(
    ("name", "macs", "torchstat"),
    [("densenet121", 2834.2e6, 147.10), ("shufflenet_v2_x1_0", 144.9e6, 20.85), ("resnet50", 4089.2e6, None)],
)
def test_published_figures(name: str, macs: float, torchstat: float | None) -> None:
    """torchvision's networks; the memory is the hybrid-loss paper's column, by torchstat."""
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        found = cost(torchvision.models.get_model(name), measure=False)
    assert found.macs == pytest.approx(macs, rel=1e-3)
    if torchstat is not None:
        assert found.torchstat_bytes / MEBI == pytest.approx(torchstat, abs=0.006)


@pytest.mark.parametrize("name", ["dresnet", "lung_resnet50", "shufflenet_v1_g3"])
def test_a_fused_network_has_the_multiply_adds_of_its_plain_twin(name: str) -> None:
    model = create_model(name, num_classes=5)
    size = (3, 96, 64)
    assert cost(model, size, measure=False).macs == cost(plain_twin(model), size, measure=False).macs


def test_a_shared_module_counts_once_and_is_put_back() -> None:
    shared = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(nn.Flatten(), shared, nn.ReLU(), shared)
    found = cost(model, (1, 2, 2), measure=False)
    assert (found.parameters, found.macs, found.megabytes) == (16, 32, 64 / MEBI)
    assert model[1].weight is model[3].weight and model[1].weight.device.type == "cpu"


@pytest.mark.parametrize("size", [(3, 224), (3, 0, 224)], ids=str)
def test_wrong_size(size: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"input_size must be (channels, height, width), all positive, got {size}")
    ):
        cost(Small(), size)


def test_nothing_to_measure_on_the_meta_device() -> None:
    with pytest.raises(ValueError, match="measure must be False"):
        cost(Small().to("meta"))


def test_table_says_the_same_in_every_style() -> None:
    names = ["dresnet_025", "alexnet"]
    rows = list(csv.reader(io.StringIO(table(names, num_classes=5, measure=False, style="csv"))))
    assert tuple(rows[0]) == COLUMNS and [row[:3] for row in rows[1:]] == [
        ["dresnet_025", "cellops", "3x224x224"],
        ["alexnet", "torchvision", "3x224x224"],
    ]
    assert rows[1][3:] == [str(cost_of("dresnet_025").parameters), "0.58", "50.6", "18.10", "", ""]
    markdown = table(names, num_classes=5, measure=False, style="markdown").splitlines()
    assert [line.strip("| ").split(" | ")[:7] for line in markdown[2:]] == [row[:7] for row in rows[1:]]
    explanation, *lines = table(names, num_classes=5, measure=False).splitlines()
    assert "half of what torch's counter reports" in explanation
    assert [line.split() for line in lines[1:]] == [row[:7] for row in rows[1:]]


def test_the_page_of_the_networks_says_the_same() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text()
    for line in table(shipped("cellops"), measure=False, style="markdown").splitlines()[2:]:
        assert " | ".join(line.strip("| ").split(" | ")[:7]) in page


def cost_of(name: str) -> object:
    with torch.device("meta"):
        return cost(create_model(name, num_classes=5), measure=False)


def test_table_takes_a_size_and_measures() -> None:
    row = table(["dresnet_025"], input_size=(1, 64, 48), num_classes=2, style="csv").splitlines()[1].split(",")
    assert row[2] == "1x64x48" and float(row[7]) > float(row[4]) and float(row[8]) > 0


def test_table_names_the_wrong_argument() -> None:
    with pytest.raises(ValueError, match="style must be one of 'text', 'csv', 'markdown', got 'html'"):
        table(["dresnet"], style="html")
    with pytest.raises(ValueError, match="did you mean 'dresnet'"):
        table(["dresnets"])
    with pytest.raises(ValueError, match="alexnet does not take an image of 3x32x32: "):
        table(["dresnet_025", "alexnet"], input_size=(3, 32, 32), measure=False)


def test_the_papers_tables_stand_beside_ours() -> None:
    """`benchmarks/paper_tables.py`: the figures that a paper has right, and the notes where it cannot be."""
    path = Path(__file__).parent.parent / "benchmarks" / "paper_tables.py"
    tables = runpy.run_path(str(path))
    text = "\n".join(tables["lines"](["hqnet", "hybrid_loss"], with_time=False))
    rows = {line.strip().partition("  ")[0]: line.split("  ") for line in text.splitlines()}

    def figures(what: str) -> list[str]:
        return [cell.strip() for cell in rows[what] if cell.strip()][1:]

    assert figures("HQNet, 5 classes")[:2] == ["469,831,237", "469,831,237"]
    assert figures("DenseNet-121, MiB of memory")[:2] == ["147.10", "147.10"]
    assert figures("ShuffleNetV2, MiB of memory")[:2] == ["20.84", "20.84"]
    assert figures("ShuffleNetV2 of DenseNet-121: multiply-adds") == ["1/50", "1/19.7", "does not follow"]
    assert figures("GhostNet of DenseNet-121: memory") == ["1/2", "1/3.7", "the sentence swaps memory and parameters"]
    assert figures("one 7x7, parameters") == ["50.23", "49", "cannot be right: no integer; 50 with biases"]
    sizes = {row[0]: row[1:3] for row in tables["dresnet_table_3"]() + tables["dresnet_table_4"]()}
    assert sizes["ShuffleNet@1 g3, MiB"] == ("7.2", "7.2") and sizes["DResNet, MiB"] == ("10.7", "10.9")
