"""From stored pixels to the network's input, with the variations of training.

Rotation, flips, zoom and crops are one affine map, so that a pixel is interpolated once, and evaluation goes through
the same interpolation. It does not filter: images stored at more than one and a half times the input's size alias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as images

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BORDERS = {"reflect": "reflection", "edge": "border", "black": "zeros"}

# What each key may hold; build_augmentation describes them.
KEYS = {
    "rotation",
    "horizontal_flip",
    "vertical_flip",
    "crop_fraction",
    "random_crop",
    "resized_crop",
    "zoom",
    "match_interpolation",
    "border",
    "color_jitter",
    "rand_augment",
    "erasing",
    "cutout",
    "normalise",
}


Change = Callable[[Tensor, torch.Generator], Tensor]


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """A number from low to high."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def chance(generator: torch.Generator, probability: float) -> bool:
    """True with a probability."""
    return float(torch.rand((), generator=generator)) < probability


class Geometry:
    """Crop, zoom, rotation and flips: uint8 [3, H, W] to float [3, h, w] from 0 to 1."""

    def __init__(self, config: Mapping[str, Any], size: tuple[int, int], train: bool) -> None:
        self.size = size
        self.positions = [(2 * torch.arange(side) + 1) / side - 1 for side in size]  # of rows and columns, -1 to 1
        self.kept: tuple[Any, Tensor] = None, torch.empty(0)  # of the last image
        self.train = train
        self.fraction = number(config, "crop_fraction", 1.0, 0.1, 1.0)
        self.rotation = number(config, "rotation", 0.0, 0.0, 180.0)
        self.flips = tuple(number(config, f"{way}_flip", 0.0, 0.0, 1.0) for way in ("horizontal", "vertical"))
        self.random_crop = switch(config, "random_crop", False)
        self.zoom = interval(config.get("zoom", 1.0), "zoom", around=None)
        crop = section(config, "resized_crop", {"scale", "ratio"})
        self.scale = interval(crop.get("scale", (0.08, 1.0)), "resized_crop.scale", around=None) if crop else None
        self.ratio = interval(crop.get("ratio", (3 / 4, 4 / 3)), "resized_crop.ratio", around=None)
        border = config.get("border", "reflect")
        if border not in BORDERS:
            raise ValueError(f"augmentation border must be one of {', '.join(BORDERS)}, got {border!r}")
        self.border = BORDERS[border]
        # Interpolation smooths: by nothing on a pixel, most between two. Networks notice: one trained on turned PBC
        # cells lost 7 % of them where evaluation took the pixels as they are. So evaluation interpolates too: at a
        # fraction f between two pixels the power left of noise is f^2 + (1 - f)^2, in the mean 2/3, which
        # f = (1 - 1 / sqrt(3)) / 2 leaves too.
        moved = self.rotation or self.random_crop or self.scale is not None or self.zoom != (1.0, 1.0)
        matched = switch(config, "match_interpolation", True)
        self.phase = 1 - 1 / math.sqrt(3) if moved and matched else 0.0  # in halves of a pixel

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        height, width = image.shape[1:]
        window = [height * self.fraction, width * self.fraction]
        if not self.train:
            return self.sampled(image, window, [self.phase / height, self.phase / width])
        shift = [0.0, 0.0]
        anywhere = self.random_crop
        if self.scale is not None:
            drawn = self.drawn_window(height, width, generator)
            window, anywhere = drawn or self.largest_window(height, width), drawn is not None
        if anywhere:
            shift = [
                uniform(generator, window[i] - side, side - window[i]) / side for i, side in enumerate((height, width))
            ]
        if self.zoom != (1.0, 1.0):
            factor = math.exp(uniform(generator, *map(math.log, self.zoom)))
            window = [side / factor for side in window]
        angle = math.radians(uniform(generator, -self.rotation, self.rotation)) if self.rotation else 0.0
        mirror_x, mirror_y = (-1.0 if p and chance(generator, p) else 1.0 for p in self.flips)
        return self.sampled(image, [window[0] * mirror_y, window[1] * mirror_x], shift, angle)

    def sampled(self, image: Tensor, window: Sequence[float], shift: Sequence[float], angle: float = 0.0) -> Tensor:
        """The pixels of a window, interpolated.

        Args:
            image: uint8 [3, H, W].
            window: height and width in pixels of the image; negative ones are mirrored.
            shift: of its middle from the image's, down and right, in halves of the image's sides.
            angle: that it is turned by, in radians.
        """
        height, width = image.shape[1:]
        down, right = window
        source = image.float() / 255
        if (abs(down), abs(right)) == (height, width) == self.size and not any(shift) and not angle:
            return source.flip([place for place, side in ((1, down), (2, right)) if side < 0])
        positions = (height, width, down, right, *shift, angle)
        kept = self.kept
        if positions != kept[0]:  # in evaluation all images of a size are sampled alike
            kept = self.kept = positions, self.grid(*positions)
        return F.grid_sample(source[None], kept[1], mode="bilinear", padding_mode=self.border, align_corners=False)[0]

    def grid(
        self, height: int, width: int, down: float, right: float, shift_down: float, shift_right: float, angle: float
    ) -> Tensor:
        """The positions [1, h, w, 2] of `F.affine_grid`, whose matrix product takes as long as all else here."""
        cos, sin = math.cos(angle), math.sin(angle)
        rows, columns = self.positions
        grid = torch.empty(1, *self.size, 2)
        along_x, along_y = columns * (cos * right / width), columns * (sin * right / height)
        torch.add((rows * (-sin * down / width))[:, None], along_x + shift_right, out=grid[0, ..., 0])
        torch.add((rows * (cos * down / height))[:, None], along_y + shift_down, out=grid[0, ..., 1])
        return grid

    def drawn_window(self, height: int, width: int, generator: torch.Generator) -> list[float] | None:
        """Height and width of a window of drawn area and proportions; None where ten draws reach out of the image."""
        assert self.scale is not None
        for _ in range(10):
            area = height * width * uniform(generator, *self.scale)
            ratio = math.exp(uniform(generator, *map(math.log, self.ratio)))
            high, wide = math.sqrt(area / ratio), math.sqrt(area * ratio)
            if high <= height and wide <= width:
                return [high, wide]
        return None

    def largest_window(self, height: int, width: int) -> list[float]:
        """Height and width of the largest window whose proportions may be drawn."""
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        return [min(height, width / ratio), min(width, height * ratio)]


