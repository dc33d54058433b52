"""The registry, and what every network of the zoo does: logits, gradients, timm's methods."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from networks import shipped
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")
import timm

from cellops.models import create_model, list_models, model_source, register_network, registry

HERE = "deform_resnet50 dresnet dresnet_025 dresnet_050 hqnet hqnet_dcn hqnet_tiny lung_resnet50 shufflenet_v1_g3"
TIMM = (
    "resnet18 resnet34 resnet50 resnet101 resnet50c resnet50d resnext50_32x4d densenet121 vgg16 vgg19 "
    "mobilenetv1_100 mobilenetv2_100 ghostnet_100 convnext_base coat_mini"
)
TORCHVISION = "alexnet squeezenet1_1 shufflenet_v2_x1_0"
LARGE = {"hqnet", "vgg16", "vgg19", "convnext_base", "resnet101"}
"""Seconds to draw, or more than a tenth of a billion parameters: run for real by `-m exhaustive` only."""


def marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.exhaustive if name in LARGE else ()) for name in names]


def test_lists_the_networks_of_each_source() -> None:
    """Those of the papers, no more and no fewer."""
    for source, names in {"cellops": HERE, "timm": TIMM, "torchvision": TORCHVISION}.items():
        assert sorted(shipped(source)) == sorted(names.split())
        assert {model_source(name) for name in list_models(source)} == {source}
    assert sorted(shipped()) == sorted(f"{HERE} {TIMM} {TORCHVISION}".split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hqnet_tin",), "name must be .* 'hqnet_tin'; did you mean 'hqnet_tiny'"),
        (("resnet152",), "name must be .* got 'resnet152'"),
        (("hqnet.fb_in22k",), "name must be .* got 'hqnet.fb_in22k'"),
        (("dresnet", -1), "num_classes must be at least 0, got -1"),
        (("dresnet", 2, False, 0), "in_chans must be at least 1, got 0"),
        (("dresnet", 2, True), "pretrained must be False for 'dresnet'"),
    ],
    ids=str,
)
def test_names_the_wrong_argument(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(*arguments)


def test_unknown_source() -> None:
    with pytest.raises(ValueError, match=r"source must be None or one of .* got 'keras'"):
        list_models("keras")


@pytest.mark.parametrize("name", ["resnet18", "convnext_base.fb_in22k", "alexnet", "deform_resnet50"])
def test_says_that_weights_could_not_be_had(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", fail)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(RuntimeError, match=f"the weights of '{name}' .* could not be had: no route to host"):
        create_model(name, pretrained=True)


def test_a_tag_chooses_timms_configuration() -> None:
    with torch.device("meta"):
        model = create_model("convnext_base.fb_in22k", num_classes=6)
    assert model.pretrained_cfg["tag"] == "fb_in22k" and model.num_classes == 6


def test_a_network_is_added_by_one_decorator(spare_registry: None) -> None:
    class Bare(nn.Module):
        def __init__(self, num_classes: int, in_chans: int, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(in_chans * width, num_classes)

    @register_network(input_size=(3, 8, 8), classifier="fc")
    def bare(num_classes: int, in_chans: int, width: int = 1) -> nn.Module:
        return Bare(num_classes, in_chans, width)

    assert "bare" in list_models("cellops") and model_source("bare") == "cellops"
    model = create_model("bare", num_classes=7, in_chans=2, width=3)
    assert model.fc.weight.shape == (7, 6)
    assert model.default_cfg["input_size"] == (3, 8, 8) and model.default_cfg["num_classes"] == 7
    assert timm.create_model("bare", num_classes=7, width=2).fc.in_features == 6
    with pytest.raises(ValueError, match="name must be new, but 'resnet18' is a network of timm"):
        registry.add("resnet18", "cellops", bare)


@pytest.mark.parametrize("name", HERE.split())
def test_timm_builds_ours(name: str) -> None:
    assert timm.is_model(name)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3, in_chans=1, drop_rate=0.25)
    assert model.default_cfg["architecture"] == name and model.pretrained_cfg is model.default_cfg
    assert next(model.parameters()).shape[1] == 1 and model.get_classifier().out_features == 3
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == model.default_cfg["input_size"]


def test_importing_the_package_is_light() -> None:
    """`cellops doctor` runs without the [models] extra: timm is imported with the first network."""
    code = """
import sys
sys.modules["timm"] = None
import cellops.models, cellops.models.cli
assert not {"torchvision", "matplotlib"} & set(sys.modules)
assert "create_model" in dir(cellops.models)
try:
    cellops.models.create_model
except ImportError:
    print("light")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert done.stdout == "light\n"


def check_methods(model: nn.Module, input: Tensor) -> None:
    """timm's methods agree with each other, and gradients come to every parameter."""
    model.train()
    assert model.num_classes == 5
    logits = model(input)
    assert logits.shape == (2, 5) and logits.dtype == input.dtype
    logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.eval()
    with torch.no_grad():
        features = model.forward_features(input)
        if not isinstance(features, list):  # coat_mini's: tokens of three scales
            assert features.dim() == 4 and features.shape[:2] == (2, model.num_features)
        hidden = model.forward_head(features, pre_logits=True)
        assert hidden.shape == (2, model.head_hidden_size)
        if input.device.type != "meta":
            torch.testing.assert_close(model.forward_head(features), model(input))
        else:
            assert model.forward_head(features).shape == (2, 5)
        model.reset_classifier(3)
        assert model(input).shape == (2, 3) and model.num_classes == 3
        model.reset_classifier(0)
        assert model(input).shape == (2, model.head_hidden_size)
        assert isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize("name", f"{HERE} {TIMM} {TORCHVISION}".split())
def test_methods_by_shapes(name: str) -> None:
    """Every network at its own input size, on the meta device."""
    with torch.device("meta"):
        model = create_model(name, num_classes=5)
        input = torch.empty(2, *model.default_cfg["input_size"])
    check_methods(model, input)


@pytest.mark.parametrize("name", marked(f"{HERE} {TIMM} {TORCHVISION}".split()))
def test_methods_with_values(name: str) -> None:
    """The same for real, small and with another number of channels."""
    options = {"img_size": (96, 64)} if name == "coat_mini" else {}
    model = create_model(name, num_classes=5, in_chans=2, **options)
    check_methods(model, torch.randn(2, 2, 96, 64))


@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_1", "shufflenet_v2_x1_0"])
def test_torchvisions_own_weights_load(name: str) -> None:
    """Same keys, same logits; another first convolution for other channels is made of the old weights as timm does."""
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.get_model(name).eval()
    ours = create_model(name).eval()
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(1, 3, 80, 80)
    with torch.no_grad():
        torch.testing.assert_close(ours(input), theirs(input))


def test_pretrained_weights_are_adapted_to_other_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    weights = torchvision.models.get_model("squeezenet1_1").state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: weights)
    gray = create_model("squeezenet1_1", num_classes=2, pretrained=True, in_chans=1)
    expected = weights["features.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(gray.features[0].weight.detach(), expected)
    torch.testing.assert_close(gray.features[3].squeeze.weight.detach(), weights["features.3.squeeze.weight"])
