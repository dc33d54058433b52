"""Operators of lightweight convolutional networks, with native kernels."""

from cellops import _source_tree
from cellops._explain import explain
from cellops._version import __version__

__all__ = ["__version__", "explain"]

_source_tree.map_models()
