"""The networks that the package ships; modules of tests register others as soon as they are collected."""

from __future__ import annotations

from cellops.models import list_models


def shipped(source: str | None = None) -> list[str]:
    """The names that `list_models` gives, without those of tests."""
    return [name for name in list_models(source) if not name.startswith("tests_")]
