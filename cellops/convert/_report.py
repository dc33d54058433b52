"""What `accelerate` and `fuse` did to a network and what they left, as a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One module that was looked at.

    Attributes:
        module: its name in the network, "" for the network itself.
        was: its class.
        becomes: what it is now, or None where it was left.
        reason: why it was left, "" where it was not.
    """

    module: str
    was: str
    becomes: str | None
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What was done to a network; prints as a table with one row for all modules that share a fate.

    Attributes:
        done: "replaced" or "folded".
        changes: every module that was looked at, in the network's order.
    """

    done: str
    changes: tuple[Change, ...]

    @property
    def replaced(self) -> tuple[Change, ...]:
        """What was changed."""
        return tuple(change for change in self.changes if change.becomes is not None)

    @property
    def left(self) -> tuple[Change, ...]:
        """What was left, with reasons."""
        return tuple(change for change in self.changes if change.becomes is None)

    def __str__(self) -> str:
        head = f"{len(self.replaced)} {self.done}, {len(self.left)} left"
        if not self.changes:
            return head
        fates: dict[tuple[str, str, str], list[str]] = {}
        for change in (*self.replaced, *self.left):
            fate = (change.was, change.becomes or "left", change.reason)
            fates.setdefault(fate, []).append(change.module or "(the network itself)")
        rows = [("", "was", "is now", "modules")]
        rows += [(str(len(names)), was, becomes, _short(names)) for (was, becomes, _), names in fates.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [head]
        reasons = ["", *(reason for _, _, reason in fates)]
        for row, reason in zip(rows, reasons, strict=True):
            cells = (
                row[0].rjust(widths[0]),
                *(text.ljust(width) for text, width in zip(row[1:], widths[1:], strict=True)),
            )
            lines.append("  ".join(cells).rstrip())
            if reason:
                lines.append(f"{'':{widths[0]}}    because {reason}")
        return "\n".join(lines)

    __repr__ = __str__


def _short(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, … {names[-1]}"
