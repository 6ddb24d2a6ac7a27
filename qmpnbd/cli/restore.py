"""``qmpnbd restore``: a disk as it was, to where it is wanted."""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.errors import UsageError

if TYPE_CHECKING:
    from qmpnbd.backup.point import Wanted
    from qmpnbd.backup.restore import RestoreOptions
    from qmpnbd.deadline import Deadline

EXAMPLES = (
    ("qmpnbd restore /backup latest --chain vm vda.qcow2", "the newest backup of a VM's only disk"),
    (
        "qmpnbd restore /backup 2026-11-24T12:00:00Z --chain vm --disk vd0 /dev/vg/vm --force",
        "what was there at noon, over a block device",
    ),
    (
        "qmpnbd restore /backup latest --chain vm machine --machine",
        "all disks, NVRAM and machine facts, in a new folder",
    ),
    (
        "qmpnbd restore /backup latest --chain vm vda.qcow2 --instant serve",
        "print an NBD URI to boot from at once, and fill vda.qcow2 meanwhile",
    ),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "restore",
        description="Restores a disk, or with --machine all that a backup holds, as it was at the instant of the "
        "backup. Every piece of data is hashed when it is read from the repository, and again when it is read back "
        "from TARGET; a file gets its name only then. What is there is never overwritten without --force, and what is "
        "in use not even then; no folder is ever replaced.",
        if_missing="The newest backup is called latest: qmpnbd restore REPO latest FILE for a disk, "
        "qmpnbd restore REPO latest FOLDER --machine for all disks",
        allow_abbrev=False,
    )
    # WHICH has no default: who forgets TARGET would get a file that is called as the backup.
    add_point(parser)
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a file, a folder for --format chain or --machine, a block device, or an NBD URI",
    )
    parser.add_argument(
        "--format",
        choices=("raw", "qcow2", "chain"),
        default="",
        help="what a disk shall be (default: by TARGET's ending .raw, .img, .qcow2; with --machine qcow2); chain: a "
        "folder with an image a layer",
    )
    parser.add_argument(
        "--machine",
        action="store_true",
        help="make a folder TARGET with all disks, firmware variables (NVRAM) and what is known of the machine",
    )
    parser.add_argument("--compress", action="store_true", help="compress the clusters of qcow2 images (zstd)")
    parser.add_argument("--force", action="store_true", help="overwrite TARGET; not if it is in use")
    parser.add_argument(
        "--rate", type=options.positive, metavar="BYTES", help="bytes of data a second, at most (default: no limit)"
    )
    parser.add_argument("--progress", action="store_true", help="show on stderr how far it is")
    instant = parser.add_argument_group("instant restore", "TARGET is a qcow2 file that stands on the repository")
    instant.add_argument(
        "--instant",
        choices=("overlay", "serve"),
        help="overlay: only make the file, for a QEMU that fills it with block-stream; serve: serve it over NBD, "
        "writable, fill it meanwhile, and go on serving until told to end",
    )
    instant.add_argument("--end-when-filled", action="store_true", help="end as soon as it stands on nothing any more")
    instant.add_argument(
        "--runtime-dir", metavar="DIR", help="make the private directory in DIR (default: $TMPDIR or /tmp)"
    )
    options.add_tls(parser)
    options.add_json(parser, "qmpnbd.restore/1, with --machine qmpnbd.restore-machine/1")
    options.add_timeout(parser, options.WEEK_SECONDS)
    parser.set_defaults(run=run)


def add_point(parser: argparse.ArgumentParser) -> None:
    """Adds which backup is meant; `wanted` reads it."""
    parser.add_argument("repository", metavar="REPO", help="the repository's folder")
    parser.add_argument(
        "which", metavar="WHICH", help="a backup's id or number, latest, or a time (the newest not after it)"
    )
    parser.add_argument("--chain", default="", metavar="NAME", help="the chain (default: the only one)")
    parser.add_argument("--disk", default="", metavar="DISK", help="the disk (default: the only one)")
    parser.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="[DISK=]FILE",
        help="the image that a shallow backup stands on, where it is now; can be repeated for several disks",
    )


