"""8-bit files: smaller, and of the same opinion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cellops.models import create_model
from cellops.models.export import export_onnx
from cellops.models.quantize import compare, quantize_onnx

for package in ("onnx", "onnxruntime", "onnxscript", "timm"):
    pytest.importorskip(package)


def bars(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of a bright bar that lies or stands."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    for image, label in zip(images, labels, strict=True):
        row, column = torch.randint(4, 18, (2,), generator=generator).tolist()
        if label:
            image[:, row : row + 3, column : column + 10] += 1
        else:
            image[:, row : row + 10, column : column + 3] += 1
    return images, labels


@pytest.mark.slow
def test_a_trained_network_keeps_its_accuracy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("dresnet_025", num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        images, labels = bars(32, step)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plain, small = tmp_path / "plain.onnx", tmp_path / "int8.onnx"
    export_onnx(model, plain, (3, 32, 32))
    quantize_onnx(plain, small, bars(64, 1000)[0])
    images, labels = bars(300, 1001)
    before, after = compare([plain, small], zip(images.split(64), labels.split(64), strict=True))
    assert before.accuracy is not None and before.accuracy > 0.9
    assert after.accuracy is not None and after.accuracy > before.accuracy - 0.02
    assert after.agreement > 0.97 and after.size < 0.85 * before.size  # scales of 96 small convolutions take room
    with pytest.raises(ValueError, match="images must be at least one of shape"):
        quantize_onnx(plain, small, images[:, :1])


@pytest.mark.parametrize("outputs", [1, 2])
def test_answers_of_one_logit_and_of_two(outputs: int, tmp_path: Path) -> None:
    """The file says what the network says, so that both labels count."""

    class Brightness(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            mean = images.mean((1, 2, 3))[:, None]
            return mean if outputs == 1 else torch.cat([-mean, mean], 1)

    images = torch.linspace(-1, 1, 8)[:, None, None, None].expand(8, 3, 4, 4).contiguous()
    export_onnx(Brightness().eval(), tmp_path / "one.onnx", (3, 4, 4))
    export_onnx(nn.Sequential(Negative(), Brightness()).eval(), tmp_path / "other.onnx", (3, 4, 4))
    labels = torch.arange(8) >= 4
    first, second = compare([tmp_path / "one.onnx", tmp_path / "other.onnx"], [(images, labels.long())], runs=1)
    assert (first.accuracy, first.agreement) == (1, 1)
    assert (second.accuracy, second.agreement) == (0, 0)


class Negative(nn.Module):
    """Turns the sign."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -images
