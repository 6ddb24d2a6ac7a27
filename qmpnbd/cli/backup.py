"""``qmpnbd backup``: disks of a running guest at one instant, into a repository."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.cli.exit_codes import FELL_BACK, NOT_QUIESCED
from qmpnbd.errors import UsageError

if TYPE_CHECKING:
    from qmpnbd.backup.run import BackupOptions
    from qmpnbd.backup.tally import DisksProgress
    from qmpnbd.cli.progressline import Line
    from qmpnbd.report.model import BackupDocument

SCHEMA = "qmpnbd.backup/1"

EXAMPLES = (
    (
        "qmpnbd backup /backups --qmp /run/vm.qmp --chain nightly",
        "all disks: in full at first, increments from then on",
    ),
    (
        "qmpnbd backup /backups --qmp /run/vm.qmp --chain nightly --disk vd0 --type differential --since 2026-11-01",
        "one disk, what was written since the newest backup before that day",
    ),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "backup",
        description="Backs up disks of a running guest as they are at one instant. Each disk is an increment if that "
        "can be relied on; if not, it is compared with its last backup, or copied in full, and the reason is told. A "
        "backup is there when its data has been read again and agrees; until then nothing in the guest's bitmaps is "
        "given up. After a failure the next run holds all that this one would have held.",
        allow_abbrev=False,
    )
    parser.add_argument("repository", metavar="REPOSITORY", help="made with 'qmpnbd repository create'")
    options.add_monitor(parser)
    _add_what(parser)
    _add_how(parser)
    options.add_sharing(parser)
    parser.add_argument("--progress", action="store_true", help="show on stderr how far the disks are")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be done for each disk; change nothing")
    options.add_json(parser, SCHEMA)
    options.add_timeout(parser, options.SHORT_SECONDS, "until the instant is taken; the copy has no limit")
    parser.set_defaults(run=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="DISK",
        help="qdev id, QOM path or node-name; can be repeated (default: all disks of the guest but those in removable "
        "drives)",
    )
    what.add_argument("--chain", required=True, metavar="ID", help="the chain of backups; each has its own bitmaps")
    what.add_argument(
        "--type",
        choices=("auto", "full", "increment", "differential"),
        default="auto",
        help="what each disk shall be; with increment and differential, falling back ends with exit code 4 "
        "(default: auto)",
    )
    what.add_argument(
        "--since",
        metavar="BACKUP",
        help="with --type differential: the backup to count from, by id, number or time (default: the newest)",
    )
    what.add_argument(
        "--shallow",
        action="store_true",
        help="where all of a disk would be copied, leave out its template: what lies below the active layer",
    )
    what.add_argument(
        "--no-compare",
        action="store_true",
        help="copy a disk in full where its bitmap cannot be relied on, instead of comparing it with its last backup",
    )
    options.add_granularity(what, "that of the bitmap before it, else QEMU's choice, mostly 64 KiB")


def _add_how(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how")
    how.add_argument("--compress", action="store_true", help="compress the data (zstd)")
    how.add_argument(
        "--proof",
        choices=("hashes", "sizes"),
        default="hashes",
        help="before the backup counts, read all its data again, or only the images' tables (default: hashes)",
    )
    how.add_argument(
        "--jobs",
        type=options.positive,
        default=2,
        metavar="N",
        help="disks that are copied at a time (default: 2); one takes up to 30 MiB of memory",
    )
    how.add_argument(
        "--rate",
        type=options.positive,
        metavar="BYTES",
        help="read at most so many bytes of data a second, of all disks together",
    )
    how.add_argument(
        "--agent",
        metavar="ADDRESS",
        help="the guest agent's socket: the guest's filesystems are frozen for the instant; exit code 5 if they could "
        "not be",
    )
    how.add_argument(
        "--protect-guest",
        action="store_true",
        help="scratch space that fails must not fail the guest, which is paused some milliseconds for that (QEMU 8.0)",
    )
    how.add_argument(
        "--scratch",
        metavar="DIR",
        help="where what the guest overwrites meanwhile is kept (default: a private directory)",
    )
    how.add_argument(
        "--scratch-size",
        type=options.whole,
        metavar="BYTES",
        help="for all disks together (default: most of what is free)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli import signals
    from qmpnbd.cli.progressline import Line
    from qmpnbd.report.backup import backup_text
    from qmpnbd.report.jsontext import document_json

    if arguments.since is not None and arguments.type != "differential":
        raise UsageError("only with --type differential", where="--since", remedy="Leave it out, or give both.")
    with contextlib.nullcontext() if not arguments.progress else Line() as line:
        document = signals.run(_document(arguments, line))
    output.write([document_json(document) if arguments.json else backup_text(document)])
    output.tell(*document.cleared, *document.damaged)
    return {"fell-back": FELL_BACK, "not-quiesced": NOT_QUIESCED}.get(document.verdict, 0)


async def _document(arguments: argparse.Namespace, line: Line | None) -> BackupDocument:
    from qmpnbd.backup.outlook import look
    from qmpnbd.backup.run import back_up
    from qmpnbd.report.backup import backup_document, outlook_document

    choice, where = _options(arguments, line), Path(arguments.repository)
    wish = choice.begin.wish
    if arguments.dry_run:
        found = await look(arguments.qmp, where, arguments.chain, arguments.disk, choice.begin)
        return outlook_document(found, arguments.repository, arguments.chain, wish)
    done = await back_up(arguments.qmp, where, arguments.chain, arguments.disk, choice)
    return backup_document(done, arguments.repository, wish, proof=choice.proof, quiesce=arguments.agent is not None)


def _options(arguments: argparse.Namespace, line: Line | None) -> BackupOptions:
    from qmpnbd.backup.begin import BeginOptions
    from qmpnbd.backup.plan import Wish
    from qmpnbd.backup.run import BackupOptions
    from qmpnbd.qmp.planning import Wishes

    wish = Wish(arguments.type, arguments.since, compare=not arguments.no_compare, shallow=arguments.shallow)
    begin = BeginOptions(
        wish=wish,
        granularity=arguments.granularity,
        instant=Wishes(
            protect_guest=arguments.protect_guest,
            depth=False,
            scratch_dir=arguments.scratch,
            scratch_bytes=arguments.scratch_size,
        ),
        nbd=arguments.nbd,
        runtime_dir=arguments.runtime_dir,
        allow=options.allowed(arguments),
        agent=arguments.agent,
        journal=options.agent_journal(),
        seconds=arguments.timeout,
    )
    return BackupOptions(
        begin=begin,
        proof=arguments.proof,
        compression="zstd" if arguments.compress else "",
        jobs=arguments.jobs,
        bytes_per_second=arguments.rate,
        progress=None if line is None else lambda far: line.show(lambda: disks_text(far)),
    )


def disks_text(far: DisksProgress) -> str:
    """Puts into words how far the disks are: the sum, and each that is being copied."""
    from qmpnbd.cli.copy import percent, progress_text, speed_text
    from qmpnbd.report.sizes import human_size

    begun = {name: each for name, each in far.disks.items() if each is not None}
    if len(begun) < len(far.disks):  # how much data the others have is not known
        whole = f"{human_size(far.whole.data_bytes)}, {speed_text(far.whole)}"
    else:
        whole = progress_text(far.whole)
    busy = [f"{name} {percent(each)}" for name, each in begun.items() if each.data_bytes < each.of_bytes]
    return "; ".join([whole, f"{len(begun) - len(busy)} of {len(far.disks)} disks copied", *busy])
