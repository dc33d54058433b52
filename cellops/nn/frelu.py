"""The module of `frelu`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Proxy

from cellops.nn import _batch_norm, _children, _compiled
from cellops.nn.depthwise_conv2d import fits
from cellops.ops._registration import integer
from cellops.ops.frelu import frelu, frelu_batch_norm


class FReLU(nn.Module):
    """Funnel activation (Ma et al. 2020); loads the official port's `conv_frelu.*` and `bn_frelu.*`.

    In training the convolution is normalised by its batch, in evaluation by the running statistics, which are folded
    into scale and shift. A child that is not what it was made as (SyncBatchNorm, a frozen one, another padding) or has
    hooks is called; so are both where the module is traced by `torch.fx`.

    Args:
        channels: C.
        kernel_size: k, odd.
        norm: whether `bn_frelu` normalises the convolution; without it only its bias is added.

    Raises:
        ValueError: `kernel_size` is even or less than 1, or no integer; `channels` is none.
    """

    def __init__(self, channels: int, kernel_size: int = 3, norm: bool = True) -> None:
        super().__init__()
        channels, kernel_size = integer("channels", channels), integer("kernel_size", kernel_size)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        self.conv_frelu = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.bn_frelu = nn.BatchNorm2d(channels) if norm else None
        nn.init.normal_(self.conv_frelu.weight, std=0.01)

    def reset_parameters(self) -> None:
        """Reset the children as they do themselves, then draw the convolution's weight from N(0, 0.01)."""
        for child in self.children():
            if callable(reset := getattr(child, "reset_parameters", None)):
                reset()
        nn.init.normal_(self.conv_frelu.weight, std=0.01)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W].

        Raises:
            ValueError: in training, one value per channel; else the errors are those of `cellops.frelu`.
        """
        conv, bn = self.conv_frelu, self.bn_frelu
        # A tracer wants modules, and whichever mode they are in later; an image without a batch is theirs alone.
        called = isinstance(input, Proxy) or input.dim() == 3 or not (_children.are_plain(conv, bn) and fits(conv))
        if called or (_compiled.stands_back("frelu", input, self) and input.shape[1] == conv.in_channels):
            convolved = conv(input)
            return input.maximum(convolved if bn is None else bn(convolved))
        if bn is None:
            return frelu(input, conv.weight, None, conv.bias)
        if not _batch_norm.uses_batch_statistics(bn):
            return frelu(input, conv.weight, *_batch_norm.folded(bn, conv.bias))
        _batch_norm.check_batch(input.shape)
        gamma, beta = _batch_norm.affine(bn, conv.bias)
        output, mean, var = frelu_batch_norm(input, conv.weight, gamma, beta, bn.eps)
        count = input.shape[0] * input.shape[2] * input.shape[3]
        _batch_norm.update_running_statistics(bn, mean, var, conv.bias, count)
        return output
