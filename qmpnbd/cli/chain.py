"""``qmpnbd chain``: what an image and its backing chain hold, without QEMU."""

from __future__ import annotations

import argparse

from qmpnbd.cli import options, output


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chain",
        help="show which layer of a backing chain holds each byte, from the files",
        description="Computes what an NBD export of IMAGE would serve as qemu:allocation-depth. An image in use by a "
        "running QEMU is shown as its files are now; `qmpnbd validate` is for those.",
        allow_abbrev=False,
    )
    parser.add_argument("image", metavar="IMAGE", help="the active layer")
    parser.add_argument(
        "--format", choices=("qcow2", "raw"), help="IMAGE's format (default: probed from its first bytes)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--nbdinfo", action="store_true", help="print the very JSON of nbdinfo --map=qemu:allocation-depth --json"
    )
    form.add_argument("--json", action="store_true", help="print one JSON document (schema qmpnbd.chain/1)")
    options.add_timeout(parser, options.LONG_SECONDS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.deadline import Deadline
    from qmpnbd.images.files import open_chain
    from qmpnbd.report import jsontext, maptext, nbdinfo, text
    from qmpnbd.report.contexts import ALLOCATION_DEPTH
    from qmpnbd.report.layers import layer_entries
    from qmpnbd.report.model import ChainDocument

    with open_chain(arguments.image, format=arguments.format, deadline=Deadline(arguments.timeout)) as chain:
        layers, depth = layer_entries(chain.layers), chain.allocation_depth()
    if arguments.nbdinfo:
        output.write(nbdinfo.map_json(ALLOCATION_DEPTH, depth))
    elif arguments.json:
        head = ChainDocument(image=arguments.image, size=depth.size, layers=layers, extents=())
        output.write(jsontext.chain_json(head, depth))
    else:
        output.write(f"{line}\n" for line in text.layer_table(layers, depth.totals()))
        output.write(["\n"])
        output.write(maptext.maps_text({ALLOCATION_DEPTH: depth}))
    return 0
