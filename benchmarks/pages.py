"""Markdown that the scripts here write into pages: tables, and the text between a page's two markers."""

from __future__ import annotations

from collections.abc import Sequence


def table(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *rows = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, "|" + "---|" * len(cells[0]), *rows])


def updated(page: str, text: str, begin: str, end: str) -> str:
    """The page with what is between the lines `begin` and `end` replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page has no lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"
