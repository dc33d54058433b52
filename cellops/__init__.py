"""Operators of lightweight convolutional networks, with native kernels."""

from cellops import _source_tree

__version__ = "0.1.0"

_source_tree.map_models()
