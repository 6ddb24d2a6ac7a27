"""From what of ours is in a QEMU to the documents of ``qmpnbd status`` and ``qmpnbd recover``, and their text; pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qmpnbd.printable import printable as shown
from qmpnbd.qmp.leftovers import Thing
from qmpnbd.qmp.undo import Undo
from qmpnbd.report.columns import table
from qmpnbd.report.model import RecoverDocument, RunEntry, StatusDocument, TakenDownEntry, ThingEntry

_MEANING = {
    "alive": "alive: left alone by `qmpnbd recover`",
    "dead": "dead: `qmpnbd recover` takes this down",
    "unknown": "unknown: its private directory is not here. If it is dead: `qmpnbd recover --run {run}`",
}


def run_entry(run: str, state: str, things: Iterable[Thing]) -> RunEntry:
    """Describes a run."""
    entries = [{"kind": thing.kind, "name": thing.name, "detail": thing.detail} for thing in things]
    return RunEntry.model_validate({"run": run, "state": state, "things": entries})


def taken_down(removed: Iterable[tuple[str, Undo]]) -> tuple[TakenDownEntry, ...]:
    """Describes what was taken down."""
    return tuple(
        TakenDownEntry(run=run, what=str(undo), commands=tuple(dict(each) for each in undo.commands))
        for run, undo in removed
    )


def things_of(entry: RunEntry) -> Iterator[ThingEntry]:
    """Yields what is there of a run, the exports first: what clients see."""
    yield from sorted(entry.things, key=lambda thing: (thing.kind != "export", thing.kind, thing.name))


def status_text(document: StatusDocument) -> str:
    """Returns what of ours is in a QEMU."""
    guest = document.guest if document.guest == "storage daemon" else f"guest {document.guest}"
    server = "runs" if document.nbd_server else "does not run"
    lines = [f"QEMU {document.qemu}, {guest}, monitor {shown(document.monitor)}; its NBD server {server}"]
    for entry in document.runs:
        lines += ["", f"run {entry.run} is {_MEANING[entry.state].format(run=entry.run)}"]
        rows = [(thing.kind, shown(thing.name), shown(thing.detail)) for thing in things_of(entry)]
        lines += [f"  {line}" for line in table(rows)]
    if not document.runs:
        lines.append("Nothing of qmpnbd is in it.")
    return "\n".join(lines) + "\n"


def recover_text(document: RecoverDocument) -> str:
    """Returns what was taken down, or would be."""
    did = "would take down" if document.dry_run else "took down"
    lines = [f"{did}: {shown(entry.what)} (run {entry.run})" for entry in document.taken_down]
    thaws = "would thaw" if document.dry_run else "thawed"
    lines += [f"{thaws}: the guest of the agent {shown(agent)}" for agent in document.thawed]
    lines += [f"run {run} lives, and was left alone" for run in document.alive]
    if not lines and not document.unknown and not document.left_behind:
        lines = ["Nothing of a killed qmpnbd is in this QEMU."]
    return "".join(f"{line}\n" for line in lines)