def shift_hue(image: Tensor, shift: float) -> Tensor:
    """The hue turned by `shift` of the circle: float [3, H, W] from 0 to 1, the values of torchvision's `adjust_hue`.

    A third of its time: the colour follows from the position on the hexagon of hues without a table of its six sides.
    """
    red, green, blue = image
    most, least = image.amax(0), image.amin(0)
    span = most - least
    safe = torch.where(span == 0, 1, span)
    sixths = torch.where(
        most == red,
        (green - blue) / safe,
        torch.where(most == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    position = (torch.tensor([5.0, 3.0, 1.0])[:, None, None] + (sixths + 6 * shift)) % 6
    return most - span * torch.minimum(position, 4 - position).clamp_(0, 1)


class ColourJitter:
    """Brightness, contrast, saturation and hue by drawn factors in a drawn order, as torchvision's ColorJitter."""

    ADJUST: Mapping[str, Callable[[Tensor, float], Tensor]] = {
        "brightness": images.adjust_brightness,
        "contrast": images.adjust_contrast,
        "saturation": images.adjust_saturation,
        "hue": shift_hue,
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.ranges = {
            name: interval(config[name], f"color_jitter.{name}", around=0.0 if name == "hue" else 1.0)
            for name in self.ADJUST
            if config.get(name)
        }
        if "hue" in self.ranges and not -0.5 <= self.ranges["hue"][0] <= self.ranges["hue"][1] <= 0.5:
            raise ValueError(f"augmentation color_jitter.hue must lie in -0.5 to 0.5, got {config['hue']}")

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        names = list(self.ranges)
        for place in torch.randperm(len(names), generator=generator).tolist():
            image = self.ADJUST[names[place]](image, uniform(generator, *self.ranges[names[place]]))
        return image


class RandAugment:
    """torchvision's RandAugment, its draws taken from the generator given instead of the global one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        operations = whole(config, "rand_augment.operations", 2, 0, 100)
        self.transform = v2.RandAugment(operations, whole(config, "rand_augment.magnitude", 9, 0, 30))

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        state = torch.default_generator.get_state()
        try:
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return self.transform(image)
        finally:
            torch.default_generator.set_state(state)


class Erasing:
    """A rectangle of noise or of one value, after normalisation (Zhong et al. 2020)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.probability = number(config, "erasing.probability", 0.5, 0.0, 1.0)
        self.area = interval(config.get("area", (0.02, 1 / 3)), "erasing.area", around=None)
        self.ratio = interval(config.get("ratio", (0.3, 3.3)), "erasing.ratio", around=None)
        self.value = config.get("value", "noise")
        if self.value not in ("noise", "mean"):
            raise ValueError(f"augmentation erasing.value must be noise or mean, got {self.value!r}")

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if not chance(generator, self.probability):
            return image
        height, width = image.shape[1:]
        area = height * width * uniform(generator, *self.area)
        ratio = math.exp(uniform(generator, *map(math.log, self.ratio)))
        high = min(max(round(math.sqrt(area * ratio)), 1), height)
        wide = min(max(round(math.sqrt(area / ratio)), 1), width)
        top = int(torch.randint(height - high + 1, (), generator=generator))
        left = int(torch.randint(width - wide + 1, (), generator=generator))
        part = torch.randn(3, high, wide, generator=generator) if self.value == "noise" else 0.0
        image[:, top : top + high, left : left + wide] = part
        return image


class Cutout:
    """Squares of the mean value, which may reach over the border (DeVries and Taylor 2017)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.holes = whole(config, "cutout.holes", 1, 0, 1000)
        self.side = number(config, "cutout.size", 0.25, 0.0, 1.0)

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        height, width = image.shape[1:]
        half = [self.side * side / 2 for side in (height, width)]
        for _ in range(self.holes):
            row, column = uniform(generator, 0, height), uniform(generator, 0, width)
            rows = slice(max(round(row - half[0]), 0), round(row + half[0]))
            image[:, rows, max(round(column - half[1]), 0) : round(column + half[1])] = 0
        return image


class Normalise:
    """Subtract a mean and divide by a deviation: given ones, or those of the image."""

    def __init__(self, config: Any) -> None:
        self.per_image = config == "per_image"
        if config == "imagenet":
            config = IMAGENET
        if self.per_image:
            return
        if not isinstance(config, Mapping) or set(config) != {"mean", "std"}:
            raise ValueError(f"augmentation normalise must be per_image, imagenet or {{mean, std}}, got {config!r}")
        for name in ("mean", "std"):
            values = config[name] if isinstance(config[name], Sequence) else [config[name]]
            if not values or not all(isinstance(value, int | float) for value in values):
                raise ValueError(f"augmentation normalise.{name} must be one number or three, got {config[name]!r}")
        self.mean, self.std = (
            torch.tensor(config[name], dtype=torch.float32).reshape(-1, 1, 1) for name in ("mean", "std")
        )
        if not {self.mean.numel(), self.std.numel()} <= {1, 3} or (self.std <= 0).any():
            raise ValueError(f"augmentation normalise: mean and std are one number or three, std above 0; got {config}")

    def __call__(self, image: Tensor) -> Tensor:
        if self.per_image:
            centred = image - image.mean()  # and by hand, since torch.std_mean takes three times as long
            deviation = centred.square().mean().sqrt()
            return centred / deviation.clamp_min(image.numel() ** -0.5)  # an even image stays finite
        return (image - self.mean) / self.std


class Augmentation:
    """What `build_augmentation` returns: uint8 [3, H, W] and a generator to float32 [3, h, w], normalised."""

    def __init__(self, config: Mapping[str, Any], size: tuple[int, int], train: bool) -> None:
        self.geometry = Geometry(config, size, train)
        self.normalise = Normalise(config.get("normalise", "imagenet"))
        jitter = section(config, "color_jitter", set(ColourJitter.ADJUST))
        rand = section(config, "rand_augment", {"operations", "magnitude"})
        erasing = section(config, "erasing", {"probability", "area", "ratio", "value"})
        cutout = section(config, "cutout", {"holes", "size"})
        # All are built, so that a wrong value is an error of a recipe whether it trains or evaluates.
        self.before: list[Change] = [RandAugment(rand)] if rand else []
        self.between: list[Change] = [ColourJitter(jitter)] if jitter else []
        self.after: list[Change] = [*([Erasing(erasing)] if erasing else []), *([Cutout(cutout)] if cutout else [])]
        if not train:
            self.before, self.between, self.after = [], [], []

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
        for change in self.before:
            image = change(image, generator)
        image = self.geometry(image, generator)
        for change in self.between:
            image = change(image, generator)
        image = self.normalise(image)
        for change in self.after:
            image = change(image, generator)
        return image


def build_augmentation(config: Mapping[str, Any], size: tuple[int, int], train: bool) -> Augmentation:
    """The way from stored pixels to the network's input.

    Args:
        config: what is drawn anew for each image in training; `crop_fraction` and `normalise` count in evaluation too.

            - `rotation`: degrees to either side, 180 for any angle
            - `horizontal_flip`, `vertical_flip`: probability
            - `crop_fraction`: side of the window seen, as a share of the image's (1); its middle, or with
              `random_crop: true` anywhere in training
            - `resized_crop`: `scale` [low, high] of the area and `ratio` of width to height, in place of the window; a
              window that reaches out of the image is drawn again, as in torchvision
            - `zoom`: [low, high] factor, above 1 enlarges
            - `match_interpolation`: whether evaluation shifts images by a fraction of a pixel where training moves
              them, so that both are smoothed alike (true); false takes the pixels as they are
            - `border`: what lies outside: "reflect" (default), "edge" or "black"
            - `color_jitter`: `brightness`, `contrast`, `saturation`, `hue`, a distance or [low, high] as in torchvision
            - `rand_augment`: `operations` (2), `magnitude` (9)
            - `erasing`: `probability`, `area` and `ratio` [low, high], `value` "noise" or "mean"
            - `cutout`: `holes` (1) squares with a side of `size` (0.25) of the image's
            - `normalise`: "imagenet" (default), "per_image", or `mean` and `std`, a number or three of the range 0 to 1
        size: (height, width) of the network's input.
        train: whether to vary.

    Raises:
        ValueError: a key is unknown or a value out of range.
    """
    unknown = set(config) - KEYS
    if unknown:
        raise ValueError(f"augmentation has no {', '.join(sorted(unknown))}; known: {', '.join(sorted(KEYS))}")
    return Augmentation(config, size, train)


def section(config: Mapping[str, Any], name: str, known: set[str]) -> Mapping[str, Any]:
    """A part of the configuration that has keys of its own; empty where it is absent, null or false."""
    part = config.get(name)
    if part is None or part is False:
        return {}
    if not isinstance(part, Mapping) or not part or set(part) - known:
        raise ValueError(f"augmentation {name} must have keys of {', '.join(sorted(known))}, got {part!r}")
    return part


def number(config: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number in a range; of a part of the configuration by the name with the part's before it."""
    value = config.get(name.rpartition(".")[2], default)
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"augmentation {name} must be from {low:g} to {high:g}, got {value!r}")
    return float(value)


def whole(config: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """A whole number in a range, named as in `number`."""
    value = config.get(name.rpartition(".")[2], default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"augmentation {name} must be a whole number from {low} to {high}, got {value!r}")
    return value


def switch(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """True or false."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"augmentation {name} must be true or false, got {value!r}")
    return value


def interval(value: Any, name: str, around: float | None) -> tuple[float, float]:
    """[low, high], or the distance from a middle; without a middle a single number is both."""
    if isinstance(value, int | float):
        if around is None:
            low = high = float(value)
        else:
            low, high = around - value, around + value
            low = max(low, 0.0) if around else low
    elif isinstance(value, Sequence) and len(value) == 2 and all(isinstance(end, int | float) for end in value):
        low, high = map(float, value)
    else:
        raise ValueError(f"augmentation {name} must be a number or [low, high], got {value!r}")
    if low > high or (around != 0.0 and (low < 0 or high <= 0)) or (around is None and low <= 0):
        raise ValueError(f"augmentation {name} must rise from a number above 0, got {value!r}")
    return low, high
