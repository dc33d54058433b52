"""The cost tables of the papers computed again: the printed figure, ours, and a note where the paper cannot be right.

python benchmarks/paper_tables.py              # all of them
python benchmarks/paper_tables.py --no-time    # without HQNet's Table II, the only one that is measured
python benchmarks/paper_tables.py dresnet      # one paper: hqnet, dresnet or hybrid_loss

MB in the papers are MiB (2^20 bytes). Networks have 1000 classes unless a title says so; sizes are those of a file of
parameters and buffers. A printed figure of "–" is not in the text of the paper.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, beside the package

from cellops.models import create_model
from cellops.models.cost import Cost, cost

Row = tuple[str, str, str, str]
"""What, printed, ours, note."""


def cost_of(name: str, num_classes: int = 1000, **options: Any) -> Cost:
    """From shapes alone, at 224 x 224."""
    with torch.device("meta"):
        return cost(create_model(name, num_classes=num_classes, **options), measure=False)


# 000 HQNet


def stacks(channels: int) -> dict[str, nn.Module]:
    """One 7x7 convolution and three 3x3, of the same field of view."""
    three = nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(3)))
    return {"one 7x7": nn.Conv2d(channels, channels, 7, padding=3, bias=False), "three 3x3": three}


def hqnet_parameters() -> list[Row]:
    """Fig. 5's total."""
    return [
        ("HQNet, 5 classes", "469,831,237", f"{cost_of('hqnet', 5).parameters:,}", "each layer of Fig. 5 is tested")
    ]


def hqnet_table_1() -> list[Row]:
    """Parameters and multiply-adds of one channel; without biases, at stride 1 on 224 x 224."""
    rows: list[Row] = []
    printed = {"one 7x7": ("50.23", "2.522"), "three 3x3": ("27.85", "1.394")}
    for name, network in stacks(1).items():
        found, (parameters, macs) = cost(network, (1, 224, 224), measure=False), printed[name]
        with_bias = found.parameters + len(list(network.parameters()))
        note = f"cannot be right: no integer; {with_bias} with biases"
        rows.append((f"{name}, parameters", parameters, str(found.parameters), note))
        note = "unit not printed; the printed pair is about its own parameters times 224 x 224"
        rows.append((f"{name}, M multiply-adds", macs, f"{found.macs / 1e6:.3f}", note))
    ratio = 49 / 27
    rows.append(("one 7x7 over three 3x3", "almost twice", f"{ratio:.2f}x", "the printed figures say 1.80x and 1.81x"))
    return rows


def hqnet_table_2() -> list[Row]:
    """Median seconds of 20 calls on 8 images of 112 x 112 (the paper names neither), forward only, on this machine."""
    printed = {8: (0.834, 0.572), 16: (0.042, 0.061), 32: (0.076, 0.072), 64: (0.244, 0.142), 128: (1.783, 0.436)}
    notes = {
        8: "cannot be the layers': more than at 64 channels, so a first call on the GPU",
        16: "here the 3x3 are the slower ones, against the text",
    }
    rows: list[Row] = []
    for channels, (one, three) in printed.items():
        images = torch.randn(8, channels, 112, 112)
        found = {name: 20 * _seconds(network, images) for name, network in stacks(channels).items()}
        for name, figure in zip(found, (one, three), strict=True):
            rows.append(
                (f"{name}, {channels} channels, s", f"{figure:.3f}", f"{found[name]:.3f}", notes.get(channels, ""))
            )
    rows.append(("title of the last column", "Three 1 x 1 conv", "three 3x3", "a slip: the text speaks of 3x3"))
    return rows


@torch.no_grad()
def _seconds(network: nn.Module, images: torch.Tensor, rounds: int = 5) -> float:
    network(images)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        network(images)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


# 001 DResNet

HALF: dict[str, Any] = {"channels": (32, 64, 128, 256)}
QUARTER: dict[str, Any] = {"channels": (16, 32, 64, 128)}
"""All widths but the stem's, which timm keeps."""


