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


def kinds() -> dict[str, Callable[[], nn.Module]]:
    """Whatever multiplies its input by what autocast computes in another type, or takes the larger of both."""
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    return {
        "torchvision": lambda: torchvision.ops.SqueezeExcitation(16, 4),
        "SEModule": lambda: timm.layers.SEModule(16, rd_channels=4),
        "EfficientNet": lambda: timm.create_model("mobilenetv3_small_050").blocks[0][0].se,
        "linear": lambda: SELayer(16, 4),
        "sequence": lambda: SEBlock(16, 4),
        "EcaModule": lambda: timm.layers.EcaModule(16),
        "eca_layer": eca_layer,
        "CBAM": lambda: timm.layers.create_attn("cbam", 16).spatial,
        "funnel": lambda: FReLU(16),
    }


EACH_KIND = ["torchvision", "SEModule", "EfficientNet", "linear", "sequence", "EcaModule", "eca_layer", "CBAM"]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*EACH_KIND, "funnel"])
def test_under_autocast_the_type_is_the_originals(kind: str, autocast: torch.dtype) -> None:
    """The ops return autocast's type, for a float32 input too: what came behind a module had another type than before.

    PyTorch promotes: float32 times a half type is float32, and so is one half type times the other.
    """
    torch.manual_seed(0)
    plain = kinds()[kind]()
    model = copy.deepcopy(plain)
    assert cellops.accelerate(model).replaced
    for training in (False, True):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if kind == "CBAM" and dtype not in (torch.float32, autocast):
                continue  # torch.cat refuses both half types under one autocast
            x, found = torch.randn(2, 16, 9, 9).to(dtype), []
            for module in (plain.train(training), model.train(training)):
                leaf = x.clone().requires_grad_()
                with torch.autocast("cpu", autocast):
                    output = module(leaf)
                (gradient,) = torch.autograd.grad(output.float().sum(), leaf)
                found.append((output, gradient))
            close = {"rtol": 0.05, "atol": 0.05}
            torch.testing.assert_close(found[1][0], found[0][0], **close)  # the dtypes too
            assert found[1][1].dtype == found[0][1].dtype  # maxima fall another way in half types: no values
    torch.compiler.reset()
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, 9, 9)
    with torch.autocast("cpu", autocast):
        torch.testing.assert_close(compiled(x), plain.eval()(x), **close)


@pytest.mark.parametrize("kind", ["torchvision", "sequence", "eca_layer"])
def test_an_image_without_a_batch_as_the_originals_take_it(kind: str) -> None:
    plain = kinds()[kind]()
    model = copy.deepcopy(plain)
    assert cellops.accelerate(model).replaced
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 16, 9, 9).contiguous(memory_format=layout)[0].requires_grad_()
        found = [(y := module(x), *torch.autograd.grad(y.square().sum(), x)) for module in (model, plain)]
        torch.testing.assert_close(*found)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), plain(x), rtol=0.02, atol=0.02)
    assert len(calls) == 3  # one a call


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


@pytest.mark.parametrize("conv", [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1, groups=2)])
def test_a_normalisation_that_is_called_elsewhere_too(conv: nn.Conv2d) -> None:
    """Its backward has saved the running statistics, and refused them once the op had learned others."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(8)
            self.body = nn.Sequential(copy.deepcopy(conv), self.bn, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.bn(x)) + self.body(x)

    plain = drawn(Shared)
    model = copy.deepcopy(plain)
    assert cellops.accelerate(model).replaced and model.body[1] is model.bn
    images = torch.randn(2, 8, 20, 20, dtype=torch.float64)
    for training in (True, False):
        assert_same(step(model.train(training), images), step(plain.train(training), images))
