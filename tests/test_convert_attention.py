"""`accelerate` on modules written by hand: attention, classes with methods; and from within other modes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from test_convert import Deformable, FReLU, assert_same, drawn, step
from torch import Tensor, nn

import cellops


class SELayer(nn.Module):
    """Squeeze-and-excitation with linear layers in a sequence, as the paper's authors and most repositories have it."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(inplace=True), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, _ = x.size()
        return x * self.fc(self.avg_pool(x).view(batch, channels)).view(batch, channels, 1, 1).expand_as(x)


class SEBlock(nn.Module):
    """The same with 1x1 convolutions, the pooling in the sequence too."""

    def __init__(self, channels: int, hidden: int, gate: nn.Module | None = None) -> None:
        super().__init__()
        layers = (nn.Conv2d(channels, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, channels, 1))
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers, gate or nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x)


class eca_layer(nn.Module):
    """Efficient channel attention under its authors' name."""

    def __init__(self) -> None:
        super().__init__()
        self.avg_pool, self.sigmoid = nn.AdaptiveAvgPool2d(1), nn.Sigmoid()
        self.conv = nn.Conv1d(1, 1, 5, padding=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.avg_pool(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * self.sigmoid(y).expand_as(x)


def test_attention_as_its_authors_wrote_it() -> None:
    plain = drawn(lambda: nn.Sequential(SELayer(16, 4), SEBlock(16, 4), eca_layer()))
    model = copy.deepcopy(plain)
    assert len(cellops.accelerate(model).replaced) == 3
    images = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    assert_same(step(model, images), step(plain, images))
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(copy.deepcopy(model)(images), plain(images))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), plain(images))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), plain(images))
    report = cellops.accelerate(SEBlock(16, 4, nn.Tanh()))
    assert not report.replaced and report.left[0].reason == "its 4 is a Tanh, which squeeze_excite does not have"


def test_a_sequence_of_an_excitation_is_called_where_it_was_changed() -> None:
    images = torch.randn(2, 16, 9, 9)
    for plain, name in ((SELayer(16, 4), "fc"), (SEBlock(16, 4), "se")):
        model = copy.deepcopy(plain)
        assert cellops.accelerate(model).replaced
        for module in (plain, model):
            body = module.get_submodule(name)
            body[-1] = nn.Tanh()
            body.register_forward_hook(lambda module, inputs, output: 2 * output)
        torch.testing.assert_close(model(images), plain(images))


@pytest.mark.parametrize("within", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "device"])
def test_accelerated_whatever_mode_the_caller_is_in(within: Callable[[], AbstractContextManager[object]]) -> None:
    """The comparison wants gradients, and draws on the CPU also where another device is the default."""
    model = nn.Sequential(SELayer(16, 4), FReLU(16), Deformable(16))
    with within():
        report = cellops.accelerate(model)
    assert len(report.replaced) == 3, report


class Frozen(nn.Sequential):
    """A sequence whose normalisation learns no statistics, as detectors freeze their first stages."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[1].eval()
        return self


class Renaming(nn.Sequential):
    """A sequence that loads the keys of an older version."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        if (old := f"{prefix}conv.weight") in state_dict:
            state_dict[f"{prefix}0.weight"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(super().__iter__()))


@pytest.mark.parametrize(
    ("kind", "name"), [(Frozen, "train"), (Renaming, "_load_from_state_dict"), (Backwards, "__iter__")]
)
def test_a_class_keeps_its_methods(kind: type[nn.Sequential], name: str) -> None:
    """The forward of these is nn.Sequential's, so they were replaced without a comparison."""
    model = nn.Sequential(kind(nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8), nn.ReLU()))
    report = cellops.accelerate(model)
    assert type(model[0]) is kind and report.left[0].reason == f"its class has another {name}"
