"""Which files prediction finds, and how they become a network's input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trees
from PIL import Image

from cellops.models.prediction.files import image_files
from cellops.models.prediction.predictor import sources
from cellops.models.prediction.preparation import Preparation
from cellops.models.prediction.table import PredictionTable


def test_what_archives_leave_is_passed_over(tmp_path):
    """As in training; but a path that is given is taken, and once."""
    root = tmp_path / "root"
    for number in range(3):
        trees.write(root / f"{number}" / f"{number:06d}.bmp", trees.picture(number, (8, 8)))
    for place in (root / "0" / "._000000.bmp", root / "__MACOSX" / "0" / "000000.bmp", root / ".trash" / "1.png"):
        place.parent.mkdir(exist_ok=True, parents=True)
        place.write_bytes(b"Mac OS X")
    expected = [root / name for name in ("0/000000.bmp", "1/000001.bmp", "2/000002.bmp")]
    assert [path for path, _ in image_files([root])] == expected
    hidden = [root / ".trash", root / "0" / "._000000.bmp"]
    assert [path for path, _ in image_files([root, *hidden, *hidden, root / "0" / "000000.bmp"])] == [
        *expected,
        root / ".trash" / "1.png",
        hidden[1],
    ]
    assert len(list(sources(root))) == 3  # of a Predictor
    (root / "3").mkdir()
    (root / "3" / ".x.png").write_bytes(b"Mac OS X")
    with pytest.raises(ValueError, match="no images in the folder"):
        image_files([root / "3"])


def test_another_size_is_made_from_the_image(tmp_path):
    """Not from one that was shrunk before; what is seen of a larger store stays."""
    image = trees.picture(3, (96, 96))
    small = Preparation((32, 32), (32, 32), augmentation={"normalise": {"mean": 0.0, "std": 1.0}})
    large = small.with_input_size((96, 64))
    assert large.input_size == large.store_size == (96, 64) and large.resize == small.resize
    wanted = torch.from_numpy(np.asarray(Image.fromarray(image).resize((64, 96), Image.Resampling.BICUBIC)) / 255)
    torch.testing.assert_close(large(image).permute(1, 2, 0).double(), wanted, atol=1e-6, rtol=0)
    assert Preparation((32, 32), (40, 48)).with_input_size((96, 16)).store_size == (120, 24)


def test_a_runs_own_predictions_are_not_replaced(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "predictions.csv").write_text("image\n")
    with pytest.raises(ValueError, match="is a training run"):
        PredictionTable(tmp_path, ("a", "b"), {}, resume=False, overwrite=True)
    assert (tmp_path / "predictions.csv").read_text() == "image\n"
