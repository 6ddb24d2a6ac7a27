"""``qmpnbd verify``: proves that a repository holds what was backed up."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.cli.exit_codes import AGREED, DISCREPANCY, INCOMPLETE
from qmpnbd.errors import UsageError

if TYPE_CHECKING:
    from qmpnbd.backup.boottest import BootOptions

EXAMPLES = (
    ("qmpnbd verify /backup", "all backups; of each chain the newest one through QEMU, too"),
    ("qmpnbd verify /backup --chain vm --boot 'login:'", "and see whether a guest boots from the newest one"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "verify",
        description="Verifies the backups in REPO: manifests, order, tables of images, and every piece of data "
        "against its hash, of which none may be missing. Then QEMU reads backups as well, and every byte is compared. "
        "With --boot a guest is started from the newest backup, on a throw-away overlay and without a network.",
        allow_abbrev=False,
    )
    parser.add_argument("repository", metavar="REPO", help="the repository's folder")
    parser.add_argument("--chain", default="", metavar="NAME", help="only this chain (default: all)")
    parser.add_argument(
        "--backup",
        default="",
        metavar="WHICH",
        help="the one backup that QEMU reads and boots from: an id, a number, latest, or a time",
    )
    parser.add_argument(
        "--second-reader",
        choices=("none", "newest", "all"),
        default="newest",
        help="which backups of a chain QEMU reads, too (default: newest)",
    )
    parser.add_argument(
        "--template", default="", metavar="FILE", help="the image that shallow backups stand on, where it is now"
    )
    boot = parser.add_argument_group("boot test")
    boot.add_argument("--boot", metavar="TEXT", help="boot, and wait until the guest says TEXT on its serial line")
    boot.add_argument(
        "--boot-timeout",
        type=options.seconds,
        default=300.0,
        metavar="SECONDS",
        help="how long it may take (default: 300)",
    )
    boot.add_argument(
        "--boot-memory", type=options.at_least_two, default=512, metavar="MIB", help="the guest's memory (default: 512)"
    )
    boot.add_argument("--boot-qemu", metavar="PROGRAM", default="", help="QEMU (default: qemu-system-x86_64)")
    boot.add_argument(
        "--boot-device",
        default="virtio-blk-pci",
        metavar="DRIVER",
        help="the device that each disk becomes (default: virtio-blk-pci)",
    )
    boot.add_argument(
        "--boot-argument",
        action="append",
        default=[],
        metavar="ARGUMENT",
        help="a further argument of QEMU, such as --boot-argument=-kernel --boot-argument=vmlinuz; can be repeated",
    )
    parser.add_argument(
        "--runtime-dir",
        metavar="DIR",
        help="make the private directory with the NBD socket and the throw-away overlays in DIR (default: $TMPDIR or "
        "/tmp)",
    )
    options.add_json(parser, "qmpnbd.verify/1")
    options.add_timeout(parser, options.WEEK_SECONDS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.backup.verify import VerifyOptions, verify
    from qmpnbd.cli import signals
    from qmpnbd.deadline import Deadline
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.verify import verify_document, verify_text

    choice = VerifyOptions(
        chain=arguments.chain,
        backup=arguments.backup,
        second_reader=arguments.second_reader,
        boot=_boot(arguments),
        template=arguments.template,
        runtime_dir=arguments.runtime_dir,
    )
    done = signals.run(verify(arguments.repository, choice, Deadline(arguments.timeout)))
    document = verify_document(arguments.repository, done)
    output.write([document_json(document) if arguments.json else verify_text(document)])
    return {"proved": AGREED, "incomplete": INCOMPLETE, "damaged": DISCREPANCY}[document.verdict]


def _boot(arguments: argparse.Namespace) -> BootOptions | None:
    from qmpnbd.backup.boottest import SYSTEM, BootOptions

    if arguments.boot is None:
        if arguments.boot_argument or arguments.boot_qemu:
            raise UsageError(
                "only with --boot", where="--boot-argument", remedy="Say what the guest prints: --boot TEXT."
            )
        return None
    return BootOptions(
        marker=arguments.boot,
        seconds=arguments.boot_timeout,
        memory=arguments.boot_memory,
        program=arguments.boot_qemu or SYSTEM,
        arguments=tuple(arguments.boot_argument),
        device=arguments.boot_device,
        runtime_dir=arguments.runtime_dir,
    )
