"""The arguments of ``qmpnbd validate`` that say what is validated, and what is compared."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qmpnbd.cli import options
from qmpnbd.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qmpnbd.qmp.planning import Wishes
    from qmpnbd.validate.choice import Choice
    from qmpnbd.validate.target import Target

_COMPARE = "depth,base,bitmaps"


def add_targets(parser: argparse.ArgumentParser) -> None:
    """Adds what says what is validated; `targets_of` reads it."""
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="with --qmp, a disk: qdev id, QOM path or node-name (default: all disks of the guest); without, an image "
        "file or a folder of images, which a storage daemon is started to serve",
    )
    options.add_monitor(parser, required=False, many=True)
    parser.add_argument(
        "--nbd",
        metavar="URI",
        help="with --qmp, share the NBD server that this QEMU runs already and that listens at URI; it is never "
        "stopped. With --image, the export to validate",
    )
    parser.add_argument("--image", metavar="FILE", help="the image that the export at --nbd should be an export of")
    parser.add_argument("--format", metavar="FORMAT", help="format of --image (default: probed from its first bytes)")
    parser.add_argument("--plan", metavar="FILE", help="validate what a TOML file lists (docs/validation.md)")


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """Adds what says what is compared; `choice_of` reads it."""
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--compare",
        metavar="LIST",
        help=f"maps, with commas: depth, base, bitmaps (default: {_COMPARE}); empty for none",
    )
    group.add_argument(
        "--content",
        choices=("none", "sample", "whole"),
        help="bytes over NBD against bytes from the files (default: sample)",
    )
    group.add_argument("--seed", type=_number, metavar="N", help="chooses the sample (default: 0)")


def add_instant(parser: argparse.ArgumentParser) -> None:
    """Adds the point in time at which running guests are validated; `instant_of` reads it."""
    group = parser.add_argument_group(
        "point in time", "running guests, all disks of each as they are at one instant; the guest goes on"
    )
    options.add_instant(group, "validate")
    group.add_argument(
        "--bitmap-change",
        type=options.seconds,
        metavar="SECONDS",
        help="take another point in time so long before, and prove that every bitmap that recorded since knows of "
        "all that changed; reads every disk that has one, twice",
    )


def instant_of(arguments: argparse.Namespace) -> Wishes | None:
    """Returns how the point in time is taken; None to validate disks as they go on.

    Raises:
        UsageError: something that goes with it is there without, or there is no running guest to validate.
    """
    wishes = options.instant(arguments, "bitmap_change")
    if wishes is not None and not arguments.qmp and arguments.plan is None:
        remedy = "Images and exports stand still: leave it out."
        raise UsageError("only running guests have one", where="--point-in-time", remedy=remedy)
    return wishes


def add_many(parser: argparse.ArgumentParser) -> None:
    """Adds what matters for many disks."""
    group = parser.add_argument_group("many disks")
    group.add_argument(
        "--jobs", type=_positive, metavar="N", help="guests and images at a time (default: one a processor)"
    )
    group.add_argument("--fail-fast", action="store_true", help="end with the first discrepancy or error")
    group.add_argument(
        "--since",
        metavar="REPORT",
        help="take over from a former --json report what agreed, of images whose files are unchanged since; also to "
        "go on after Ctrl-C",
    )
    group.add_argument(
        "--storage-daemon",
        default="qemu-storage-daemon",
        metavar="PROGRAM",
        help="what serves images (default: qemu-storage-daemon)",
    )


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if _number(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return int(text)


def is_one_guest(arguments: argparse.Namespace) -> bool:
    """Returns whether disks of a single running QEMU are asked for, and nothing else."""
    return len(arguments.qmp) == 1 and arguments.plan is None and arguments.image is None


def wanted(arguments: argparse.Namespace) -> tuple[list[Target], Choice]:
    """Returns what to validate, and what to compare; the command line outweighs the plan.

    Raises:
        UsageError: the arguments or the plan make no sense.
        ImageUnreadableError: a folder cannot be read.
    """
    if arguments.plan is None:
        return _named(arguments), choice_of(arguments)
    if arguments.names or arguments.qmp or arguments.image or arguments.nbd:
        remedy = "Put the others into the plan."
        raise UsageError("the plan lists all that is validated", where="--plan", remedy=remedy)
    from qmpnbd.validate.plan import load_plan

    plan = load_plan(arguments.plan)
    return list(plan.targets), choice_of(arguments, plan.compare, plan.content, plan.seed)


def choice_of(
    arguments: argparse.Namespace,
    compare: Sequence[str] | None = None,
    content: str | None = None,
    seed: int | None = None,
) -> Choice:
    """Returns what to compare; what the command line does not say is taken from the other arguments.

    Raises:
        UsageError: an unknown name, or nothing at all is to be compared.
    """
    from qmpnbd.validate.choice import MODES, Choice

    if arguments.compare is not None:
        compare = [word.strip() for word in arguments.compare.split(",") if word.strip()]
    mode = arguments.content or content or "sample"
    (known,) = (each for each in MODES if each == mode)
    number = arguments.seed if arguments.seed is not None else seed or 0
    return Choice.of(_COMPARE.split(",") if compare is None else compare, known, number)


def _named(arguments: argparse.Namespace) -> list[Target]:
    from qmpnbd.validate.folders import absolute
    from qmpnbd.validate.target import MonitorTarget, ServedTarget

    if arguments.image is not None:
        if arguments.nbd is None or arguments.qmp or arguments.names:
            remedy = "Give the export with --nbd URI; an image alone needs no option."
            raise UsageError("it goes with --nbd, and nothing else", where="--image", remedy=remedy)
        return [ServedTarget(arguments.nbd, absolute(arguments.image), arguments.format, arguments.image)]
    if arguments.nbd is not None and len(arguments.qmp) != 1:
        remedy = "Give one --qmp, or the image with --image; for several guests make a --plan."
        raise UsageError("whose server is it?", where="--nbd", remedy=remedy)
    if arguments.format is not None:
        raise UsageError("it goes with --image", where="--format", remedy="Put the image into a --plan.")
    if arguments.qmp:
        if arguments.names and len(arguments.qmp) > 1:
            remedy = "Leave out the disks, or make a --plan."
            raise UsageError("of which guest are the disks?", where="several --qmp", remedy=remedy)
        return [MonitorTarget(each, tuple(arguments.names), arguments.nbd) for each in dict.fromkeys(arguments.qmp)]
    if not arguments.names:
        remedy = "Give --qmp ADDRESS for a running guest, image files, a folder of images, or a --plan."
        raise UsageError("nothing to validate was named", where="qmpnbd validate", remedy=remedy)
    return list(dict.fromkeys(each for name in arguments.names for each in _images(name)))


def _images(name: str) -> Iterator[Target]:
    from pathlib import Path

    from qmpnbd.validate.folders import absolute, images_in
    from qmpnbd.validate.target import ImageTarget

    if not Path(name).is_dir():
        yield ImageTarget(absolute(name), None, name)
        return
    found = list(images_in(name))
    if not found:
        remedy = "Raw images are known by the endings .raw and .img; name others one by one."
        raise UsageError("no images are in this folder", where=name, remedy=remedy)
    yield from found
