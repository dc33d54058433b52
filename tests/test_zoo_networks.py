"""What every network written here does, each in a small variant: dtypes, layouts, sizes, compilers, twins, learning."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

pytest.importorskip("timm")
pytest.importorskip("torchvision")

import cellops
from cellops.models import create_model
from cellops.models.twin import PLAIN, plain_twin

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "hqnet": ("hqnet_tiny", {"depths": (2, 1), "width": 8}),
    "hqnet interleaved": ("hqnet_tiny", {"depths": (1, 1), "width": 8, "layout": "interleaved"}),
    "hqnet_dcn": ("hqnet_dcn", {"depths": (2, 1), "width": 8}),
    "deform_resnet50": ("deform_resnet50", {"layers": (1, 2, 1, 1), "channels": (8, 16, 16, 16)}),
    "dresnet": ("dresnet_025", {"depths": (1, 1)}),
    "dresnet bare": ("dresnet_025", {"two_branches": False, "squeeze_excite": False, "compression": 0.5}),
    "lung_resnet50": ("lung_resnet50", {"depths": (2, 1), "width": 8}),
    "shufflenet_v1_g3": ("shufflenet_v1_g3", {"depths": (2, 2)}),
}
"""Few blocks, but each kind: with and without stride, with an identity and with a convolution as shortcut."""

MAIN = [name for name in SMALL if " " not in name]
"""One variant of each network, for what takes seconds."""

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

each_network = pytest.mark.parametrize("name", SMALL)


def build(name: str, num_classes: int = 4, *, drop_rate: float = 0.0) -> nn.Module:
    """A small variant whose every layer matters: no normalisation or offset is left at zero."""
    torch.manual_seed(0)
    network, options = SMALL[name]
    model = create_model(network, num_classes=num_classes, drop_rate=drop_rate, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, cellops.DeformConv2dPack):
            nn.init.normal_(module.conv_offset.weight, std=0.02)
    return model


def images(batch: int = 4, height: int = 75, width: int = 70) -> Tensor:
    """Odd and even, and not square."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@each_network
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dtypes_and_layouts(name: str, dtype: torch.dtype, layout: str) -> None:
    """Forward and backward agree with float64 in NCHW: closely in float32, in bfloat16 as far as its digits go.

    There the plain twins are off by 0.02 at most. Offsets in bfloat16 are off by hundredths of a pixel, and their
    gradient in a deformable convolution jumps at whole numbers: 0.09.
    """
    in_bfloat16 = 0.15 if name == "deform_resnet50" else 0.03
    model = build(name).double().eval()
    expected = model(images().double())
    expected.square().sum().backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model = build(name).to(dtype, memory_format=FORMATS[layout]).eval()
    found = model(images().to(dtype).contiguous(memory_format=FORMATS[layout]))
    found.square().sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert found.dtype == gradients.dtype == dtype
    for one, other, what in ((found, expected, "logits"), (gradients, wanted, "gradients")):
        error = float((one.detach().double() - other.detach()).norm() / other.detach().norm())
        assert error < (1e-4 if dtype == torch.float32 else in_bfloat16), f"{what} are off by {error:.1e}"


@each_network
def test_autocast(name: str) -> None:
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images()), torch.arange(4))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@each_network
@pytest.mark.parametrize("size", [(64, 64), (112, 97), (33, 129)], ids=str)
def test_batch_of_one_and_odd_sizes(name: str, size: tuple[int, int]) -> None:
    """In evaluation whatever the last maps come to; an image alone gives what it gives in a batch."""
    model = build(name).eval()
    batch = images(2, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(batch[1:]), model(batch)[1:], rtol=1e-3, atol=1e-4)


