"""``qmpnbd map``: what an NBD server says of an export."""

from __future__ import annotations

import argparse

from qmpnbd.cli import options, output

_SECONDS = 600.0
_DEPTH = "qemu:allocation-depth"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser("map", help="show what an NBD server says of an export", allow_abbrev=False)
    parser.add_argument("uri", metavar="URI", help="nbd[s]://HOST[:PORT]/EXPORT or nbd[s]+unix:///EXPORT?socket=PATH")
    parser.add_argument(
        "--context",
        action="append",
        metavar="NAME",
        help=f"metadata context, several with several --context (default: {_DEPTH})",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--nbdinfo", action="store_true", help="print the very JSON of nbdinfo --map=NAME --json")
    form.add_argument("--json", action="store_true", help="print one JSON document (schema qmpnbd.map/1)")
    options.add_timeout(parser, _SECONDS)
    options.add_tls(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.deadline import Deadline
    from qmpnbd.errors import UsageError
    from qmpnbd.nbd.client import Client

    contexts = list(dict.fromkeys(arguments.context or [_DEPTH]))
    if arguments.nbdinfo and len(contexts) > 1:
        raise UsageError("several contexts", where="--nbdinfo", remedy="nbdinfo's form has room for one.")
    deadline = Deadline(arguments.timeout)
    with Client.connect(arguments.uri, contexts=contexts, deadline=deadline, tls=options.tls(arguments)) as client:
        maps = client.maps(deadline=deadline)
        size = client.export.size
    # Each form brings its own renderer in: pydantic alone takes longer than reading most maps.
    if arguments.nbdinfo:
        from qmpnbd.report import nbdinfo

        output.write(nbdinfo.map_json(contexts[0], maps[contexts[0]]))
    elif arguments.json:
        from qmpnbd.report import jsontext
        from qmpnbd.report.model import MapDocument

        head = MapDocument(uri=arguments.uri, size=size, maps=())
        output.write(jsontext.map_json(head, {context: maps[context] for context in contexts}))
    else:
        from qmpnbd.report import maptext

        for context in contexts:
            output.write(maptext.extents_text(context, maps[context]))
    return 0
