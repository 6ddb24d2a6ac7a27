"""``qmpnbd export``: disks for other tools, as NBD URIs that work until the command ends."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from qmpnbd.cli import options, output
from qmpnbd.errors import LeftBehindError, UsageError

if TYPE_CHECKING:
    from qmpnbd.export.session import Image, Options, Session
    from qmpnbd.qmp.address import MonitorAddress, TcpAddress
    from qmpnbd.qmp.checkpoint_at import NextCheckpoint
    from qmpnbd.qmp.planning import Wishes
    from qmpnbd.report.model import ExportDocument


EXAMPLES = (
    ("qmpnbd export --qmp /run/vm.qmp --disk vd0", "print the URI of a disk, and keep it until Ctrl-C"),
    (
        "qmpnbd export --qmp /run/vm.qmp --point-in-time",
        "all disks at one instant, while the guest goes on",
    ),
    ("qmpnbd export disk.qcow2 --format qcow2 --exec sh -c 'nbdcopy \"$QMPNBD_URI\" disk.raw'", "for one command only"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "export",
        description="Exports disks of a running QEMU (--qmp), or an image file that no QEMU has open, prints the NBD "
        "URIs, and keeps the exports until it is told to end: by a signal, by --timeout, or by the end of the command "
        "of --exec. Then everything is taken down. The disks of a running guest move on while they are read, and what "
        "is read is of no one instant unless --point-in-time is given; the output says so.",
        allow_abbrev=False,
    )
    options.add_monitor(parser, required=False)
    what = parser.add_argument_group("what", "a running QEMU (--qmp, --domain), or IMAGE")
    what.add_argument("image", nargs="?", metavar="IMAGE", help="an image file or block device, exported read-only")
    what.add_argument("--format", metavar="FORMAT", help="IMAGE's format (qcow2, raw, …); it is not guessed")
    what.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="DISK",
        help="qdev id, QOM path or node-name; can be repeated (default: all disks of the guest)",
    )
    what.add_argument(
        "--bitmap",
        action="append",
        default=[],
        metavar="NAME",
        help="offer a disabled dirty bitmap of each disk; can be repeated",
    )
    what.add_argument("--description", default="", metavar="TEXT", help="for clients that list exports")
    what.add_argument("--iothread", default="", metavar="ID", help="have this iothread of QEMU serve the exports")
    what.add_argument("--writable", action="store_true", help="let clients write")
    _add_server(parser)
    end = parser.add_argument_group("until when")
    end.add_argument(
        "--timeout",
        type=options.seconds,
        metavar="SECONDS",
        help="keep the exports for so long at most (default: without end); a command that runs then is ended",
    )
    end.add_argument(
        "--exec",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="run COMMAND with its arguments (all that follows) and end with it and its exit code; QMPNBD_URI and "
        "QMPNBD_URI_DISK hold the URIs, QMPNBD_EXPORTS the document of --json",
    )
    options.add_json(parser, "qmpnbd.export/1")
    options.add_tls(parser)
    parser.set_defaults(run=run)


def _add_server(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server", "a UNIX socket in a private directory, unless told otherwise")
    server.add_argument("--listen", metavar="HOST:PORT", help="a TCP port instead; port 0 for a free one")
    server.add_argument(
        "--tls",
        metavar="DIR",
        help="TLS: the folder, as QEMU sees it, with ca-cert.pem, server-cert.pem and server-key.pem; clients must "
        "have a certificate of the same authority",
    )
    server.add_argument("--tls-psk", metavar="DIR", help="TLS with shared secrets instead: the folder with keys.psk")
    server.add_argument(
        "--tls-authz",
        action="append",
        default=[],
        metavar="NAME",
        help="let in only clients whose certificate bears this distinguished name (* and ? as for files); repeatable",
    )
    server.add_argument("--insecure", action="store_true", help="a TCP port without TLS")
    server.add_argument(
        "--nbd", metavar="URI", help="share the NBD server that this QEMU runs already; it is never stopped"
    )
    server.add_argument(
        "--runtime-dir", metavar="DIR", help="make the private directory in DIR (default: $TMPDIR or /tmp)"
    )
    instant = parser.add_argument_group("point in time", "the disks as they are at one instant; the guest goes on")
    options.add_instant(instant, "export")
    instant.add_argument(
        "--agent",
        metavar="ADDRESS",
        help="the guest agent's socket: the guest's filesystems are frozen for the instant, if they can be",
    )
    instant.add_argument(
        "--allocation-depth",
        metavar="DIR",
        help="write the allocation depth that each disk's own chain had at the instant to DIR/DISK.json, before the "
        "URIs are told; with --tls, --tls-certificates lets us in to read it",
    )
    _add_checkpoint(parser)
    instant.add_argument("--dry-run", action="store_true", help="print its QMP commands, send none")
    options.add_allow(server, options.HAZARDS)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    checkpoint = parser.add_argument_group(
        "checkpoint",
        "begun at that instant: what was recorded until then is exported as dirty bitmaps, and is the increment. With "
        "--exec it is committed if the command ends with 0, and merged back if not; else it is left to `qmpnbd "
        "checkpoint commit` or `abort`",
    )
    checkpoint.add_argument("--checkpoint", metavar="CHAIN", help="begin the next checkpoint of this chain of backups")
    checkpoint.add_argument(
        "--since", type=options.whole, metavar="N", help="count increments from this checkpoint (default: the newest)"
    )
    checkpoint.add_argument("--keep", action="store_true", help="keep older checkpoints, undecided ones among them")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli import signals

    if arguments.dry_run:
        return signals.run(_dry_run(_what(arguments), arguments.disk, _options(arguments)))
    return signals.run(_run(arguments, _what(arguments), _options(arguments)))


def _what(arguments: argparse.Namespace) -> MonitorAddress | Image:
    from qmpnbd.export.session import Image

    if arguments.exec is not None and not arguments.exec:
        raise UsageError("no command", where="--exec", remedy="The command and its arguments follow it.")
    if (arguments.image is None) == (arguments.qmp is None):
        raise UsageError("what to export is not clear", where="export", remedy="Give either --qmp ADDRESS or IMAGE.")
    if arguments.qmp is not None:
        if arguments.format:
            raise UsageError("QEMU knows the formats of its disks", where="--format", remedy="Leave it out.")
        address: MonitorAddress = arguments.qmp
        return address
    for option in ("disk", "nbd", "writable", "iothread"):
        if getattr(arguments, option):
            raise UsageError("only with --qmp", where=f"--{option}", remedy="Leave it out.")
    if not arguments.format:
        raise UsageError(
            "the format of the image is not told",
            where=arguments.image,
            remedy="Give --format: guessing could take what a guest wrote into a raw image for a header.",
        )
    return Image(arguments.image, arguments.format)


def _options(arguments: argparse.Namespace) -> Options:
    from qmpnbd.export.options import SETUP_SECONDS, Options
    from qmpnbd.qmp.credentials import ServerTls
    from qmpnbd.qmp.exports import ExportOptions

    if arguments.nbd and (arguments.listen or arguments.tls or arguments.tls_psk):
        raise UsageError("a server that runs already is as it is", where="--nbd", remedy="Leave --listen and TLS out.")
    if arguments.tls and arguments.tls_psk:
        raise UsageError("either certificates or a shared secret", where="--tls", remedy="Give one of the two.")
    tls = None
    if arguments.tls or arguments.tls_psk:
        kind: Literal["x509", "psk"] = "x509" if arguments.tls else "psk"
        tls = ServerTls(arguments.tls or arguments.tls_psk, kind, tuple(arguments.tls_authz))
    elif arguments.tls_authz:
        raise UsageError("names of certificates, and no TLS", where="--tls-authz", remedy="Give --tls DIR.")
    instant, client_tls = _instant(arguments), options.tls(arguments)
    if client_tls is not None and arguments.allocation_depth is None:
        raise UsageError("nothing is read here", where="--tls-certificates", remedy="Leave the client's TLS out.")
    if tls is not None and client_tls is None and arguments.allocation_depth is not None:
        raise UsageError(
            "with TLS, nothing says how to be let in to read the allocation depth",
            where="--allocation-depth",
            remedy="Give --tls-certificates DIR with --tls; shared secrets are of no use here.",
        )
    return Options(
        listen=_listen(arguments.listen) if arguments.listen else None,
        tls=tls,
        insecure=arguments.insecure,
        nbd=arguments.nbd,
        runtime_dir=arguments.runtime_dir,
        allow=options.allowed(arguments),
        export=ExportOptions(
            bitmaps=tuple(arguments.bitmap),
            description=arguments.description,
            iothread=arguments.iothread,
            writable=arguments.writable,
            allocation_depth=instant is None or instant.exact_chain,
        ),
        instant=instant,
        seconds=SETUP_SECONDS if arguments.allocation_depth is None else options.LONG_SECONDS,
        checkpoint=_checkpoint(arguments),
        composed_depth=arguments.allocation_depth is not None,
        client_tls=client_tls,
        agent=arguments.agent,
        journal=options.agent_journal(),
    )


def _checkpoint(arguments: argparse.Namespace) -> NextCheckpoint | None:
    from qmpnbd.qmp.checkpoint_at import NextCheckpoint

    if arguments.checkpoint is None:
        for option in ("since", "keep"):
            if getattr(arguments, option):
                raise UsageError("only with --checkpoint", where=f"--{option}", remedy="Leave it out, or give both.")
        return None
    return NextCheckpoint(arguments.checkpoint, since=arguments.since, keep=arguments.keep)


def _instant(arguments: argparse.Namespace) -> Wishes | None:
    wishes = options.instant(arguments, "agent", "allocation_depth", "checkpoint", "dry_run")
    if wishes is None:
        return None
    for option in ("image", "description", "iothread", "writable"):
        if getattr(arguments, option):
            raise UsageError("not with --point-in-time", where=option, remedy="Leave one of the two out.")
    return replace(wishes, depth=arguments.exact_chain or arguments.allocation_depth is not None)


def _listen(text: str) -> TcpAddress:
    from qmpnbd.qmp.address import TcpAddress, parse_address

    host, _, port = text.rpartition(":")
    parsed = parse_address(f"tcp:{text}" if port != "0" else f"tcp:{host}:1")
    if not isinstance(parsed, TcpAddress):
        raise UsageError("not HOST:PORT", where=text)
    return parsed if port != "0" else replace(parsed, port=0)


async def _run(arguments: argparse.Namespace, what: MonitorAddress | str | Image, choice: Options) -> int:
    from qmpnbd.cli.deciding import decided, left_to_others
    from qmpnbd.cli.depthfiles import DepthFiles
    from qmpnbd.cli.holding import until_command_ends, until_told
    from qmpnbd.deadline import Deadline
    from qmpnbd.export.session import exporting
    from qmpnbd.report.exports import environment, export_document, export_text
    from qmpnbd.report.jsontext import document_json

    with DepthFiles(arguments.allocation_depth) as files:
        async with exporting(what, arguments.disk, choice) as session:
            depths = await files.write(session, Deadline(options.LONG_SECONDS))
            offered = choice.export
            document = export_document(
                what, session, depth=offered.allocation_depth, writable=offered.writable, depth_files=depths
            )
            text = document_json(document)
            if arguments.exec:
                code = await until_command_ends(session, arguments.exec, environment(document, text), arguments.timeout)
                moved = await _moved(session, document)
                await decided(session, code)
            else:
                output.write([text if arguments.json else export_text(document)])
                async with left_to_others(session):
                    await until_told(session, arguments.timeout)
                    moved = await _moved(session, document)
                code = 0
    output.tell(*moved, *session.take_down.left)
    return LeftBehindError.exit_code if session.take_down.left else code


async def _dry_run(what: MonitorAddress | Image, disks: list[str], choice: Options) -> int:
    """Prints the commands that would take the point in time and its exports, one in a line."""
    import json
    from contextlib import AsyncExitStack

    from qmpnbd.deadline import Deadline
    from qmpnbd.export.session import Image
    from qmpnbd.qmp.checkpoint_at import checkpoint_at
    from qmpnbd.qmp.disks import chosen_disks
    from qmpnbd.qmp.inventory import read_inventory
    from qmpnbd.qmp.planning import plan_point_in_time
    from qmpnbd.qmp.rehearsal import Rehearsal
    from qmpnbd.qmp.rundir import RunDirectory
    from qmpnbd.qmp.server import start_server

    deadline = Deadline(choice.seconds)
    if isinstance(what, Image) or choice.instant is None:
        raise UsageError("only with --point-in-time", where="--dry-run", remedy="Give both.")
    async with await Rehearsal.connect(what, deadline) as monitor:
        with RunDirectory.create(choice.runtime_dir, for_peer=monitor.peer) as directory:
            found = await read_inventory(monitor, deadline)
            chosen = chosen_disks(disks, found.disks, found.graph, where=monitor.where, empty=found.empty)
            names = [disk.name for disk in chosen]
            bitmaps = {name: [str(each) for each in choice.export.bitmaps] for name in names}
            wishes = replace(choice.instant, bitmaps=bitmaps, allow=frozenset(choice.allow), start_server=False)
            if choice.nbd is None:
                await start_server(
                    monitor, directory, deadline, listen=choice.listen, tls=choice.tls, insecure=choice.insecure
                )
            async with AsyncExitStack() as stack:
                if choice.checkpoint is not None:
                    begun = checkpoint_at(monitor, names, directory, choice.checkpoint, deadline)
                    wishes = (await stack.enter_async_context(begun)).wishes(wishes)
                plan = await plan_point_in_time(monitor, names, directory, deadline, wishes)
    output.write([f"{json.dumps(command)}\n" for command in (*monitor.noted, *plan.commands())])
    output.tell(f"recipe: {plan.recipe.value}: {plan.why}")
    return 0


async def _moved(session: Session, document: ExportDocument) -> list[str]:
    """Tells which exports stand on another node than at the beginning: their allocation depths have changed meaning."""
    from qmpnbd.deadline import Deadline

    found = []
    for export, entry in zip(session.exports, document.exports, strict=True):
        now = await session.node_of(export, Deadline(options.SHORT_SECONDS))
        if now != entry.node_name:
            found.append(
                f"the export of {entry.disk} followed the block graph from node {entry.node_name} to {now}: allocation "
                "depths that were read meanwhile do not count from the same node"
            )
    return found
