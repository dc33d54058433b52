"""Networks that already exist: their modules become ours (`accelerate`), BatchNorm is folded for inference (`fuse`).

No other library is imported: modules of timm, torchvision and mmcv are known by name and structure, and compared with
what they would become before they change.
"""

from cellops.convert._accelerate import accelerate
from cellops.convert._fuse import fuse
from cellops.convert._report import Change, Report

__all__ = ["Change", "Report", "accelerate", "fuse"]
