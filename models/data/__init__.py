"""Cell images: reading, splitting, storing and loading them."""

from cellops.models.data.augment import build_augmentation
from cellops.models.data.folds import Fold, FoldError, Folds, make_folds, near_duplicates, pairs_alike
from cellops.models.data.images import ImageError, Unreadable, read_image, scan
from cellops.models.data.layouts import LayoutError, open_data
from cellops.models.data.loader import Batch, BatchLoader
from cellops.models.data.samples import CellData, Sample
from cellops.models.data.store import ImageStore

__all__ = [
    "Batch",
    "BatchLoader",
    "CellData",
    "Fold",
    "FoldError",
    "Folds",
    "ImageError",
    "ImageStore",
    "LayoutError",
    "Sample",
    "Unreadable",
    "build_augmentation",
    "make_folds",
    "near_duplicates",
    "open_data",
    "pairs_alike",
    "read_image",
    "scan",
]
