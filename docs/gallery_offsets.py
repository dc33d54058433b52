"""What the offsets of deformable convolutions look like on drawn cells, after a short training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import cellops
from cellops.models.data.synthetic import CLASSES, draw_cell, label_of

SIZE, COUNT, SEED = 64, 600, 3
STEPS, BATCH = 150, 32
SHOWN = (1200, 1203, 1206)
"""Cells that were not trained on."""


class Network(nn.Module):
    """A convolution with stride 2, and two deformable ones on its map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.first = cellops.DeformConv2dPack(16, 32, 3, padding=1)
        self.second = cellops.DeformConv2dPack(32, 32, 3, padding=2, dilation=2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(32), nn.BatchNorm2d(32)])
        self.head = nn.Linear(64, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, classes]."""
        x = self.stem(x)
        for layer, norm in zip((self.first, self.second), self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))


def cells(numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] from 0 to 1, and classes [N]."""
    images = torch.stack([torch.from_numpy(draw_cell(SEED, number, SIZE)) for number in numbers])
    return images.permute(0, 3, 1, 2).float() / 255, torch.tensor([label_of(SEED, number) for number in numbers])


def trained() -> Network:
    """A network that tells the drawn cells apart better than chance."""
    torch.manual_seed(0)
    images, labels = cells(list(range(COUNT)))
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(STEPS):
        chosen = torch.randint(COUNT, (BATCH,))
        loss = F.cross_entropy(network(images[chosen] - 0.5), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def sampled_points(network: Network, image: Tensor, row: int, column: int) -> Tensor:
    """The 81 points of the image [81, 2], (y, x), that pixel (row, column) of the second layer's output sees."""
    x = network.stem(image[None] - 0.5)
    first = network.first.conv_offset(x)
    second = network.second.conv_offset(F.relu(network.norms[0](network.first(x))))
    points = []
    for y, x in _points(network.second, second, row, column).tolist():
        inside = [min(max(round(place), 0), SIZE // 2 - 1) for place in (y, x)]
        points.append(_points(network.first, first, *inside))
    return 2 * torch.cat(points)  # the stem's stride


def _points(layer: cellops.DeformConv2dPack, predicted: Tensor, row: int, column: int) -> Tensor:
    """Where the nine taps of one output pixel sample the layer's input: [9, 2]."""
    offset = predicted[0, : layer.offset_channels, row, column].reshape(9, 2)
    step = layer.dilation[0]
    grid = torch.cartesian_prod(torch.arange(-step, step + 1, step), torch.arange(-step, step + 1, step))
    return torch.tensor([row, column]) + grid + offset


def draw() -> Figure:
    """A row for each cell: where a pixel in it and one in the background look, at the start and after training."""
    network, untrained = trained(), Network().eval()
    images, labels = cells(list(SHOWN))
    held_out, wanted = cells(list(range(COUNT, COUNT + 200)))
    with torch.no_grad():
        accuracy = float((network(held_out - 0.5).argmax(1) == wanted).float().mean())
    figure, axes = plt.subplots(len(SHOWN), 3, figsize=(7.2, 2.5 * len(SHOWN)))
    middle, edge = SIZE // 4, 2
    for row, image, label in zip(axes, images, labels, strict=True):
        titles = ("before training", "after: a pixel in the cell", "after: a pixel near the corner")
        views = ((untrained, middle), (network, middle), (network, edge))
        for axis, title, (model, place) in zip(row, titles, views, strict=True):
            points = sampled_points(model, image, place, place)
            axis.imshow(image.permute(1, 2, 0))
            axis.plot(points[:, 1], points[:, 0], ".", color="#facc15", ms=3, clip_on=True)
            axis.plot(2 * place, 2 * place, "x", color="#c2410c", ms=7, mew=2)
            axis.set(xlim=(-0.5, SIZE - 0.5), ylim=(SIZE - 0.5, -0.5), xticks=[], yticks=[])
            if row is axes[0]:
                axis.set_title(title, fontsize=9)
        row[0].set_ylabel(CLASSES[label])
    figure.tight_layout()
    text = (
        f"Two deformable layers of a network of {sum(one.numel() for one in network.parameters())} parameters, trained "
        f"for {STEPS} steps on {COUNT} drawn cells; {100 * accuracy:.0f} % of 200 others are recognised "
        f"(chance {100 // len(CLASSES)} %).\nDots: the 81 points of the image that the crossed pixel is computed from."
    )
    figure.text(0.01, -0.01, text, fontsize=7, color="#475569", va="top")
    return figure
