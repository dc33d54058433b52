"""The module of `depthwise_conv2d`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from cellops.nn import _batch_norm, _children, _compiled, _onednn
from cellops.ops._registration import integer
from cellops.ops.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_batch_norm
from cellops.ops.group_conv1x1 import ACTIVATION_CODES
from cellops.reference._activation import ACTIVATIONS


class DepthwiseConv2d(nn.Module):
    """Depthwise convolution, batch normalisation and activation in one; children `conv` and `bn`.

    In training the convolution is normalised by its batch, in evaluation by the running statistics, which are folded
    into scale and shift. A child that is not what it was made as (SyncBatchNorm, a frozen one) or has hooks is called;
    so are both with a stride, which the op does not have, and where that is the faster (`_plain_is_faster`), compiled
    (`_compiled.stands_back`) too.

    Args:
        channels: C.
        kernel_size: k, odd; zero padding of k // 2.
        stride: of the convolution.
        norm: whether `bn` normalises the convolution; without it `bn` is None.
        activation: "none", "relu", "relu6", "gelu" (with the error function), "silu" or "hardswish".
        bias: whether the convolution has a bias.

    Raises:
        ValueError: `kernel_size` is even or less than 1, `stride` is less than 1, one of them or `channels` is no
            integer, or `activation` is unknown.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        norm: bool = True,
        activation: str = "relu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        channels, kernel_size = integer("channels", channels), integer("kernel_size", kernel_size)
        stride = integer("stride", stride)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        if activation not in ACTIVATION_CODES:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATION_CODES))}, got {activation!r}")
        self.activation = activation
        self.conv = nn.Conv2d(channels, channels, kernel_size, stride, kernel_size // 2, groups=channels, bias=bias)
        self.bn = nn.BatchNorm2d(channels) if norm else None

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)].

        Raises:
            ValueError: in training, one value per channel; else the errors are those of `cellops.depthwise_conv2d`.
        """
        if not (fits(self.conv) and _children.are_plain(self.conv, self.bn)):
            return _compose(input, self.conv, self.bn, self.activation)
        return convolve(input, self.conv, self.bn, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def fits(conv: nn.Module) -> bool:
    """Whether a convolution is one that the op computes: depthwise, odd and square, stride 1, padded to its size."""
    if not isinstance(conv, nn.Conv2d):
        return False
    return conv.groups == conv.in_channels == conv.out_channels and _children.keeps_size(conv)


def convolve(input: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, activation: str) -> Tensor:
    """A convolution that `fits` and what follows it in one, as `nn.BatchNorm2d` in its present mode would do it.

    Raises:
        ValueError: in training, one value per channel; else the errors are those of `cellops.depthwise_conv2d`.
    """
    # A tracer wants modules, and whichever mode they are in later; an image without a batch is nn.Conv2d's alone.
    if isinstance(input, Proxy) or input.dim() == 3:
        return _compose(input, conv, bn, _batch_norm.behind(bn, activation))
    if _plain_is_faster(input, conv) or _compiled.stands_back("depthwise_conv2d", input, conv):
        return _compose(input, conv, bn, _batch_norm.behind(bn, activation))
    if bn is None:
        return depthwise_conv2d(input, conv.weight, None, conv.bias, activation)
    if not _batch_norm.uses_batch_statistics(bn):
        return depthwise_conv2d(input, conv.weight, *_batch_norm.folded(bn, conv.bias), activation)
    _batch_norm.check_batch(input.shape)
    gamma, beta = _batch_norm.affine(bn, conv.bias)
    output, mean, var = depthwise_conv2d_batch_norm(input, conv.weight, gamma, beta, bn.eps, activation)
    count = input.shape[0] * input.shape[2] * input.shape[3]
    _batch_norm.update_running_statistics(bn, mean, var, conv.bias, count)
    return output


def _plain_is_faster(input: Tensor, conv: nn.Conv2d) -> bool:
    """Whether PyTorch's modules take less time on a CPU; on a GPU the op runs.

    Two cores of an AMD EPYC (Zen 4), float32, maps from 7x7 to 56x56, with AVX-512 and with AVX2: with 3x3 ours take
    0.26 to 0.99 of their time; with 5x5, for which oneDNN has loops of its own, 0.9 to 1.2 in inference, and with
    gradients 0.3 to 0.8, with AVX2 in channels_last 1.05 to 1.3.

    A trace holds the op: `torch.jit.trace` runs once more without gradients, and wants the same graph.
    """
    if input.device.type != "cpu" or input.dim() != 4 or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if input.shape[1] != conv.in_channels:
        return False  # the op's error says more
    return conv.kernel_size[0] > 3 and not torch.is_grad_enabled() and _onednn.convolves(_onednn.dtype_of(input))


def _compose(input: Tensor, conv: nn.Module, bn: nn.Module | None, activation: str) -> Tensor:
    output = conv(input)
    return ACTIVATIONS[activation](output if bn is None else bn(output))
