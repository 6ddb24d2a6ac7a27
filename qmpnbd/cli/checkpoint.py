"""``qmpnbd checkpoint``: the bitmaps that say what was written since the last backup."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from qmpnbd.report.model import CheckpointsDocument

SCHEMA = "qmpnbd.checkpoints/1"

_CHANGES = {
    "create": "begin a new checkpoint on all disks at one instant",
    "commit": "the backup at a checkpoint is safe: remove the older ones",
    "abort": "the backup at the newest checkpoint failed: merge what it recorded back into the one before",
    "merge": "take a checkpoint out of the chain; what it recorded goes to the one before",
    "remove": "give up a checkpoint and the older ones, or all",
}


EXAMPLES = (
    ("qmpnbd checkpoint list --qmp /run/vm.qmp", "what is recorded, and what is wrong with it"),
    ("qmpnbd checkpoint create --qmp /run/vm.qmp --chain nightly", "begin the next increment on all disks"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "checkpoint",
        description="A checkpoint is a point in time since which a dirty bitmap on each disk records what is written. "
        "Several chains can run beside each other. Each change is one transaction: all disks or none.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")
    listing = verbs.add_parser("list", help="show the checkpoints, and what is wrong with them", allow_abbrev=False)
    _add_common(listing, chain_required=False)
    listing.set_defaults(run=_list)
    for verb, meaning in _CHANGES.items():
        change = verbs.add_parser(verb, help=meaning, description=meaning.capitalize() + ".", allow_abbrev=False)
        _add_common(change, chain_required=True)
        change.add_argument("--dry-run", action="store_true", help="print the QMP commands, send none")
        if verb == "create":
            options.add_granularity(change, "that of the disk's last checkpoint, else QEMU's choice, mostly 64 KiB")
            change.add_argument("--keep", action="store_true", help="keep older checkpoints that are undecided")
        else:
            change.add_argument(
                "--number",
                type=options.whole,
                required=verb == "merge",
                metavar="N",
                help="the checkpoint" + {"merge": "", "remove": " (default: all)"}.get(verb, " (default: the newest)"),
            )
        change.set_defaults(run=_change, operation=verb)


def _add_common(parser: argparse.ArgumentParser, *, chain_required: bool) -> None:
    options.add_monitor(parser)
    parser.add_argument(
        "--chain",
        required=chain_required,
        metavar="ID",
        help="the chain of backups" + ("" if chain_required else " (default: all chains)"),
    )
    parser.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="DISK",
        help="qdev id, QOM path or node-name; may be given several times (default: all disks of the guest)",
    )
    options.add_json(parser, SCHEMA)
    options.add_timeout(parser, options.SHORT_SECONDS)


def _list(arguments: argparse.Namespace) -> int:
    return _show(_listed(arguments.qmp, arguments.chain, arguments.disk, arguments.timeout), as_json=arguments.json)


async def _listed(address: str, chain: str | None, disks: list[str], seconds: float) -> CheckpointsDocument:
    from qmpnbd.qmp.checkpoints import listed
    from qmpnbd.report.checkpoints import listed_document

    return listed_document(await listed(address, chain=chain, disks=disks, seconds=seconds), chain or "")


def _change(arguments: argparse.Namespace) -> int:
    return _show(_changed(arguments), as_json=arguments.json)


async def _changed(arguments: argparse.Namespace) -> CheckpointsDocument:
    from qmpnbd.qmp.checkpoints import Change, changed
    from qmpnbd.report.checkpoints import changed_document

    creating = arguments.operation == "create"
    change = Change(
        arguments.operation,
        arguments.chain,
        arguments.disk,
        number=None if creating else arguments.number,
        granularity=arguments.granularity if creating else None,
        keep=creating and arguments.keep,
    )
    done = await changed(arguments.qmp, change, dry_run=arguments.dry_run, seconds=arguments.timeout)
    return changed_document(done)


def _show(work: Coroutine[Any, Any, CheckpointsDocument], *, as_json: bool) -> int:
    from qmpnbd.cli import signals
    from qmpnbd.report.checkpoints import checkpoints_text
    from qmpnbd.report.jsontext import document_json

    document = signals.run(work)
    output.write([document_json(document) if as_json else checkpoints_text(document)])
    return 0
