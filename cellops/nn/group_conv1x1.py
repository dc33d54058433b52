"""The module of `group_conv1x1`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from cellops import _native
from cellops.nn import _batch_norm, _children, _compiled, _onednn
from cellops.ops._registration import integer
from cellops.ops.group_conv1x1 import ACTIVATION_CODES, group_conv1x1, group_conv1x1_batch_norm
from cellops.reference._activation import ACTIVATIONS

_LANES = 16  # of float32 in the widest vectors
_DEEP = 512  # channels of a group, from which on PyTorch's modules are faster
_SHALLOW = 40  # up to which ours are, where oneDNN multiplies bfloat16 in tiles


class GroupConv1x1(nn.Module):
    """Grouped 1x1 convolution, batch normalisation, activation and channel shuffle in one; children `conv` and `bn`.

    In training the convolution is normalised by its batch, in evaluation by the running statistics, which are folded
    into scale and shift. A child that is not what it was made as (SyncBatchNorm, a frozen one) or has hooks is called;
    so are both where that is the faster (`_plain_is_faster`, and compiled `_compiled.stands_back`).

    Args:
        in_channels: C.
        out_channels: O.
        groups: a divisor of C and O.
        norm: whether `bn` normalises the convolution; without it `bn` is None.
        activation: "none", "relu", "relu6", "gelu" (with the error function), "silu" or "hardswish".
        shuffle: whether to shuffle the channels at the end, as `torch.channel_shuffle` does.
        bias: whether the convolution has a bias.

    Raises:
        ValueError: `groups` does not divide both channel counts, one of the three is no integer, or `activation` is
            unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        norm: bool = True,
        activation: str = "relu",
        shuffle: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        in_channels, out_channels = integer("in_channels", in_channels), integer("out_channels", out_channels)
        groups = integer("groups", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels % groups:
                raise ValueError(f"{name} must be a multiple of groups = {groups}, got {channels}")
        if activation not in ACTIVATION_CODES:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATION_CODES))}, got {activation!r}")
        self.groups = groups
        self.activation = activation
        self.shuffle = shuffle
        self.conv = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H, W].

        Raises:
            ValueError: in training, one value per channel; else the errors are those of `cellops.group_conv1x1`.
        """
        if not (_children.are_plain(self.conv, self.bn) and fits(self.conv) and self.conv.groups == self.groups):
            return _compose(input, self.conv, self.bn, self.groups, self.activation, self.shuffle)
        return convolve(input, self.conv, self.bn, self.groups, self.activation, self.shuffle)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, shuffle={self.shuffle}"


def fits(conv: nn.Conv2d) -> bool:
    """Whether a convolution is one that the op computes: 1x1, stride 1, no padding."""
    return conv.kernel_size == (1, 1) and _children.keeps_size(conv)


def convolve(
    input: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, groups: int, activation: str, shuffle: bool
) -> Tensor:
    """A grouped 1x1 convolution and what follows it in one, as `nn.BatchNorm2d` in its present mode would do it.

    Raises:
        ValueError: in training, one value per channel; else the errors are those of `cellops.group_conv1x1`.
    """
    # A tracer wants modules, and whichever mode they are in later; an image without a batch is nn.Conv2d's alone.
    if isinstance(input, Proxy) or input.dim() == 3:
        return _compose(input, conv, bn, groups, _batch_norm.behind(bn, activation), shuffle)
    if _compiled.stands_back("group_conv1x1", input, conv) and input.shape[1] == conv.in_channels:
        return _compose(input, conv, bn, groups, _batch_norm.behind(bn, activation), shuffle)
    of_batch = bn is not None and _batch_norm.uses_batch_statistics(bn)
    shape = input.shape
    if of_batch:
        _batch_norm.check_batch(shape[:1] + conv.weight.shape[:1] + shape[2:])
    if _plain_is_faster(input, conv, groups, shuffle, of_batch):
        return _compose(input, conv, bn, groups, _batch_norm.behind(bn, activation), shuffle)
    if bn is None:
        return group_conv1x1(input, conv.weight, None, conv.bias, groups, activation, shuffle)
    if not of_batch:
        scale, shift = _batch_norm.folded(bn, conv.bias)
        return group_conv1x1(input, conv.weight, scale, shift, groups, activation, shuffle)
    gamma, beta = _batch_norm.affine(bn, conv.bias)
    output, mean, var = group_conv1x1_batch_norm(input, conv.weight, gamma, beta, bn.eps, groups, activation, shuffle)
    _batch_norm.update_running_statistics(bn, mean, var, conv.bias, shape[0] * shape[2] * shape[3])
    return output


def _plain_is_faster(input: Tensor, conv: nn.Conv2d, groups: int, shuffle: bool, of_batch: bool) -> bool:
    """Whether PyTorch's modules take less time on a CPU, with statistics of the batch or not.

    On an AMD EPYC (Zen 4) ours take 0.45 to 1.0 of the modules' time forward and backward and 0.3 to 1.0 in evaluation,
    but more

    - in groups of 512 channels and more, where oneDNN's products are the faster ones: 0.9 to 1.4, and 0.9 to 1.9;
    - in training on channels_last memory and 1x1 maps, of one group: 0.8 to 1.3, and in whole networks of small maps
      1.1 to 1.2;
    - in bfloat16 where the CPU multiplies it, if there are gradients, of one group in NCHW too, 0.85 to 1.4, and in
      channels_last and unshuffled of groups that fill no vectors, 1.0 to 1.6;
    - and where it multiplies in tiles (AMX), which ours do not: of groups of more than 40 channels, and in
      channels_last of all but shallow ones that fill vectors; this was measured beside oneDNN without tiles.
    """
    dtype = _onednn.dtype_of(input)
    if input.device.type != "cpu" or input.dim() != 4 or not _onednn.convolves(dtype):
        return False
    if input.shape[1] != conv.in_channels:
        return False  # the op's error says more
    depth, rows = conv.in_channels // groups, _in_rows(input)
    if dtype != torch.bfloat16:
        return depth >= _DEEP or (of_batch and groups == 1 and rows)
    uneven = bool(depth % _LANES or conv.out_channels // groups % _LANES)
    if _onednn.multiplies_in_tiles() and (depth > _LANES or uneven if rows else depth > _SHALLOW):
        return True
    trains = of_batch or (torch.is_grad_enabled() and (input.requires_grad or conv.weight.requires_grad))
    return depth >= _DEEP or (trains and (groups == 1 or (rows and uneven and not shuffle)))


def _in_rows(input: Tensor) -> bool:
    """Whether the op finds rows of channels in memory: channels_last, or maps of one pixel."""
    return input.shape[2] * input.shape[3] == 1 or _native.is_channels_last(input)


def _compose(
    input: Tensor, conv: nn.Module, bn: nn.Module | None, groups: int, activation: str, shuffle: bool
) -> Tensor:
    output = conv(input)
    if bn is not None:
        output = bn(output)
    output = ACTIVATIONS[activation](output)
    return nn.functional.channel_shuffle(output, groups) if shuffle else output
