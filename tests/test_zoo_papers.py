"""Where the papers are exact, so are the networks; and weights of public ports load."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")

import cellops
from cellops.models import create_model
from cellops.models.zoo import deform_resnet, hqnet, lung_resnet

MEBI = 2**20

FIGURE_5 = """\
Conv2d-1 64x112x112 1728
Conv2d-2 64x56x56 36864
Conv2d-3 64x28x28 36864
BatchNorm2d-4 64x28x28 128
GELU-5 64x28x28 0
MaxPool2d-6 64x14x14 0
ConvOffset2D-7 64x14x14 73728
Conv2d-8 64x14x14 4096
BatchNorm2d-9 64x14x14 128
GELU-10 64x14x14 0
ConvOffset2D-11 64x14x14 73728
Conv2d-12 64x14x14 36864
BatchNorm2d-13 64x14x14 128
GELU-14 64x14x14 0
ConvOffset2D-15 64x14x14 73728
Conv2d-16 256x14x14 16384
BatchNorm2d-17 256x14x14 512
ConvOffset2D-18 64x14x14 73728
Conv2d-19 256x14x14 16384
BatchNorm2d-20 256x14x14 512
GELU-21 256x14x14 0
Bottleneck-22 256x14x14 0
ConvOffset2D-23 256x14x14 1179648
Conv2d-24 64x14x14 16384
BatchNorm2d-25 64x14x14 128
GELU-26 64x14x14 0
ConvOffset2D-27 64x14x14 73728
Conv2d-28 64x14x14 36864
BatchNorm2d-29 64x14x14 128
GELU-30 64x14x14 0
"""
"""Every line that the paper prints."""


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


@pytest.fixture(scope="module")
def full_hqnet() -> nn.Module:
    return on_meta("hqnet", num_classes=5)


def summary(model: nn.Module, input: Tensor) -> Iterator[str]:
    """Lines as torchsummary numbers them: by the end of each call; containers and what is inside a layer left out."""
    lines: list[str] = []

    def note(module: nn.Module, arguments: Any, output: Tensor) -> None:
        kind = type(module).__name__.replace("ConvOffset2d", "ConvOffset2D")
        own = 0 if isinstance(module, hqnet.Bottleneck) else parameters(module)
        lines.append(f"{kind}-{len(lines) + 1} {'x'.join(map(str, output.shape[1:]))} {own}")

    inside = {
        child for module in model.modules() if isinstance(module, cellops.ConvOffset2d) for child in module.children()
    }
    for module in model.modules():
        if module is not model and module not in inside and not isinstance(module, nn.Sequential):
            module.register_forward_hook(note)
    model(input)
    return iter(lines)


def test_hqnet_has_the_papers_parameters(full_hqnet: nn.Module) -> None:
    assert parameters(full_hqnet) == 469_831_237


def test_hqnet_has_the_papers_layers(full_hqnet: nn.Module) -> None:
    found = summary(full_hqnet, torch.empty(2, 3, 224, 224, device="meta"))
    for expected in FIGURE_5.splitlines():
        assert next(found) == expected


def test_hqnet_samples_before_every_convolution_of_a_block(full_hqnet: nn.Module) -> None:
    blocks = [module for module in full_hqnet.modules() if isinstance(module, hqnet.Bottleneck)]
    assert [len(stage) for stage in full_hqnet.stages] == [3, 4, 10, 3]
    convolutions = [module for module in full_hqnet.stages.modules() if isinstance(module, hqnet.OffsetConv2d)]
    assert len(convolutions) == 3 * len(blocks) + 4
    strides = {path for path, m in full_hqnet.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)}
    stages = {f"stages.{i}.0.{path}.conv" for i in (1, 2, 3) for path in ("conv2", "downsample.0")}
    assert strides == stages | {"conv1", "conv2", "conv3"}


def test_hqnet_dcn_has_a_pack_in_place_of_each(full_hqnet: nn.Module) -> None:
    model = on_meta("hqnet_dcn", num_classes=5)
    packs = [module for module in model.modules() if isinstance(module, cellops.DeformConv2dPack)]
    assert len(packs) == 3 * 20 + 4
    assert not any(isinstance(module, (cellops.ConvOffset2d, hqnet.OffsetConv2d)) for module in model.modules())


@pytest.mark.slow
def test_hqnet_runs_as_it_is() -> None:
    """470 million parameters for real, two images."""
    model = create_model("hqnet", num_classes=5)
    logits = model(torch.randn(2, 3, 224, 224))
    assert logits.shape == (2, 5) and logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("layout", ["planar", "interleaved"])
def test_weights_of_the_offset_layers_port_load(layout: str) -> None:
    """There the layer is itself the convolution from C to 2C channels, and its offsets are interleaved."""

    class PortedConvOffset2D(nn.Conv2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, 2 * channels, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            offset = super().forward(x)
            batch, channels, height, width = x.shape
            if layout == "interleaved":
                pairs = offset.contiguous().view(batch * channels, height, width, 2)
            else:
                pairs = offset.view(batch * channels, 2, height, width).permute(0, 2, 3, 1)
            planes, output = x.reshape(batch * channels, height, width), torch.empty(batch * channels, height, width)
            for plane in range(batch * channels):
                for row in range(height):
                    for column in range(width):
                        y = (row + pairs[plane, row, column, 0]).clamp(0, height - 1)
                        z = (column + pairs[plane, row, column, 1]).clamp(0, width - 1)
                        top, left = int(y.floor()), int(z.floor())
                        bottom, right, dy, dz = int(y.ceil()), int(z.ceil()), y - top, z - left
                        upper = planes[plane, top, left] * (1 - dz) + planes[plane, top, right] * dz
                        lower = planes[plane, bottom, left] * (1 - dz) + planes[plane, bottom, right] * dz
                        output[plane, row, column] = upper * (1 - dy) + lower * dy
            return output.view(x.shape)

    torch.manual_seed(0)
    port = nn.Sequential(PortedConvOffset2D(2), nn.Conv2d(2, 3, 1, bias=False))
    nn.init.normal_(port[0].weight, std=0.4)
    ours = hqnet.OffsetConv2d(2, 3, 1, 1, layout)
    weights = {f"offset.{key}": value for key, value in port[0].state_dict().items()}
    ours.load_state_dict(weights | {f"conv.{key}": value for key, value in port[1].state_dict().items()})
    input = torch.randn(2, 2, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(ours(input), port(input), rtol=1e-4, atol=1e-5)


def test_shufflenet_v1_has_the_known_parameters() -> None:
    model = on_meta("shufflenet_v1_g3")
    assert parameters(model) == 1_865_728
    maps = [on_meta("shufflenet_v1_g3").conv1, *model.stages]
    x, shapes = torch.empty(2, 3, 224, 224, device="meta"), []
    x = model.pool(maps[0](x))
    for stage in maps[1:]:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(240, 28, 28), (480, 14, 14), (960, 7, 7)]


def test_dresnet_has_the_papers_size_and_maps() -> None:
    """The file of @1 is within 3 % of both sizes that the paper prints."""
    model = on_meta("dresnet")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / MEBI
    assert abs(size / 11.2 - 1) < 0.03 and abs(size / 10.7 - 1) < 0.03
    x = model.conv1(torch.empty(2, 3, 224, 224, device="meta"))
    sides = [x.shape[-1]]
    x = model.pool(x)
    sides.append(x.shape[-1])
    for stage in model.stages:
        x = stage(x)
        sides.append(x.shape[-1])
    assert sides == [112, 57, 57, 29, 15, 8]
    assert [len(stage) - 1 for stage in model.stages] == [1, 2, 4, 2]
    grouped = [m.conv.groups for m in model.modules() if isinstance(m, cellops.GroupConv1x1)]
    assert set(grouped) == {4}
    assert not any(m.shuffle for m in model.modules() if isinstance(m, cellops.GroupConv1x1))


@pytest.mark.parametrize(("name", "width"), [("dresnet", 96), ("dresnet_050", 48), ("dresnet_025", 24)])
def test_dresnet_scales_every_width(name: str, width: int) -> None:
    assert [stage[0].fuse.conv.out_channels for stage in on_meta(name).stages] == [width << i for i in range(4)]


def test_lung_resnet50_follows_the_paper() -> None:
    """Each change of its section on performance, by what the network consists of and in which order it runs."""
    model = on_meta("lung_resnet50", num_classes=1)
    x = torch.empty(2, 3, 240, 320, device="meta")
    stem = [module for module in model.stem if isinstance(module, nn.Conv2d)]
    assert [(m.kernel_size, m.stride, m.out_channels) for m in stem] == [((4, 4), (2, 2), 32), ((4, 4), (1, 1), 64)]
    assert [len(stage) for stage in model.stages] == [3, 4, 6, 3]
    x, sides = model.stem(x), []
    for stage in model.stages:
        assert [block.shortcut is not None for block in stage] == [True] + [False] * (len(stage) - 1)
        assert [block.conv2.stride for block in stage] == [(2, 2)] + [(1, 1)] * (len(stage) - 1)
        pool, convolution = stage[0].shortcut
        assert (pool.kernel_size, pool.stride, convolution.stride) == (2, 2, (1, 1))
        x = stage(x)
        sides.append(tuple(x.shape[1:]))
    assert sides == [(256, 60, 80), (512, 30, 40), (1024, 15, 20), (2048, 8, 10)]
    assert model(torch.empty(2, 3, 240, 320, device="meta")).shape == (2, 1)
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}

    block, called = model.stages[0][1], []
    for path, module in block.named_children():
        module.register_forward_hook(lambda module, arguments, output, path=path: called.append(path))
    block(torch.empty(2, 256, 9, 9, device="meta"))
    order = "norm1 act1 depthwise1 shrink act2 conv2 norm3 act3 depthwise3 expand channel_attention spatial_attention"
    assert called == order.split()
    assert {type(block.act1), type(block.act2), type(block.act3)} == {cellops.FReLU}
    assert block.depthwise1.conv.groups == block.depthwise1.conv.in_channels == 256
    assert block.spatial_attention.mode == "conv" and block.spatial_attention.conv.kernel_size == (1, 1)


@pytest.mark.parametrize("size", [(16, 16), (15, 18)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_lung_resnets_stem_pads_as_keras_does(stride: int, size: tuple[int, int]) -> None:
    """The pixel that is left over goes to the right and to the bottom."""
    conv = lung_resnet.Conv2dSame(1, 1, stride)
    input = torch.randn(1, 1, *size)
    totals = [max((-(-length // stride) - 1) * stride + 4 - length, 0) for length in size]
    (top, left), (bottom, right) = ([total // 2 for total in totals], [total - total // 2 for total in totals])
    padded = nn.functional.pad(input, (left, right, top, bottom))
    torch.testing.assert_close(conv(input), nn.functional.conv2d(padded, conv.weight, stride=stride))


def test_lung_resnet50_holds_frelus_official_keys() -> None:
    keys = [key for key in on_meta("lung_resnet50").state_dict() if key.startswith("stages.0.0.act1.")]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = ["conv_frelu.weight", "conv_frelu.bias", *(f"bn_frelu.{name}" for name in norm)]
    assert keys == [f"stages.0.0.act1.{key}" for key in expected]


def test_deform_resnet50_starts_as_resnet50_and_takes_its_keys() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"layers": (1, 2, 1, 1), "channels": (8, 16, 32, 64)}
    network = create_model("resnet50", num_classes=4, **options).eval()
    input = torch.randn(2, 3, 65, 64)
    with torch.no_grad():
        expected, keys = network(input), set(network.state_dict())
        deformed = deform_resnet.deform(network)
        torch.testing.assert_close(deformed(input), expected, rtol=1e-4, atol=1e-5)
    packs = [path for path, m in deformed.named_modules() if isinstance(m, cellops.DeformConv2dPack)]
    assert packs == ["layer2.0.conv2", "layer2.1.conv2", "layer3.0.conv2", "layer4.0.conv2"]
    new = {f"{path}.conv_offset.{key}" for path in packs for key in ("weight", "bias")}
    assert set(deformed.state_dict()) == keys | new
    assert set(create_model("deform_resnet50", num_classes=4, **options).state_dict()) == keys | new


def test_weights_of_mmcvs_packs_load() -> None:
    """mmdetection names a pack `conv2`, with `conv_offset` inside; before mmcv 1.0 `conv2_offset` was beside it."""
    model = create_model("deform_resnet50", num_classes=4, layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
    new = {key: torch.randn_like(value) for key, value in model.state_dict().items() if value.is_floating_point()}
    old = {re.sub(r"conv2\.conv_offset\.", "conv2_offset.", key): value for key, value in new.items()}
    assert old.keys() != new.keys()
    for weights in (new, old):
        missing = model.load_state_dict(dict(weights), strict=False)
        assert not missing.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
        assert torch.equal(model.layer3[0].conv2.conv_offset.weight, new["layer3.0.conv2.conv_offset.weight"])
