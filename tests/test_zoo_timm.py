"""The networks written here as timm's users take them: features, heads, weights of files, layer decay, checkpoints."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import shipped
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")
import timm
from timm.models import create_feature_extractor, group_parameters
from timm.optim import create_optimizer_v2

from cellops.models import create_model, register_network

SMALL: dict[str, dict[str, Any]] = {
    "hqnet_tiny": {"depths": (1, 2, 1, 1), "width": 8, "drop_rate": 0.0},
    "hqnet_dcn": {"depths": (1, 1, 1, 1), "width": 8, "drop_rate": 0.0},
    "deform_resnet50": {"layers": (1, 2, 1, 1), "channels": (8, 16, 16, 16)},
    "dresnet_025": {"depths": (1, 1, 1, 1)},
    "lung_resnet50": {"depths": (2, 1, 1, 1), "width": 8},
    "shufflenet_v1_g3": {"depths": (2, 2, 2)},
}
each_network = pytest.mark.parametrize("name", SMALL)
ours = pytest.mark.parametrize("name", [name for name in SMALL if name != "deform_resnet50"])
"""Whose methods are written here, not timm's."""


def build(name: str, **options: Any) -> Any:
    """A small variant."""
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 5, **SMALL[name], **options})


def images(batch: int = 2, height: int = 64, width: int = 75, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", shipped("cellops"))
def test_levels_by_shapes(name: str) -> None:
    """Every network as it is: five maps of the channels and reductions that it states, the last one the pool's."""
    with torch.device("meta"):
        features = timm.create_model(name, features_only=True)
        sizes = [(97, 131), timm.get_pretrained_cfg(name).input_size[1:]]
        for size in sizes:
            maps = features(torch.empty(2, 3, *size))
            assert [found.shape[1] for found in maps] == features.feature_info.channels()
            for found, reduction in zip(maps, features.feature_info.reduction(), strict=True):
                more = name.startswith("dresnet") and reduction > 2  # its pool rounds up: 57 of 224
                for side, length in zip(found.shape[2:], size, strict=True):
                    assert math.ceil(length / reduction) <= side <= math.ceil(length / reduction) + more
    assert len(features.feature_info) == 5
    assert tuple(maps[-1].shape[2:]) == features.pretrained_cfg["pool_size"]
    assert "classifier" not in features.pretrained_cfg


@pytest.mark.parametrize("kind", ["list", "dict", "hook", "getter", "fx"])
@each_network
def test_each_extractor_of_timm_gives_the_same_maps(name: str, kind: str) -> None:
    model, features = build(name).eval(), build(name, features_only=True, out_indices=(1, -2), feature_cls=kind).eval()
    with torch.no_grad():
        last, maps = model.forward_intermediates(images())
        found = features(images())
        torch.testing.assert_close(last, model.forward_features(images()))
    found = list(found.values()) if isinstance(found, dict) else found
    for one, other in zip(found, (maps[1], maps[-2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if kind != "fx":
        pickle.loads(pickle.dumps(copy.deepcopy(features)))


@each_network
def test_is_traced_in_training_and_evaluation(name: str) -> None:
    """By torch.fx, at a map inside and as a whole."""
    model = build(name)
    node = model.feature_info[2]["module"]
    create_feature_extractor(model, {node: "map"}).train()(images(4, 80, 80))
    model = build(name).eval()
    whole = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        (expected,) = model.forward_intermediates(images(), indices=[2], intermediates_only=True)
        inside = create_feature_extractor(model, {node: "map"}).eval()
        torch.testing.assert_close(inside(images())["map"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_levels_that_a_network_has_not() -> None:
    with pytest.raises(ValueError, match=r"out_indices must be below 5 for 'dresnet_025', got \(1, 5\)"):
        build("dresnet_025", features_only=True, out_indices=(1, 5))
    assert len(create_model("dresnet_025", depths=(1, 1), features_only=True)(images())) == 3
    model = build("dresnet_025")
    for indices in (6, [], [-6]):
        with pytest.raises(ValueError, match="indices must be of the 5 maps"):
            model.forward_intermediates(images(), indices=indices)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NHWC'"):
        model.forward_intermediates(images(), output_fmt="NHWC")


def test_a_network_of_ones_own_keeps_its_options(spare_registry: None) -> None:
    """Whatever their names are; and it says that it has no maps to give."""

    @register_network(classifier="1")
    def own_options(num_classes: int, in_chans: int, variant: str = "a", name: str = "b", model_cfg: int = 0) -> Any:
        model = nn.Sequential(nn.Conv2d(in_chans, 2, 1), nn.Linear(2, num_classes))
        model.told = (variant, name, model_cfg)
        return model

    assert timm.create_model("own_options", variant="x", name="y", model_cfg=3).told == ("x", "y", 3)
    with pytest.raises(ValueError, match="features_only must be False for 'own_options': it has no feature_info"):
        create_model("own_options", features_only=True)


@each_network
@pytest.mark.parametrize("indices", [[0, 2], [-1]], ids=str)
def test_pruned_to_some_maps(name: str, indices: list[int]) -> None:
    model = build(name).eval()
    with torch.no_grad():
        expected = model.forward_intermediates(images(), indices=indices, intermediates_only=True, stop_early=True)
        whole = model.forward_features(images())
        before = sum(parameter.numel() for parameter in model.parameters())
        kept = model.prune_intermediate_layers(indices)
        assert kept == [index % 5 for index in indices] and model.num_classes == 0
        assert sum(parameter.numel() for parameter in model.parameters()) < before
        found = model.forward_intermediates(images(), indices=kept, intermediates_only=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        assert model(images()).shape[1] == model.num_features
        model = build(name).eval()
        model.prune_intermediate_layers([4], prune_head=False)
        torch.testing.assert_close(model.forward_features(images()), whole)
        assert model(images()).shape == (2, 5)


def test_norm_behind_the_last_stage() -> None:
    """Of a network in pre-activation order the last map is raw, unless `norm` is asked for."""
    model = build("lung_resnet50").eval()
    with torch.no_grad():
        last, raw = model.forward_intermediates(images())
        same, maps = model.forward_intermediates(images(), norm=True, indices=2, stop_early=True)
        torch.testing.assert_close(model.act(model.norm(raw[-1])), last)
        torch.testing.assert_close(maps[-1], last)
        torch.testing.assert_close(same, last)
        torch.testing.assert_close(maps[0], raw[-2])


@each_network
def test_heads(name: str) -> None:
    """Each pooling, as an option and by `reset_classifier`, with and without classes, in any dtype."""
    means = {"avg": lambda x: x.mean((2, 3)), "max": lambda x: x.amax((2, 3)), "": lambda x: x}
    means["catavgmax"] = lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
    with torch.no_grad():
        for pool, expected in means.items():
            model = build(name, global_pool=pool, num_classes=3 if pool else 0).eval()
            features = model.forward_features(images())
            hidden = model.forward_head(features, pre_logits=True)
            torch.testing.assert_close(hidden, expected(features), rtol=1e-4, atol=1e-5)
            assert hidden.shape[1] == model.head_hidden_size
            assert model(images()).shape[1] == (model.num_classes or model.num_features)
        model.double().reset_classifier(4, "catavgmax")
        assert model.forward_head(features.double()).shape == (2, 4)
        model.reset_classifier(2)
        assert model.head_hidden_size == 2 * model.num_features == model.get_classifier().in_features
        model.reset_classifier(0, "")
        assert model.forward_head(features.double()).shape == features.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": ""}, "global_pool must not be '' where a linear layer follows"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
    ],
    ids=str,
)
@each_network
def test_timm_names_the_wrong_argument(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "median"}, "global_pool must be one of .* got 'median'"),
        ({"output_stride": 8}, "output_stride must be (32|128), since no layer can be dilated; got 8"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be from 0 to below 1, got 1.0"),
    ],
    ids=str,
)
@ours
def test_ours_name_the_wrong_argument(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@each_network
def test_no_classes_without_a_vector(name: str) -> None:
    with pytest.raises(ValueError, match="global_pool must not be '' where a linear layer follows"):
        build(name).reset_classifier(3, "")


def test_deform_resnet_takes_an_output_stride() -> None:
    """Its packs are dilated as the convolutions that they replace."""
    model = build("deform_resnet50", output_stride=8).eval()
    with torch.no_grad():
        assert model.forward_features(images(1, 64, 64)).shape[2:] == (8, 8)
    assert model.layer4[0].conv2.dilation == (2, 2)


@each_network
def test_drop_path(name: str) -> None:
    """Branches are left out in training alone: images of a batch that are the same come out differently."""
    model = build(name, drop_path_rate=0.9)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    same = images(1).expand(8, -1, -1, -1)
    with torch.no_grad():
        assert model.eval()(same).std(0).max() < 1e-5
        assert model.train()(same).std(0).max() > 1e-2


@each_network
def test_gradient_checkpoints(name: str) -> None:
    """The same gradients of less memory; of ours the same statistics too, which timm's ResNet updates twice."""
    saved: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    found = []
    for enable in (False, True):
        model = build(name)
        model.set_grad_checkpointing(enable)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(images(4)).square().sum()
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        found.append((sum(saved), gradients, dict(model.named_buffers() if name != "deform_resnet50" else ())))
        saved.clear()
    (memory, gradients, buffers), (less, same, kept) = found
    assert less < memory / 1.5
    torch.testing.assert_close(same, gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept, buffers)


@each_network
def test_layer_decay(name: str) -> None:
    """The stem is the first layer, every block one, the head the last."""
    model = build(name)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    stages = model.stages if hasattr(model, "stages") else [getattr(model, f"layer{i}") for i in range(1, 5)]
    last = 1 + sum(map(len, stages))
    assert set(layers) == {key for key, _ in model.named_parameters()}
    assert layers[model.pretrained_cfg["first_conv"] + ".weight"] == 0
    assert {key for key, layer in layers.items() if layer == last} == {"fc.weight", "fc.bias"}
    assert max(group_parameters(model, model.group_matcher(coarse=True), reverse=True).values()) == 1 + len(stages)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == last + 1


@each_network
def test_weights_of_a_file(name: str, tmp_path: Path) -> None:
    """timm's way to start from them with other classes and channels, and for features."""
    model, file = build(name).eval(), str(tmp_path / "weights.pth")
    torch.save({"state_dict": model.state_dict()}, file)
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": file, "num_classes": 5}}
    with torch.no_grad():
        expected, maps = model.forward_intermediates(images())
        for options in ({}, {"num_classes": 7}, {"num_classes": 0}):
            other = build(name, **source, **options).eval()
            torch.testing.assert_close(other.forward_features(images()), expected)
        torch.testing.assert_close(build(name, **source).eval()(images()), model(images()))
        torch.testing.assert_close(build(name, checkpoint_path=file).eval()(images()), model(images()))
        features = build(name, **source, features_only=True).eval()(images())
        torch.testing.assert_close(features, maps, rtol=1e-4, atol=1e-5)
    gray = build(name, **source, in_chans=1)
    first = gray.pretrained_cfg["first_conv"] + ".weight"
    torch.testing.assert_close(gray.get_parameter(first), model.get_parameter(first).sum(1, keepdim=True))
    assert timm.models.get_pretrained_cfg_value(name, "file") is None


@each_network
def test_configuration(name: str) -> None:
    model = build(name, in_chans=4, pretrained_cfg_overlay={"mean": (0.5, 0.5, 0.5)})
    config = model.pretrained_cfg
    for key in ("input_size", "std", "pool_size", "crop_pct", "interpolation", "architecture", "num_classes"):
        assert config[key], key
    assert model.get_submodule(config["first_conv"]).in_channels == model.in_chans == 4
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert model.feature_info[-1]["num_chs"] == model.num_features
    data = timm.data.resolve_model_data_config(model)
    assert data["mean"] == (0.5, 0.5, 0.5) and data["crop_pct"] == config["crop_pct"]
    assert build(name, pretrained_cfg_overlay={"input_size": (1, 64, 64)}).in_chans == 1


@each_network
def test_weights_are_drawn_where_there_were_none(name: str) -> None:
    """From the meta device by `to_empty` and `init_weights`: as by the constructor."""
    with torch.device("meta"):
        model = timm.create_model(name, **SMALL[name])
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(math.nan if tensor.is_floating_point() else 7)
    model.init_weights()
    drawn = timm.create_model(name, **SMALL[name])
    for (key, found), expected in zip(model.state_dict().items(), drawn.state_dict().values(), strict=True):
        if found.numel() < 300 or not expected.std():
            same = expected.std(unbiased=False) if found.is_floating_point() else expected
            other = found.std(unbiased=False) if found.is_floating_point() else found
            assert other.isfinite().all() and bool(same) == bool(other), key
        else:
            assert float(found.std() / expected.std()) == pytest.approx(1, abs=0.2), key
    assert not model.get_buffer(next(key for key, _ in model.named_buffers() if "tracked" in key))
