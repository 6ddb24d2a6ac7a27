"""``qmpnbd info``: a server, its exports, and what they can do."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.cli.exit_codes import AGREED, DISCREPANCY

if TYPE_CHECKING:
    from qmpnbd.nbd.export import Replies
    from qmpnbd.report.model import ExportEntry, InfoDocument

_NBDINFO_NO = 2
"""The exit code of ``nbdinfo --can`` for no; with ``--nbdinfo`` it is ours as well."""

CAN: dict[str, Callable[[InfoDocument, ExportEntry], bool]] = {
    "connect": lambda _document, _export: True,
    "read": lambda _document, _export: True,
    "write": lambda _, export: not export.is_read_only,
    "read-only": lambda _, export: export.is_read_only,
    "rotational": lambda _, export: export.is_rotational,
    "cache": lambda _, export: export.can_cache,
    "df": lambda _, export: export.can_df,
    "fast-zero": lambda _, export: export.can_fast_zero,
    "flush": lambda _, export: export.can_flush,
    "fua": lambda _, export: export.can_fua,
    "multi-conn": lambda _, export: export.can_multi_conn,
    "trim": lambda _, export: export.can_trim,
    "zero": lambda _, export: export.can_zero,
    "block-status-payload": lambda _, export: export.can_block_status_payload,
    "tls": lambda document, _: document.tls,
    "structured-reply": lambda document, _: document.replies != "simple",
    "extended-headers": lambda document, _: document.replies == "extended",
}
"""What can be asked with ``--can``; upper case, underscores, spaces and missing dashes are forgiven."""

_SHORT = {"structured": "structuredreply", "structuredreplies": "structuredreply"}
"""Other words of nbdinfo for some of it."""


def _ability(text: str) -> str:
    wanted = re.sub("[-_ ]", "", text.lower())
    wanted = _SHORT.get(wanted, wanted)
    found = [name for name in CAN if name.replace("-", "") == wanted]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is none of: {', '.join(CAN)}")
    return found[0]


EXAMPLES = (
    ("qmpnbd info nbd+unix:///?socket=/run/vm.nbd --list", "all exports of a server"),
    ("qmpnbd info nbd://host/disk --can multi-conn", "an answer as an exit code"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser("info", allow_abbrev=False)
    options.add_uri(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="all exports of the server, not only the URI's")
    what.add_argument("--size", action="store_true", help="only the size in bytes")
    what.add_argument(
        "--can",
        "--is",
        "--has",
        dest="can",
        type=_ability,
        metavar="WHAT",
        help=f"exit with 0 for yes and 1 for no (2 with --nbdinfo): {', '.join(CAN)}",
    )
    options.add_nbdinfo(parser, "nbdinfo --no-content", "qmpnbd.info/1")
    options.add_timeout(parser, options.SHORT_SECONDS)
    options.add_tls(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.report import nbdinfo_server

    document = _document(arguments)
    if arguments.can is not None:
        no = _NBDINFO_NO if arguments.nbdinfo or arguments.nbdinfo_text else DISCREPANCY
        return AGREED if CAN[arguments.can](document, document.exports[0]) else no
    if arguments.size:
        output.write([f"{document.exports[0].size}\n"])
    elif arguments.json:
        from qmpnbd.report.jsontext import document_json  # numpy comes with it

        output.write([document_json(document)])
    elif arguments.nbdinfo:
        output.write([nbdinfo_server.info_json(document)])
    else:
        output.write([nbdinfo_server.info_text(document)])
    return 0


def _document(arguments: argparse.Namespace) -> InfoDocument:
    from qmpnbd.deadline import Deadline
    from qmpnbd.nbd.stepwise import Negotiation
    from qmpnbd.report.info import info_document

    deadline = Deadline(arguments.timeout)
    # nbdinfo 1.14 knows no extended headers, and says what was agreed.
    compatible = arguments.nbdinfo or arguments.nbdinfo_text
    best: Replies = "structured" if compatible else "extended"
    with Negotiation.connect(arguments.uri, tls=options.tls(arguments), deadline=deadline, best=best) as negotiation:
        return info_document(negotiation, all_exports=arguments.list, deadline=deadline, as_nbdinfo=compatible)
