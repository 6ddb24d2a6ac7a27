"""``qmpnbd chain``: what an image and its backing chain hold, without QEMU."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from qmpnbd.cli import options, output, terminal
from qmpnbd.cli.exit_codes import UNREADABLE
from qmpnbd.errors import UsageError
from qmpnbd.report.contexts import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP

if TYPE_CHECKING:
    from qmpnbd.extents import ExtentMap
    from qmpnbd.images.layers import Chain
    from qmpnbd.images.status import Unreadable

_DEPTH = ALLOCATION_DEPTH
_BASE = BASE_ALLOCATION
_BITMAP = DIRTY_BITMAP


EXAMPLES = (
    ("qmpnbd chain disk.qcow2", "which file holds which byte"),
    ("qmpnbd chain disk.qcow2 --bitmaps", "the persistent bitmaps of every layer"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chain",
        description="Computes what an NBD export of IMAGE would serve as qemu:allocation-depth, or in another metadata "
        "context. An image in use by a running QEMU is shown as its files are now; `qmpnbd validate` is for those. "
        "Ranges that QEMU could not read are shown as unreadable, and the exit code is 47; --nbdinfo and --qemu-img "
        "cannot say that, and print nothing then.",
        allow_abbrev=False,
    )
    parser.add_argument("image", metavar="IMAGE", help="the active layer")
    parser.add_argument("--format", metavar="FORMAT", help="IMAGE's format (default: probed from its first bytes)")
    parser.add_argument("--snapshot", metavar="NAME", help="read an internal snapshot of IMAGE instead of its disk")
    parser.add_argument(
        "--context",
        default=_DEPTH,
        metavar="NAME",
        help=f"what to compute: {_DEPTH} (default), {_BASE}, or {_BITMAP}BITMAP of IMAGE",
    )
    parser.add_argument(
        "--qemu",
        choices=("5.2", "7.2", "10.0"),
        default="7.2",
        help=f"whose {_BASE} and whose --qemu-img form; they differ (default: 7.2)",
    )
    _add_forms(parser)
    options.add_timeout(parser, options.LONG_SECONDS)
    parser.set_defaults(run=run)


def _add_forms(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--nbdinfo", action="store_true", help="print the very bytes of nbdinfo --map=CONTEXT --json")
    form.add_argument("--nbdinfo-text", action="store_true", help="print the very bytes of nbdinfo --map=CONTEXT")
    form.add_argument("--qemu-img", action="store_true", help="print the very JSON of qemu-img map --output=json")
    form.add_argument(
        "--info", action="store_true", help="print the JSON of qemu-img info --backing-chain --output=json"
    )
    form.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document (schema qmpnbd.chain/1, or qmpnbd.bitmaps/1 with --bitmaps)",
    )
    parser.add_argument("--bitmaps", action="store_true", help="list the persistent bitmaps of every layer instead")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.deadline import Deadline
    from qmpnbd.images.files import open_chain

    _refuse_nonsense(arguments)
    deadline = Deadline(arguments.timeout)
    with open_chain(arguments.image, format=arguments.format, deadline=deadline, snapshot=arguments.snapshot) as chain:
        if arguments.bitmaps:
            return _bitmaps(arguments, chain)
        if arguments.info:
            return _info(chain)
        if arguments.qemu_img:
            return _qemu_img(arguments, chain)
        return _map(arguments, chain)


def _refuse_nonsense(arguments: argparse.Namespace) -> None:
    if arguments.bitmaps and (arguments.nbdinfo or arguments.nbdinfo_text or arguments.qemu_img or arguments.info):
        raise UsageError("it can be text or --json only", where="--bitmaps")
    if arguments.context not in (_DEPTH, _BASE) and not arguments.context.startswith(_BITMAP):
        remedy = f"Known are {_DEPTH}, {_BASE} and {_BITMAP}NAME."
        raise UsageError(f"{arguments.context!r} cannot be computed", where="--context", remedy=remedy)


def _bitmaps(arguments: argparse.Namespace, chain: Chain) -> int:
    from qmpnbd.report.bitmaps import bitmaps_document, bitmaps_text
    from qmpnbd.report.jsontext import document_json

    document = bitmaps_document(arguments.image, chain)
    output.write([document_json(document) if arguments.json else bitmaps_text(document, terminal.width(sys.stdout))])
    return 0


def _info(chain: Chain) -> int:
    import json

    from qmpnbd.report import qemuimg

    output.write([json.dumps(qemuimg.info(chain), indent=4) + "\n"])
    return 0


def _qemu_img(arguments: argparse.Namespace, chain: Chain) -> int:
    from qmpnbd.report import qemuimg

    # Nothing may be printed if something cannot be read, so all of it is known before the first byte.
    batches = list(chain.map_entries(arguments.qemu))
    output.write(qemuimg.map_json(batches, arguments.qemu))
    return 0


def _map(arguments: argparse.Namespace, chain: Chain) -> int:
    # Each form brings its own renderer in: pydantic alone takes longer than reading most chains.
    if arguments.nbdinfo or arguments.nbdinfo_text:
        from qmpnbd.report import nbdinfo

        extents, _ = _computed(arguments, chain, whole=True)
        write = nbdinfo.map_json if arguments.nbdinfo else nbdinfo.map_text
        output.write(write(arguments.context, extents))
        return 0
    from qmpnbd.report import jsontext, maptext, text
    from qmpnbd.report.columns import folded
    from qmpnbd.report.layers import layer_entries, unreadable_entries
    from qmpnbd.report.model import ChainDocument

    extents, bad = _computed(arguments, chain, whole=False)
    layers, unreadable = layer_entries(chain.layers), unreadable_entries(bad)
    if arguments.json:
        head: dict[str, Any] = {"image": arguments.image, "size": extents.size, "context": arguments.context}
        document = ChainDocument(layers=layers, unreadable=unreadable, extents=(), **head)
        output.write(jsontext.chain_json(document, extents))
    else:
        totals, width = extents.totals() if arguments.context == _DEPTH else None, terminal.width(sys.stdout)
        output.write(f"{line}\n" for line in text.layer_table(layers, totals, width))
        output.write(["\n"])
        output.write(maptext.maps_text({arguments.context: extents}, width=width))
        output.write(f"{piece}\n" for line in text.unreadable_lines(unreadable) for piece in folded(line, width))
    return UNREADABLE if bad else 0


def _computed(arguments: argparse.Namespace, chain: Chain, *, whole: bool) -> tuple[ExtentMap, list[Unreadable]]:
    """Computes the map that was asked for, in which ranges may be unreadable unless it must be whole."""
    if arguments.context == _BASE:
        generation = arguments.qemu
        return (chain.base_allocation(generation), []) if whole else chain.base_allocation_with_errors(generation)
    if arguments.context.startswith(_BITMAP):
        return chain.bitmap(0, arguments.context.removeprefix(_BITMAP)), []
    return (chain.allocation_depth(), []) if whole else chain.depth_with_errors()