def dresnet_table_3() -> list[Row]:
    """Sizes in MiB, and compression in percent of ResNet-50."""
    cases: list[tuple[str, str, dict[str, Any], float, float | None, str]] = [
        ("ResNet-50", "resnet50", {}, 98.5, None, ""),
        ("DResNet", "dresnet", {}, 11.2, 10.4, "widths and groups are ours, chosen for this size"),
        ("ResNet-50@.5", "resnet50", HALF, 65.7, 65.9, "cannot be right: half of the widths leaves about a quarter"),
        (
            "DResNet@.5",
            "dresnet_050",
            {},
            7.4,
            7.9,
            "cannot be of half the width beside 11.2; nor follow one rule with @.25",
        ),
        (
            "ResNet-50@.25",
            "resnet50",
            QUARTER,
            17.4,
            18.1,
            "cannot be right: a quarter of the widths leaves about a thirteenth",
        ),
        ("DResNet@.25", "dresnet_025", {}, 1.7, 2.0, ""),
    ]
    rows: list[Row] = []
    whole = cost_of("resnet50").megabytes
    for title, name, options, size, compression, note in cases:
        found = cost_of(name, **options).megabytes
        rows.append((f"{title}, MiB", f"{size:.1f}", f"{found:.1f}", note))
        if compression is not None:
            own = 100 * size / 98.5
            slip = f"the printed sizes give {own:.1f}" if abs(own - compression) > 0.05 else ""
            rows.append((f"{title}, % of ResNet-50", f"{compression:.1f}", f"{100 * found / whole:.1f}", slip))
    for title, accuracy, error in (
        ("DResNet", 93.6, -0.9),
        ("ResNet-50@.5", 94.6, -0.7),
        ("DResNet@.5", 93.3, -2.1),
        ("ResNet-50@.25", 93.1, -1.9),
        ("DResNet@.25", 89.9, -5.1),
    ):
        own = round(accuracy - 95.4, 1)
        note = f"{accuracy} - 95.4, its own accuracies" + ("" if own == error else "; the printed figure is another")
        rows.append((f"{title}, error against ResNet-50", f"{error:+.1f}", f"{own:+.1f}", note))
    return rows


def dresnet_table_4() -> list[Row]:
    """Sizes of light networks in MiB."""
    cases = [
        ("ResNet-18", "resnet18", 44.5, ""),
        ("ShuffleNet@1 g3", "shufflenet_v1_g3", 7.2, ""),
        ("MobileNet", "mobilenetv1_100", 16.7, ""),
        ("MobileNet v2", "mobilenetv2_100", 17.4, "cannot be right at width 1: 3.5 million parameters"),
        ("DResNet", "dresnet", 10.7, "11.2 in Table 3"),
    ]
    return [
        (f"{title}, MiB", f"{size:.1f}", f"{cost_of(name).megabytes:.1f}", note) for title, name, size, note in cases
    ]


def dresnet_memory() -> list[Row]:
    """The sentence on run-time memory: Caffe's whole process there, torch's tensors for one image here."""
    note = "Caffe's process, batch not named; ours: parameters and live tensors of one image"
    found = {}
    for name in ("dresnet", "resnet50"):
        found[name] = cost(create_model(name)).peak_bytes / 2**20
    less = 100 * (1 - found["dresnet"] / found["resnet50"])
    whole = 533 / (1 - 0.85)
    return [
        ("DResNet at run time, MB", "533", f"{found['dresnet']:.0f}", note),
        ("less than ResNet-50, %", "85", f"{less:.0f}", f"so ResNet-50 had {whole:.0f} MB, on a board with 2 GB"),
    ]


# 002 hybrid loss