@each_network
def test_batch_of_one_trains(name: str) -> None:
    model = build(name)
    model(images(1, 160, 160)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@each_network
def test_gradient_reaches_every_parameter(name: str) -> None:
    """No layer is cut off. The images are so large that no map is one pixel, where an offset would not matter."""
    model = build(name)
    F.cross_entropy(model(images(4, 160, 140)), torch.arange(4)).backward()
    dead = [name for name, parameter in model.named_parameters() if not parameter.grad.count_nonzero()]
    before_norm = {f"{path}.conv_frelu.bias" for path, m in model.named_modules() if isinstance(m, cellops.FReLU)}
    assert set(dead) <= before_norm, "only a bias that the batch's mean takes away may have a gradient of 0"


@each_network
def test_state_dict_round_trip(name: str) -> None:
    model, file = build(name).eval(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    network, options = SMALL[name]
    other = create_model(network, num_classes=4, **options).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))


@each_network
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_equals_its_plain_twin(name: str, training: bool) -> None:
    """Same weights: same logits, gradients and running statistics, in float64 to its last digits."""
    ours = build(name).double().train(training)
    plain = plain_twin(ours)
    assert not any(type(module) in PLAIN for module in plain.modules())
    assert any(type(module) in PLAIN for module in ours.modules())
    assert list(plain.state_dict()) == list(ours.state_dict())
    input = images().double()
    results = []
    for model in (ours, plain):
        leaf = input.clone().requires_grad_()
        logits = model(leaf)
        F.cross_entropy(logits, torch.arange(4)).backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        results.append({"logits": logits.detach(), "input": leaf.grad, **gradients, **dict(model.named_buffers())})
    for key, value in results[1].items():
        torch.testing.assert_close(
            results[0][key], value, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", MAIN)
def test_traces_without_a_break(name: str) -> None:
    """torch.compile sees one graph of any batch, forward and backward, in training."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = build(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (4, 3):
        input = images(batch)
        torch._dynamo.mark_dynamic(input, 0)
        eager = torch.autograd.grad(model(input).square().sum(), list(model.parameters()))
        found = torch.autograd.grad(compiled(input).square().sum(), list(model.parameters()))
        error = _difference(found, eager)
        assert error < 1e-3, f"gradients are off by {error:.1e}"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "training",
    [
        pytest.param(False, id="evaluation", marks=pytest.mark.exhaustive),
        pytest.param(True, id="training", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", MAIN)
def test_two_graphs_serve_all_batch_sizes(name: str, training: bool) -> None:
    """The first is for the batch at hand; the second, at another size, for any."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(build(name).train(training), backend=counter, fullgraph=True)
    with torch.set_grad_enabled(training):
        for batch in (2, 3, 5, 8):
            assert compiled(images(batch)).shape == (batch, 4)
    assert counter.frame_count == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MAIN)
def test_compiles(name: str) -> None:
    """The same by the real compiler."""
    torch.compiler.reset()
    model = build(name)
    compiled = torch.compile(model, fullgraph=True)
    eager = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(compiled(images()).square().sum(), list(model.parameters()))
    error = _difference(found, eager)
    assert error < 1e-2, f"gradients are off by {error:.1e}"


def _difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    one, other = (torch.cat([value.flatten() for value in values]) for values in (found, expected))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", MAIN)
def test_exports(name: str) -> None:
    """An exported program says the same, for other batch sizes too."""
    model = build(name).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAIN)
def test_learns_16_images_by_heart(name: str) -> None:
    """From its own start to 100 % in evaluation mode: statistics, zeroed normalisations and offsets work out."""
    torch.manual_seed(0)
    network, options = SMALL[name]
    model = create_model(network, num_classes=4, drop_rate=0.0, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    input, target = images(16, 64, 64), torch.arange(16) % 4
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(120):
        loss = F.cross_entropy(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            with torch.no_grad():
                accuracy = (model.eval()(input).argmax(1) == target).float().mean()
            if accuracy == 1:
                return
            model.train()
    pytest.fail(f"accuracy {accuracy:.2f}, loss {loss:.3f}")
