"""CBAM's spatial attention after `accelerate`: what is exchanged inside it later is called, not left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cellops
from cellops.convert.modules import PooledAttention

torchvision = pytest.importorskip("torchvision")


class BasicConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class SpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = BasicConv()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)).sigmoid()


class Doubled(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.conv(x)


@pytest.mark.parametrize(
    "change",
    ["nothing", "folded", "synchronised", "frozen", "group norm", "adapter", "another forward", "geometry", "traced"],
)
def test_what_was_exchanged_is_called(change: str) -> None:
    """A normalisation of another class was left out, without a word."""
    found = []
    images = torch.randn(2, 8, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for accelerated in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(SpatialGate()).double().eval()
        inner = network[0].conv
        for tensor in inner.bn.state_dict().values():
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 2)
        if accelerated:
            assert cellops.accelerate(network).replaced and type(network[0]) is PooledAttention
        if change == "folded":
            assert cellops.fuse(network).replaced
        elif change == "synchronised":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
            assert type(inner.bn) is nn.SyncBatchNorm
        elif change == "frozen":
            state = inner.bn.state_dict()
            inner.bn = torchvision.ops.FrozenBatchNorm2d(1).double()
            inner.bn.load_state_dict(state)
        elif change == "group norm":
            inner.bn = nn.GroupNorm(1, 1).double()
        elif change == "adapter":
            inner.conv = Doubled(inner.conv)
        elif change == "another forward":
            forward = inner.bn.forward
            inner.bn.forward = lambda x, forward=forward: 2 * forward(x)
        elif change == "geometry":
            inner.conv.dilation, inner.conv.padding = (2, 2), (6, 6)
        elif change == "traced":  # in evaluation, to be trained
            network = torch.fx.symbolic_trace(network).train()
        found.append(network(images))
    torch.testing.assert_close(found[1], found[0])
