"""The modules: what they load, what they start as, and what they compute."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cellops
from cellops import ConvOffset2d, DeformConv2d, DeformConv2dPack, FReLU

CONFIGURATIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0), "dilation": 2, "groups": 2, "bias": False},
    {"kernel_size": 1, "stride": (1, 2), "padding": 1, "dilation": (1, 3), "groups": 4},
]


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_stands_in_for_torchvision(options: dict[str, Any]) -> None:
    """Same initialisation from the same seed, same text, same keys, same result, both ways."""
    ops = pytest.importorskip("torchvision").ops
    torch.manual_seed(0)
    theirs = ops.DeformConv2d(4, 8, **options)
    torch.manual_seed(0)
    ours = DeformConv2d(4, 8, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)

    torch.manual_seed(1)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    again = DeformConv2d(4, 8, **options)
    again.load_state_dict(theirs.state_dict())
    input = torch.randn(2, 4, 9, 8)
    taps = ours.kernel_size[0] * ours.kernel_size[1]
    convolved = nn.functional.conv2d(input, ours.weight, None, ours.stride, ours.padding, ours.dilation, ours.groups)
    offset, mask = torch.randn(2, 2 * taps, *convolved.shape[2:]), torch.rand(2, taps, *convolved.shape[2:])
    for arguments in ((input, offset, mask), (input, offset)):
        wanted = theirs(*arguments)
        torch.testing.assert_close(ours(*arguments), wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(again(*arguments), ours(*arguments))


def test_module_calls_the_op_and_trains() -> None:
    module = DeformConv2d(4, 6, 3, padding=1)
    input, offset, mask = torch.randn(2, 4, 7, 6), torch.randn(2, 18, 7, 6), torch.rand(2, 9, 7, 6)
    output = module(input, offset, mask=mask)
    assert torch.equal(output, cellops.deform_conv2d(input, offset, module.weight, module.bias, padding=1, mask=mask))
    output.sum().backward()
    assert module.weight.grad.abs().sum() > 0 and module.bias.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeformConv2d(4, 6, 3, groups=3), "in_channels must be a multiple of groups = 3, got 4"),
        (lambda: DeformConv2d(4, 6, 3, groups=4), "out_channels must be a multiple of groups = 4, got 6"),
        (lambda: DeformConv2d(4, 6, (3, 3, 3)), r"kernel_size must be an integer or a pair .*, got \(3, 3, 3\)"),
        (lambda: DeformConv2d(4, 6, 3, padding="same"), "padding must be an integer or a pair .*, got 'same'"),
        (
            lambda: DeformConv2dPack(4, 6, 3, offset_groups=3),
            "in_channels must be a multiple of offset_groups = 3, got 4",
        ),
    ],
)
def test_errors_of_modules(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("wrong", [2.0, "2", [2]], ids=str)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("in_channels", lambda n: DeformConv2d(n, 4, 3)),
        ("groups", lambda n: DeformConv2d(4, 4, 3, groups=n)),
        ("offset_groups", lambda n: DeformConv2dPack(4, 4, 3, offset_groups=n)),
        ("channels", lambda n: ConvOffset2d(n)),
        ("kernel_size", lambda n: FReLU(4, n)),
        ("channels", lambda n: FReLU(n)),
        ("kernel_size", lambda n: cellops.DepthwiseConv2d(4, n)),
        ("stride", lambda n: cellops.DepthwiseConv2d(4, stride=n)),
        ("channels", lambda n: cellops.SqueezeExcite(n)),
        ("rd_channels", lambda n: cellops.SqueezeExcite(8, rd_channels=n)),
        ("rd_divisor", lambda n: cellops.SqueezeExcite(8, rd_divisor=n)),
        ("channels", lambda n: cellops.EfficientChannelAttention(n)),
        ("kernel_size", lambda n: cellops.EfficientChannelAttention(8, n)),
        ("channels", lambda n: cellops.SpatialAttention(n)),
        ("kernel_size", lambda n: cellops.SpatialAttention(8, n)),
        ("out_channels", lambda n: cellops.GroupConv1x1(4, n, 2)),
        ("groups", lambda n: cellops.GroupConv1x1(4, 4, n)),
        ("groups", lambda n: cellops.group_conv1x1(torch.zeros(1, 4, 2, 2), torch.zeros(4, 2, 1, 1), groups=n)),
    ],
)
def test_numbers_of_modules_are_integers(name: str, make: Any, wrong: object) -> None:
    """They were compared and divided as they came: errors of Python's operators or of `torch.empty` named nothing."""
    with pytest.raises(ValueError, match=f"^{name} must be an integer, got "):
        make(wrong)


# DeformConv2dPack

PACKS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": 2, "dilation": (1, 2), "groups": 2, "offset_groups": 4},
    {"kernel_size": 3, "padding": 1, "modulated": False, "bias": False},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "offset_groups": 2, "modulated": False},
]


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", PACKS, ids=str)
def test_pack_predicts_offset_and_mask(options: dict[str, Any], layout: torch.memory_format) -> None:
    """Offset: the first two thirds of the channels of `conv_offset`; mask: the sigmoid of the last third."""
    pack = randomised(DeformConv2dPack(4, 6, **options)).to(memory_format=layout)
    input = torch.randn(2, 4, 9, 8).contiguous(memory_format=layout)
    parameters = {name: options[name] for name in ("stride", "padding", "dilation") if name in options}
    predicted = nn.functional.conv2d(input, pack.conv_offset.weight, pack.conv_offset.bias, **parameters)
    offset, mask = predicted, None
    if pack.modulated:
        first, second, third = predicted.chunk(3, dim=1)
        offset, mask = torch.cat((first, second), dim=1), third.sigmoid()
    assert offset.shape[1] == 2 * pack.offset_groups * pack.kernel_size[0] * pack.kernel_size[1]
    wanted = cellops.deform_conv2d(input, offset, pack.weight, pack.bias, **parameters, mask=mask)
    output = pack(input)
    torch.testing.assert_close(output, wanted)
    assert output.is_contiguous(memory_format=layout)
    output.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in pack.parameters())