def wanted(arguments: argparse.Namespace) -> Wanted:
    """Returns which backup is meant."""
    from qmpnbd.backup.point import Wanted
    from qmpnbd.backup.template import template_for

    template = template_for(arguments.disk, arguments.template, [arguments.disk])
    return Wanted(arguments.repository, arguments.which, arguments.chain, arguments.disk, template=template)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli import signals

    if arguments.instant is None:
        for option in ("end_when_filled", "runtime_dir"):
            if getattr(arguments, option):
                name = f"--{option.replace('_', '-')}"
                raise UsageError("only with --instant serve", where=name, remedy="Leave it out, or give both.")
        return signals.run(_restore(arguments))
    if arguments.machine:
        what = "one disk is served, and a machine may have several"
        raise UsageError(what, where="--instant", remedy="Leave --machine out, and name a --disk.")
    if arguments.format not in ("", "qcow2") or arguments.compress:
        what = "an instant restore makes a plain qcow2 file"
        raise UsageError(what, where="--instant", remedy="Leave --format and --compress out.")
    return signals.run(_instantly(arguments))


async def _restore(arguments: argparse.Namespace) -> int:
    from qmpnbd.backup.restore import RestoreOptions
    from qmpnbd.cli.copy import progress_text
    from qmpnbd.cli.progressline import Line
    from qmpnbd.deadline import Deadline

    deadline = Deadline(arguments.timeout)
    with contextlib.nullcontext() if not arguments.progress else Line() as line:
        choice = RestoreOptions(
            force=arguments.force,
            compression="zstd" if arguments.compress else "",
            bytes_per_second=arguments.rate,
            progress=None if line is None else lambda progress: line.show(partial(progress_text, progress)),
            tls=options.tls(arguments),
        )
        return await (_machine if arguments.machine else _disk)(arguments, choice, deadline)


async def _disk(arguments: argparse.Namespace, choice: RestoreOptions, deadline: Deadline) -> int:
    from qmpnbd.backup.destination import destination
    from qmpnbd.backup.restore import restore
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.restore import restore_document, restore_text
    from qmpnbd.validate.live import in_thread

    to = destination(arguments.target, arguments.format)
    done = await in_thread(partial(restore, wanted(arguments), to, choice, deadline), deadline)
    document = restore_document(arguments.repository, done)
    output.write([document_json(document) if arguments.json else restore_text(document)])
    return 0


async def _machine(arguments: argparse.Namespace, choice: RestoreOptions, deadline: Deadline) -> int:
    from qmpnbd.backup.destination import Destination
    from qmpnbd.backup.restore_machine import WantedMachine, restore_machine
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.restore import machine_document, machine_text
    from qmpnbd.validate.live import in_thread

    if arguments.disk:
        raise UsageError("all disks are restored", where="--disk", remedy="Leave it out, or --machine.")
    which = WantedMachine(arguments.repository, arguments.which, arguments.chain, tuple(arguments.template))
    to = Destination(arguments.target, arguments.format if arguments.format else "qcow2")
    work = partial(restore_machine, which, to, choice, deadline)
    document = machine_document(arguments.repository, await in_thread(work, deadline))
    output.write([document_json(document) if arguments.json else machine_text(document)])
    return 0


async def _instantly(arguments: argparse.Namespace) -> int:
    from qmpnbd.backup.instantly import InstantOptions, instant_restore
    from qmpnbd.deadline import Deadline
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.restore import instant_document, restore_text

    choice = InstantOptions(
        serve=arguments.instant == "serve", force=arguments.force, runtime_dir=arguments.runtime_dir
    )
    async with instant_restore(wanted(arguments), arguments.target, choice, Deadline(arguments.timeout)) as begun:
        document = instant_document(arguments.repository, begun.point, arguments.target, begun.uri)
        output.write([document_json(document) if arguments.json else restore_text(document)])
        if not choice.serve:
            return 0
        fault = await begun.filled(arguments.rate)
        if fault is not None:
            output.complain(fault)
            output.tell("the guest has started from a damaged backup; what it wrote is in the target")
        else:
            output.tell(f"{arguments.target}: filled and proved; it stands on nothing any more")
        if not arguments.end_when_filled:
            await begun.until_lost()
    return 0 if fault is None else fault.exit_code
