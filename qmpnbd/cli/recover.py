"""``qmpnbd recover``: takes down what killed runs left in a QEMU."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.cli.exit_codes import INCOMPLETE
from qmpnbd.errors import LeftBehindError

if TYPE_CHECKING:
    from qmpnbd.qmp.address import MonitorAddress
    from qmpnbd.report.model import RecoverDocument


EXAMPLES = (
    ("qmpnbd recover --qmp /run/vm.qmp --dry-run", "what would be taken down"),
    ("qmpnbd recover --qmp /run/vm.qmp", "take it down"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "recover",
        description="Takes down what killed runs of qmpnbd left in a running QEMU, recognised by its names, and thaws "
        "guests that they left frozen; runs that live are left alone. It can be run any number of times.",
        allow_abbrev=False,
    )
    options.add_monitor(parser)
    options.add_json(parser, "qmpnbd.recover/1")
    options.add_timeout(parser, options.SHORT_SECONDS)
    options.add_runtime_dir(parser)
    parser.add_argument("--dry-run", action="store_true", help="tell what would be done, and do nothing")
    parser.add_argument(
        "--run",
        dest="runs",
        type=_run_id,
        action="append",
        default=[],
        metavar="ID",
        help="take down this run, too, whose private directory is not here: on your word that it is dead",
    )
    parser.set_defaults(run=run)


def _run_id(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a run id: eight hexadecimal digits, as in `qmpnbd status`")
    return text


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli import signals
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.runs import recover_text

    folder = Path(options.agent_journal())
    journal = folder if folder.is_dir() else None
    work = _document(
        arguments.qmp,
        arguments.runtime_dir,
        arguments.runs,
        arguments.timeout,
        journal=journal,
        dry_run=arguments.dry_run,
    )
    document = signals.run(work)
    output.write([document_json(document) if arguments.json else recover_text(document)])
    output.tell(*document.left_behind)
    for unknown in document.unknown:
        output.tell(f"run {unknown} was left alone: its private directory is not here; if it is dead: --run {unknown}")
    if document.left_behind:
        return LeftBehindError.exit_code
    return INCOMPLETE if document.unknown else 0


async def _document(
    address: MonitorAddress, base: str | None, runs: list[str], seconds: float, *, journal: Path | None, dry_run: bool
) -> RecoverDocument:
    from qmpnbd.deadline import Deadline
    from qmpnbd.qmp.monitor import Monitor
    from qmpnbd.qmp.recover import recover
    from qmpnbd.report.model import RecoverDocument
    from qmpnbd.report.runs import taken_down

    deadline = Deadline(seconds)
    async with await Monitor.connect(address, deadline) as monitor:
        found = await recover(monitor, base, deadline, also=runs, dry_run=dry_run)
        # Only now: the agent of a guest that we had paused answers no sooner.
        thawed, frozen = await _thawed(journal, dry_run) if journal is not None else ([], [])
        return RecoverDocument(
            monitor=monitor.where,
            dry_run=dry_run,
            taken_down=taken_down(found.removed),
            thawed=tuple(thawed),
            left_behind=(*found.left, *(f"may still be frozen: the guest of the agent {each}" for each in frozen)),
            unknown=tuple(found.unknown),
            alive=tuple(found.alive),
        )


async def _thawed(folder: Path, dry_run: bool) -> tuple[list[str], list[str]]:
    """Thaws the guests that killed runs of this user left frozen; returns their agents, and those of the others."""
    from qmpnbd.qmp.agent_journal import AgentJournal
    from qmpnbd.qmp.quiesce import frozen_leftovers, thaw_leftovers

    journal = AgentJournal(folder)
    if dry_run:
        return frozen_leftovers(journal), []
    return await thaw_leftovers(journal, output.tell), frozen_leftovers(journal)
