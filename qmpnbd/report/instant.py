"""How a point in time was taken, in documents and as text; pure."""

from __future__ import annotations

from collections.abc import Iterator

from qmpnbd.printable import printable as shown
from qmpnbd.qmp.pointintime import Statement
from qmpnbd.report.model import InstantEntry


def instant_entry(statement: Statement) -> InstantEntry:
    """Describes a point in time."""
    said = statement.consistency
    return InstantEntry(
        recipe=statement.recipe.value,
        why=statement.why,
        consistency=said.kind,
        reason=said.reason,
        remedy=said.remedy,
        frozen_ms=round(said.window_ms, 3),
        window_ms=round(statement.window_ms, 3),
        paused_ms=round(statement.paused_ms, 3),
    )


def instant_text(instant: InstantEntry) -> Iterator[str]:
    """Yields the lines that tell of a point in time."""
    pause = f"the guest paused for {instant.paused_ms:.0f} ms" if instant.paused_ms else "no pause"
    yield shown(f"consistent: one instant, {instant.consistency}, within {instant.window_ms:.0f} ms, {pause}")
    if instant.reason:
        yield shown(f"not frozen: {instant.reason}. {instant.remedy}")
    yield shown(f"recipe: {instant.recipe}: {instant.why}")