@pytest.mark.parametrize(("modulated", "factor"), [(True, 0.5), (False, 1.0)])
def test_pack_starts_as_a_dense_convolution(modulated: bool, factor: float) -> None:
    pack = DeformConv2dPack(4, 6, 3, padding=1, modulated=modulated)
    input = torch.randn(2, 4, 7, 6)
    wanted = nn.functional.conv2d(input, factor * pack.weight, pack.bias, padding=1)
    torch.testing.assert_close(pack(input), wanted, rtol=1e-5, atol=1e-5)
    assert pack.conv_offset.weight.count_nonzero() == 0 and pack.conv_offset.bias.count_nonzero() == 0


def test_keys_of_packs() -> None:
    keys = ["weight", "bias", "conv_offset.weight", "conv_offset.bias"]
    assert list(DeformConv2dPack(4, 6, 3).state_dict()) == keys
    first_version = DeformConv2dPack(4, 6, 3, bias=False, modulated=False)
    assert list(first_version.state_dict()) == [key for key in keys if key != "bias"]
    assert first_version.conv_offset.out_channels == 18


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.conv2 = DeformConv2dPack(4, 4, 3, padding=1)
        self.conv2_offset_scale = nn.Linear(2, 2)  # a name that only starts like an old key


def nested() -> nn.Module:
    return nn.Sequential(nn.ModuleList([Block(), Block()]), DeformConv2dPack(4, 2, 1))


def old_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace(".conv_offset.", "_offset."): tensor for key, tensor in state_dict.items()}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(lambda model: model, id="built"),
        pytest.param(copy.deepcopy, id="copied"),
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickled"),
        pytest.param(lambda model: nn.ModuleDict({"inner": model})["inner"], id="wrapped"),
    ],
)
def test_old_keys_are_renamed(way: Any) -> None:
    model = way(nested())
    new = {key: torch.randn_like(tensor) for key, tensor in model.state_dict().items()}
    old = old_keys(new)
    assert "0.1.conv2_offset.weight" in old and "1_offset.bias" in old and "0.0.conv2_offset_scale.weight" in old
    model.load_state_dict(old)
    assert "0.1.conv2_offset.weight" in old, "the caller's dictionary stays as it is"
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, new[key]), key
    model.load_state_dict(new)
    outer = nn.ModuleDict({"outer": model})
    outer.load_state_dict({f"outer.{key}": tensor for key, tensor in old.items()})


def test_wrong_keys_are_still_reported() -> None:
    model = nested()
    state_dict = old_keys(model.state_dict())
    state_dict["0.1.conv3_offset.weight"] = state_dict.pop("0.1.conv2_offset.weight")
    with pytest.raises(
        RuntimeError, match=r"Missing key.*0\.1\.conv2\.conv_offset\.weight(.|\n)*Unexpected.*conv3_offset"
    ):
        model.load_state_dict(state_dict)


@pytest.mark.parametrize(
    "make", [lambda: DeformConv2d(4, 6, 3, padding=1), lambda: DeformConv2dPack(4, 6, 3, padding=1)]
)
def test_modules_are_copied_and_stored(make: Any) -> None:
    module = randomised(make())
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    input = torch.randn(1, 4, 5, 5)
    rest = () if isinstance(module, DeformConv2dPack) else (torch.randn(1, 18, 5, 5),)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stored, weights_only=False),
    ):
        assert torch.equal(other(input, *rest), module(input, *rest))


def test_modules_move_between_types_and_devices() -> None:
    module = DeformConv2dPack(4, 6, 3, padding=1)
    assert module.to(torch.bfloat16)(torch.randn(1, 4, 5, 5).bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        module = DeformConv2dPack(4, 6, 3, padding=1)
        assert module(torch.randn(1, 4, 5, 5)).shape == (1, 6, 5, 5)
    text = repr(DeformConv2dPack(4, 6, 3, offset_groups=2, modulated=False))
    assert text.startswith(
        "DeformConv2dPack(\n  4, 6, kernel_size=(3, 3), stride=(1, 1), offset_groups=2, modulated=False"
    )


def test_materialised_from_the_meta_device() -> None:
    """`to_empty`, then every module's `reset_parameters`, children first: modules draw what their constructors do."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(DeformConv2dPack(8, 8, 3), FReLU(64), ConvOffset2d(64), FReLU(64, norm=False))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    pack, frelu, offset, _ = model
    assert not any(parameter.any() for parameter in pack.conv_offset.parameters()) and pack.weight.std() > 0.05
    assert abs(frelu.conv_frelu.weight.std() - 0.01) < 0.002 and abs(offset.conv.weight.std() - 0.01) < 0.002
    assert all(parameter.isfinite().all() for parameter in model.parameters())

    nn.init.ones_(pack.conv_offset.weight)
    frelu.bn_frelu.running_mean.fill_(torch.nan)
    pack.reset_parameters()
    frelu.reset_parameters()
    assert not pack.conv_offset.weight.any() and not frelu.bn_frelu.running_mean.any()
