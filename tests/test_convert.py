"""`accelerate` and `fuse` on networks of other libraries: what they compute, their keys, and what is left alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cellops
from cellops.convert.modules import FusedSequential, NamedFReLU, PooledAttention

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


class MmcvPack(nn.Module):
    """mmcv's `ModulatedDeformConv2dPack` in structure and names, computed by torchvision; v1 without a mask."""

    modulated = True

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, deform_groups: int = 1, **sizes: int
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = (
            (sizes.get(name, 1),) * 2 for name in ("stride", "padding", "dilation")
        )
        self.groups, self.deform_groups, self.taps = sizes.get("groups", 1), deform_groups, kernel_size**2
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // self.groups, kernel_size, kernel_size) / 9)
        if self.modulated:
            self.bias = nn.Parameter(torch.zeros(out_channels))
        channels = (3 if self.modulated else 2) * deform_groups * self.taps
        self.conv_offset = nn.Conv2d(in_channels, channels, kernel_size, self.stride, self.padding, self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.conv_offset(x), None
        if self.modulated:
            first, second, mask = offset.chunk(3, dim=1)
            offset, mask = torch.cat((first, second), dim=1), mask.sigmoid()
        sizes = (self.stride, self.padding, self.dilation)
        return torchvision.ops.deform_conv2d(x, offset, self.weight, getattr(self, "bias", None), *sizes, mask)


class ModulatedDeformConv2dPack(MmcvPack):
    """mmcv's name. The rules look at the name of the class itself, so that this is not a subclass of a known one."""


class DeformConv2dPack(MmcvPack):
    """mmcv's v1."""

    modulated = False


class Deformable(nn.Module):
    """torchvision's layer with its offsets predicted, as its users write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.predict = nn.Conv2d(channels, 27, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.predict(x).split((18, 9), dim=1)
        return self.conv(x, offset, mask.sigmoid())


def dcn_resnet() -> nn.Module:
    """A ResNet whose 3x3 convolutions are deformable in its last two stages: torchvision's layers, and mmcv's packs."""
    model = timm.create_model("resnet18", num_classes=10)
    model.layer3[1].conv2 = Deformable(256)
    model.layer4[0].conv2 = ModulatedDeformConv2dPack(512, 512, 3, deform_groups=4)
    model.layer4[1].conv1 = DeformConv2dPack(512, 512, 3)
    return model


class Funnel(nn.Module):
    """The funnel activation as YOLOv5 names its parts."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(x, self.bn(self.conv(x)))


class FReLU(Funnel):
    """A class of the name that is looked for."""


class ConvNorm(nn.Module):
    """Convolution, normalisation and activation called by name, as most repositories have them."""

    def __init__(self, channels: int, groups: int, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def funnels_and_groups() -> nn.Module:
    """What no network of timm has: funnels, and grouped 1x1 convolutions in a sequence and by name."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1, bias=False),
        nn.BatchNorm2d(24),
        FReLU(24),
        nn.Conv2d(24, 48, 1, groups=3, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(inplace=True),
        nn.ChannelShuffle(3),
        nn.Conv2d(48, 48, 1, groups=4),
        nn.SiLU(),
        ConvNorm(48, 2, nn.Hardswish()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def of_timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "timm seresnet18": (of_timm("seresnet18"), 8, "SqueezeExcite"),
    "timm legacy_seresnet18": (of_timm("legacy_seresnet18", drop_rate=0.0), 8, "SqueezeExcite"),
    "timm ecaresnet26t": (of_timm("ecaresnet26t"), 8, "EfficientChannelAttention"),
    "timm regnety_002": (of_timm("regnety_002"), 13, "SqueezeExcite"),
    "timm efficientnet_b0": (of_timm("efficientnet_b0"), 16, "SqueezeExcite"),
    "timm mobilenetv3_small_050": (of_timm("mobilenetv3_small_050"), 9, "SqueezeExcite"),
    "timm resnet18 with CBAM": (of_timm("resnet18", block_args={"attn_layer": "cbam"}), 8, "PooledAttention"),
    "torchvision mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 16, "SqueezeExcite"),
    "torchvision efficientnet_b0": (torchvision.models.efficientnet_b0, 28, "SqueezeExcite"),
    "torchvision regnet_y_400mf": (torchvision.models.regnet_y_400mf, 16, "SqueezeExcite"),
    "ResNet-18 with DCN": (dcn_resnet, 3, "DeformConv2d"),
    "funnels and groups": (funnels_and_groups, 3, "FusedSequential"),
}


SIZE = 40  # pixels: two of them are left in the last stage


SLOW = ("timm seresnet18", "timm legacy_seresnet18", "timm efficientnet_b0", "torchvision efficientnet_b0")
"""Their modules are in others too, which take less time."""

each_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS]
)


def drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """A network in float64 whose normalisations are not at their start: some begin at 0 and would hide a branch."""
    torch.manual_seed(0)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model


def step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Output, gradients and state of a call with gradients."""
    leaf = images.clone().requires_grad_()
    output = model(leaf)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)).sum().backward()
    found = {"output": output.detach(), "input.grad": leaf.grad}
    found |= {
        f"{name}.grad": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    return found | {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal but for rounding: of each tensor, and of the largest gradient where one should be zero."""
    assert found.keys() == wanted.keys()
    largest = max(float(tensor.abs().max()) for name, tensor in wanted.items() if name.endswith(".grad"))
    for name, tensor in wanted.items():
        atol = 1e-8 * float(tensor.double().abs().max()) + (1e-12 * largest if name.endswith(".grad") else 0)
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@each_network
def test_accelerated_networks_compute_the_same(name: str) -> None:
    build, count, becomes = NETWORKS[name]
    theirs = drawn(build)
    ours = copy.deepcopy(theirs)
    parameters = dict(ours.named_parameters())
    report = cellops.accelerate(ours)
    assert len(report.replaced) == count and becomes in {change.becomes for change in report.replaced}, report
    assert len(list(used(ours))) >= count
    for key, parameter in ours.named_parameters():
        assert parameter is parameters[key], key  # an optimizer made before goes on

    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for training in (False, True):
        assert_same(step(ours.train(training), images), step(theirs.train(training), images))
    again = cellops.accelerate(ours)
    assert not again.replaced, again

    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.01)
        wanted = theirs.eval()(images)
        ours.load_state_dict(theirs.state_dict())
        close = {"rtol": 1e-6, "atol": 1e-8 * float(wanted.abs().max())}
        torch.testing.assert_close(ours.eval()(images), wanted, **close)
        back = drawn(build).eval()
        back.load_state_dict(ours.state_dict())
        torch.testing.assert_close(back(images), wanted, **close)


def used(model: nn.Module) -> list[nn.Module]:
    """Modules of ours in a network."""
    return [module for module in model.modules() if type(module).__module__.startswith("cellops.")]


@each_network
def test_fused_networks_compute_the_same(name: str) -> None:
    model = drawn(NETWORKS[name][0]).eval()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(images)
        plain, accelerated = copy.deepcopy(model), copy.deepcopy(model)
        cellops.accelerate(accelerated)
        for network in (plain, accelerated):
            report = cellops.fuse(network)
            left = {change.module: change.reason for change in report.left}
            if network is accelerated or name != "ResNet-18 with DCN":  # mmcv's packs are not known to fuse
                assert not left and len(report.replaced) == norms, report
            assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) or left
            torch.testing.assert_close(network(images), wanted, rtol=1e-7, atol=1e-9 * float(wanted.abs().max()))
            assert not cellops.fuse(network).replaced


def test_float32_and_channels_last() -> None:
    model = drawn(of_timm("mobilenetv3_small_050")).float().eval()
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = model(images)
        cellops.accelerate(model)
        cellops.fuse(model)
        torch.testing.assert_close(model(images), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_accelerated_networks_are_saved_copied_and_compiled() -> None:
    model = nn.Sequential(
        funnels_and_groups()[:10], timm.layers.create_attn("cbam", 48), timm.layers.EcaModule(48)
    ).eval()
    assert len(cellops.accelerate(model).replaced) == 5
    assert {PooledAttention, NamedFReLU, FusedSequential} <= {type(module) for module in model.modules()}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        torch.testing.assert_close(torch.load(file, weights_only=False)(images), wanted)
        torch.testing.assert_close(copy.deepcopy(model)(images), wanted)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_left_has_its_reason() -> None:
    se, eca = timm.layers.SEModule, timm.layers.EcaModule

    class Noisy(se):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class SEBlock(se):  # a name that is known, and a forward that is not
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def hooked(module: nn.Module) -> nn.Module:
        module.fc1.register_forward_hook(lambda *_: None)
        return module

    def patched(module: nn.Module) -> nn.Module:
        forward = module.forward
        module.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
        return module

    def part_patched(module: nn.Module) -> nn.Module:
        patched(module.fc1)
        return module

    def parametrized(module: nn.Module) -> nn.Module:
        torch.nn.utils.parametrizations.weight_norm(module.fc1)
        return module

    def quantized(module: nn.Module) -> nn.Module:
        module.fc1 = torch.ao.nn.qat.Conv2d(32, 8, 1, qconfig=torch.ao.quantization.get_default_qat_qconfig())
        return module

    cases = {
        "a hook": (hooked(se(32)), "its fc1 has a hook"),
        "another forward": (patched(se(32)), "it has another forward"),
        "another forward inside": (part_patched(se(32)), "its fc1 has another forward"),
        "of a sequence": (patched(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.ReLU())), "it has another forward"),
        "a parametrization": (parametrized(se(32)), "not a Conv2d"),
        "quantised": (quantized(se(32)), "not a Conv2d"),
        "an activation": (se(32, act_layer=nn.Tanh), "its act is a Tanh"),
        "a gate": (se(32, gate_layer="tanh"), "its gate is a Tanh"),
        "a normalisation": (se(32, norm_layer=nn.BatchNorm2d), "its bn is a BatchNorm2d"),
        "a maximum": (se(32, add_maxpool=True), "the maximum too"),
        "a subclass": (Noisy(32), "a subclass of SEModule"),
        "a forward": (SEBlock(32), "outputs differ in evaluation"),
        "effective": (timm.layers.EffectiveSEModule(32), "one convolution"),
        "an mlp": (eca(32, use_mlp=True), "which eca does not have"),
        "circular": (timm.layers.CecaModule(32), "goes around"),
        "meta": (se(32, device="meta"), "meta device"),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in cases.items()})
    kinds = [type(module) for module in model.modules()]
    report = cellops.accelerate(model)
    assert not report.replaced, report
    reasons = {change.module: change.reason for change in report.left}
    for name, (_, text) in cases.items():
        assert text in reasons[name], (name, reasons[name])
        assert text in str(report)
    assert [type(module) for module in model.modules()] == kinds


class SqueezeExcitation(nn.Module):
    """torchvision's name and children, and a forward that differs where a test wants it to."""

    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Sigmoid()
        self.bend = bend

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale_activation(self.fc2(self.activation(self.fc1(x.mean((2, 3), keepdim=True)))))
        return self.bend(scale) * x


BENDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "same": (lambda scale: scale, ""),
    "another factor": (lambda scale: 1.01 * scale, "outputs differ in evaluation"),
    "no gradient": (lambda scale: scale.detach(), "gradients to input 0 differ in evaluation"),
    "fails": (lambda scale: scale.no_such_method(), "cannot be run for a comparison in evaluation: AttributeError"),
}


@pytest.mark.parametrize("bend", list(BENDS))
def test_a_known_name_with_another_forward_is_found_out(bend: str) -> None:
    function, text = BENDS[bend]
    model = nn.Sequential(SqueezeExcitation(function))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    report = cellops.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert bool(report.replaced) == (bend == "same")
    if text:
        assert text in report.left[0].reason and type(model[0]) is SqueezeExcitation
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_network_itself_and_shared_modules_and_old_keys() -> None:
    alone = timm.layers.SEModule(32)
    assert cellops.accelerate(alone).replaced[0].module == "" and isinstance(alone, cellops.SqueezeExcite)

    shared = timm.layers.SEModule(16)
    model = nn.ModuleList([shared, nn.Sequential(shared)])
    assert len(cellops.accelerate(model).replaced) == 1
    assert model[0] is model[1][0] is shared and isinstance(shared, cellops.SqueezeExcite)

    packs = nn.Sequential(ModulatedDeformConv2dPack(8, 8, 3))
    state = {key.replace("0.conv_offset.", "0_offset."): 2 * value for key, value in packs.state_dict().items()}
    cellops.accelerate(packs)
    packs.load_state_dict(state)
    assert torch.equal(packs[0].conv_offset.weight, state["0_offset.weight"])
    with pytest.raises(TypeError, match="model must be"):
        cellops.accelerate(packs.state_dict())


def test_fuse_leaves_what_it_must() -> None:
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        cellops.fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with pytest.raises(TypeError, match="model must be"):
        cellops.fuse(None)

    class Standardized(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.conv2d(input, self.weight - self.weight.mean(), self.bias)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.seen_twice, self.before = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.unsteady, self.free = nn.BatchNorm2d(3, track_running_stats=False), Standardized(3, 3, 1)
            self.behind = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.before(x))
            y = y + self.seen_twice(y)
            return self.behind(self.free(self.unsteady(self.other(y))))

    model = drawn(Branches).float().train(False)
    images = torch.randn(2, 3, 5, 5)
    wanted = model(images)
    report = cellops.fuse(model)
    assert not report.replaced
    reasons = {change.module: change.reason for change in report.left}
    assert "running statistics" in reasons["unsteady"] and "may change its weight" in reasons["behind"]
    assert "no convolution" in reasons["seen_twice"] and "no convolution" in reasons["before"]
    assert torch.equal(model(images), wanted)

    adapted = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    forward = adapted[0].forward
    adapted[0].forward = lambda x: forward(x) + 1
    assert "the convolution has another forward" in str(cellops.fuse(adapted))

    untraceable = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = untraceable

        def forward(self, x: Tensor) -> Tensor:
            while x.abs().max() > 1:
                x = self.body(x) / 2
            return x

    report = cellops.fuse(Loop().eval())
    assert [change.module for change in report.replaced] == ["body.1"]