def hybrid_loss() -> list[Row]:
    """Parameters, torchstat's memory and multiply-adds at 224 x 224 with 5 classes, and the claims of the abstract."""
    printed = {"densenet121": ("DenseNet-121", "147.10"), "shufflenet_v2_x1_0": ("ShuffleNetV2", "20.84")}
    others = {
        "alexnet": "AlexNet",
        "vgg16": "VGG-16",
        "vgg19": "VGG-19",
        "resnet101": "ResNet-101",
        "squeezenet1_1": "SqueezeNet 1.1",
        "mobilenetv2_100": "MobileNetV2",
        "ghostnet_100": "GhostNet",
    }
    costs = {name: cost_of(name, 5) for name in (*printed, *others)}
    with torch.device("meta"):  # torchvision's; timm's pools by a module of its own
        costs["densenet121"] = cost(torchvision.models.densenet121(num_classes=5), measure=False)
    rows: list[Row] = []
    for name, found in costs.items():
        title, memory = printed[name] if name in printed else (others[name], "–")
        rows.append((f"{title}, M parameters", "–", f"{found.parameters / 1e6:.3f}", ""))
        note = "of its Table 3, which our copy lacks; torchstat's rule" if memory != "–" else ""
        rows.append((f"{title}, MiB of memory", memory, f"{found.torchstat_bytes / 2**20:.2f}", note))
        rows.append((f"{title}, M multiply-adds", "–", f"{found.macs / 1e6:.1f}", ""))
    whole = costs["densenet121"]
    claims = {
        "shufflenet_v2_x1_0": ("1/7", "1/6", "1/50", {"M multiply-adds": "does not follow"}),
        "ghostnet_100": (
            "1/2",
            "1/4",
            "1/50",
            {
                "memory": "the sentence swaps memory and parameters",
                "parameters": "the sentence swaps memory and parameters",
                "M multiply-adds": "does not follow",
            },
        ),
    }
    for name, (*figures, notes) in claims.items():
        found, title = costs[name], printed.get(name, (others.get(name), ""))[0]
        ratios = {
            "memory": whole.torchstat_bytes / found.torchstat_bytes,
            "parameters": whole.parameters / found.parameters,
            "M multiply-adds": whole.macs / found.macs,
        }
        for (what, ratio), claim in zip(ratios.items(), figures, strict=True):
            label = f"{title} of DenseNet-121: {what.removeprefix('M ')}"
            rows.append((label, claim, f"1/{ratio:.1f}", notes.get(what, "")))
    return rows


TABLES: dict[str, dict[str, Callable[[], list[Row]]]] = {
    "hqnet": {
        "HQNet, Fig. 5": hqnet_parameters,
        "HQNet, Table I: one channel": hqnet_table_1,
        "HQNet, Table II: time (there an RTX 2080)": hqnet_table_2,
    },
    "dresnet": {
        "DResNet, Table 3: size": dresnet_table_3,
        "DResNet, Table 4: light networks": dresnet_table_4,
        "DResNet, memory": dresnet_memory,
    },
    "hybrid_loss": {"Hybrid loss, Table 3: cost columns, 5 classes": hybrid_loss},
}


def lines(papers: list[str], with_time: bool) -> list[str]:
    """The tables as aligned text."""
    text: list[str] = []
    for paper in papers:
        for title, make in TABLES[paper].items():
            if make is hqnet_table_2 and not with_time:
                continue
            rows = [("", "printed", "ours", "note"), *make()]
            first, second, third = (max(len(row[i]) for row in rows) for i in range(3))
            text += ["", title]
            text += [
                f"  {row[0].ljust(first)}  {row[1].rjust(second)}  {row[2].rjust(third)}  {row[3]}".rstrip()
                for row in rows
            ]
    return text[1:]


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", nargs="*", choices=[*TABLES, []], help="all if none is given")
    parser.add_argument("--no-time", action="store_true", help="leave out what is measured in seconds")
    options = parser.parse_args()
    for line in lines(options.paper or list(TABLES), not options.no_time):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
