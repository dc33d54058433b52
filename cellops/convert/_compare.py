"""Whether a module computes the same after it was changed: outputs, gradients and buffers of copies with drawn weights.

Names and shapes do not tell what a `forward` does; this does. The module itself is not called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

TOLERANCE = 1e-6  # of float64, by the largest value: rounding is 1e-12, another formula 1e-2 and more
TOLERANCE_FLOAT32 = 1e-3  # on devices without float64


def difference(
    module: nn.Module, convert: Callable[[nn.Module], None], shapes: tuple[tuple[int, ...], ...]
) -> str | None:
    """What a changed copy does otherwise, or None; in evaluation and in training.

    Args:
        module: stays as it is.
        convert: changes a module in place.
        shapes: of the tensors that `forward` takes.
    """
    device = next(module.parameters()).device
    dtype = torch.float32 if device.type in ("mps", "xpu") else torch.float64
    tolerance = TOLERANCE if dtype is torch.float64 else TOLERANCE_FLOAT32
    generator = torch.Generator("cpu").manual_seed(0)
    # Whatever the caller is in, gradients are wanted.
    with (
        torch.random.fork_rng(devices=[]),
        torch.autocast(device.type, enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            theirs = copy.deepcopy(module).to(dtype).requires_grad_()
            _draw(theirs, generator)
            ours = copy.deepcopy(theirs)
            convert(ours)
        except Exception as error:  # whatever a stranger's module raises is the reason it stays
            return f"a copy cannot be changed: {_first_line(error)}"
        inputs = [_normal(shape, generator).to(dtype).to(device) for shape in shapes]
        for training in (False, True):
            mode = "training" if training else "evaluation"
            try:
                wanted = _results(theirs.train(training), inputs)
            except Exception as error:
                return f"it cannot be run for a comparison in {mode}: {_first_line(error)}"
            try:
                found = _results(ours.train(training), inputs)
            except Exception as error:
                return f"it takes what ours does not, in {mode}: {_first_line(error)}"
            for name, tensor in wanted.items():
                other = found.get(name)
                if other is None or other.shape != tensor.shape or not _close(other, tensor, tolerance):
                    return f"it computes something else than ours: {name} differ in {mode}"
    return None


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    """Weights that hide nothing: those that start at zero or one, too."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(_normal(parameter.shape, generator) / fan_in**0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(_normal(buffer.shape, generator))
            elif name.endswith("running_var"):
                buffer.copy_(_normal(buffer.shape, generator).square() + 0.5)


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Numbers drawn on the CPU, also where another device is the default."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _results(module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers by name; a gradient that is not connected counts as zero."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = module(*leaves)
    if not isinstance(output, Tensor):
        raise TypeError(f"forward returns a {type(output).__name__}, not a tensor")
    parameters = dict(module.named_parameters())
    ramp = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).reshape(output.shape)
    every = [*leaves, *parameters.values()]
    gradients = torch.autograd.grad((output * ramp).sum(), every, allow_unused=True)
    names = [*(f"gradients to input {i}" for i in range(len(leaves))), *(f"gradients to {name}" for name in parameters)]
    results = {"outputs": output.detach()}
    for name, leaf, gradient in zip(names, every, gradients, strict=True):
        results[name] = torch.zeros_like(leaf) if gradient is None else gradient
    results |= {f"buffers {name}": buffer.clone() for name, buffer in module.named_buffers()}
    return results


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    if wanted.numel() == 0:
        return True
    found, wanted = found.double(), wanted.double()
    return bool((found - wanted).abs().max() <= tolerance * (1 + wanted.abs().max()))


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
