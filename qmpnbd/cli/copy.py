"""``qmpnbd copy``: a disk from an image or an NBD export to a file, a block device or an NBD export."""

from __future__ import annotations

import argparse
import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.cli.progressline import Line
from qmpnbd.errors import UsageError

if TYPE_CHECKING:
    from qmpnbd.backup.copy import Progress

EXAMPLES = (
    ("qmpnbd copy nbd+unix:///disk?socket=/run/vm.nbd disk.qcow2", "an export to an image"),
    ("qmpnbd copy disk.qcow2 /dev/vg/disk --force --verify", "an image over a block device, read back and compared"),
    ("qmpnbd copy disk.raw packed.qcow2 --format raw --compress", "a smaller image"),
    ("qmpnbd copy disk.qcow2 /mnt/nas/disk.raw --resume", "go on with a copy that was ended, or begin one"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "copy",
        description="Copies what a guest sees of a disk, with its backing chain flattened: data as data, zeroes as "
        "zeroes. A file has its name only when it is whole and on the disk. What is there is never overwritten without "
        "--force, and what is in use not even then; an image that a QEMU writes to is not read.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="an image, or an NBD URI")
    parser.add_argument("target", metavar="TARGET", help="a file, a block device, or an NBD URI")
    parser.add_argument(
        "--format", metavar="FORMAT", help="SOURCE's format, if it is an image (default: probed from its first bytes)"
    )
    parser.add_argument(
        "--target-format",
        choices=("raw", "qcow2"),
        default="",
        help="what a file shall be (default: by its ending .raw, .img, .qcow2)",
    )
    parser.add_argument("--compress", action="store_true", help="compress the clusters of a qcow2 image (zstd)")
    parser.add_argument(
        "--cluster-size", type=options.whole, default=1 << 16, metavar="BYTES", help="of qcow2 (default: 65536)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite TARGET; not if it is in use")
    parser.add_argument(
        "--verify", action="store_true", help="read back what was written, and compare hashes, before it has its name"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what was copied if the copy is ended or killed, and go on there; what does not have its hash any "
        "more is copied again (to raw files)",
    )
    parser.add_argument(
        "--source-unchanged",
        action="store_true",
        help="with --resume: SOURCE, an export or a device, which cannot tell it, holds what it held when the copy was "
        "begun",
    )
    parser.add_argument(
        "--rate", type=options.positive, metavar="BYTES", help="bytes of data a second, at most (default: no limit)"
    )
    parser.add_argument(
        "--connections",
        type=options.positive,
        metavar="NUMBER",
        help="to each NBD server that keeps several coherent, at most (default: 1 to read, 4 to write)",
    )
    parser.add_argument("--progress", action="store_true", help="show on stderr how far it is")
    options.add_tls(parser)
    options.add_json(parser, "qmpnbd.copy/1")
    options.add_timeout(parser, options.WEEK_SECONDS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Before numpy is loaded, whose threads would spin for a while and then do nothing.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from qmpnbd.backup.destination import TargetTerms, destination
    from qmpnbd.backup.nbd_target import CONNECTIONS
    from qmpnbd.backup.whole_copy import Origin, WholeCopyOptions, copy_disk
    from qmpnbd.cli.stopping import stopped_by_signals
    from qmpnbd.deadline import Deadline

    if arguments.source_unchanged and not arguments.resume:
        raise UsageError("only with --resume", where="--source-unchanged", remedy="Leave it out, or give both.")
    tls, deadline = options.tls(arguments), Deadline(arguments.timeout)
    to = destination(arguments.target, arguments.target_format)
    terms = TargetTerms(
        force=arguments.force,
        compression="zstd" if arguments.compress else "",
        cluster_size=arguments.cluster_size,
        connections=arguments.connections or CONNECTIONS,
        tls=tls,
    )
    with contextlib.nullcontext() if not arguments.progress else Line() as line:
        choice = WholeCopyOptions(
            terms,
            prove=arguments.verify,
            bytes_per_second=arguments.rate,
            progress=None if line is None else lambda progress: line.show(partial(progress_text, progress)),
            resume=arguments.resume,
        )
        connections, unchanged = arguments.connections or 1, arguments.source_unchanged
        origin = Origin(arguments.source, arguments.format, connections, tls, unchanged)
        with stopped_by_signals(deadline):
            done = copy_disk(origin, to, choice, deadline)
    if arguments.json:
        from qmpnbd.report.copy import copy_document
        from qmpnbd.report.jsontext import document_json

        output.write([document_json(copy_document(arguments.source, arguments.target, to.form, done))])
    else:
        from qmpnbd.report.copytext import copy_text

        output.write([copy_text(arguments.source, arguments.target, to.form, done)])
    return 0


def progress_text(progress: Progress) -> str:
    """Puts into words how far a copy is."""
    from qmpnbd.report.sizes import human_size

    done, total = progress.data_bytes, progress.of_bytes
    return f"{human_size(done)} of {human_size(total)} ({percent(progress)}), {speed_text(progress)}"


def percent(progress: Progress) -> str:
    """Returns how much of the data is copied."""
    return f"{100 * progress.data_bytes / max(progress.of_bytes, 1):.0f} %"


def speed_text(progress: Progress) -> str:
    """Returns how much data is copied in a second."""
    from qmpnbd.report.sizes import human_size

    return f"{human_size(int(progress.data_bytes / max(progress.seconds, 1e-9)))}/s"
