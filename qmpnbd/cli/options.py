"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpnbd.nbd.tls import Tls
    from qmpnbd.qmp.address import MonitorAddress
    from qmpnbd.qmp.planning import Wishes


def seconds(text: str) -> float:
    """Reads a number of seconds, more than 0 and finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def at_least_two(text: str) -> int:
    """Reads a whole number of 2 or more."""
    if not text.isascii() or not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 2 or more")
    return int(text)


def whole(text: str) -> int:
    """Reads a whole number of 0 or more."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """Reads a whole number of 1 or more."""
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def add_granularity(parser: argparse._ActionsContainer, default: str) -> None:
    """Adds ``--granularity``; `default` says what is taken without."""
    parser.add_argument(
        "--granularity",
        type=whole,
        metavar="BYTES",
        help=f"bytes that a bit of a new bitmap stands for, a power of two, 512 or more (default: {default})",
    )


LONG_SECONDS = 600.0
"""For what reads whole maps: ten times what a disk of a hundred million extents takes."""

WEEK_SECONDS = 7 * 86400.0
"""For what reads or writes whole disks."""

SHORT_SECONDS = 30.0
"""For what only asks a few questions."""


def add_uri(parser: argparse.ArgumentParser) -> None:
    """Adds the URI of an export."""
    parser.add_argument("uri", metavar="URI", help="nbd[s]://HOST[:PORT]/EXPORT or nbd[s]+unix:///EXPORT?socket=PATH")


def add_nbdinfo(parser: argparse.ArgumentParser, command: str, schema: str) -> argparse._MutuallyExclusiveGroup:
    """Adds ``--json``, ``--nbdinfo`` and ``--nbdinfo-text``, and returns the group, of which one can be chosen.

    Args:
        parser: the command's.
        command: the command of nbdinfo whose output is printed.
        schema: of the JSON document.
    """
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help=f"print one JSON document (schema {schema})")
    form.add_argument("--nbdinfo", action="store_true", help=f"print the very bytes of {command} --json")
    form.add_argument("--nbdinfo-text", action="store_true", help=f"print the very bytes of {command}")
    return form


def add_timeout(parser: argparse.ArgumentParser, default: float, scope: str = "for everything") -> None:
    """Adds ``--timeout``; `scope` says what the time is for."""
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=default,
        metavar="SECONDS",
        help=f"time {scope} but taking down (default: {default:g})",
    )


def add_json(parser: argparse.ArgumentParser, schema: str) -> None:
    """Adds ``--json``; `schema` is the document's schema name."""
    parser.add_argument("--json", action="store_true", help=f"print one JSON document (schema {schema})")


def add_monitor(parser: argparse.ArgumentParser, *, required: bool = True, many: bool = False) -> None:
    """Adds the ways to a monitor: ``--qmp``, or ``--libvirt`` and ``--domain``.

    Whichever is given, the address is put into ``qmp``, once for all commands (`monitor`, `monitors`); None where
    none is required, and a list where there may be many.
    """
    parser.add_argument(
        "--qmp",
        action="append" if many else "store",
        default=[] if many else None,
        metavar="ADDRESS",
        help="where QEMU's QMP monitor listens: PATH, unix:PATH, HOST:PORT or tcp:HOST:PORT; or fd:N, a connected "
        "socket that was inherited",
    )
    group = parser.add_argument_group(
        "libvirt",
        "for a domain whose monitor libvirt holds, instead of --qmp. Marks the domain as tainted (custom-monitor); "
        "there are no events, so ends are found out by asking; libvirt does not know what is made in QEMU meanwhile: "
        "start no snapshot, block job, backup or migration through it",
    )
    group.add_argument("--domain", metavar="NAME", help="the domain's name or UUID")
    group.add_argument(
        "--libvirt", metavar="URI", help="libvirt's connection URI, as for virsh -c (default: libvirt's own)"
    )
    parser.set_defaults(monitor_parser=parser, monitor_required=required, monitor_many=many)


def monitors(arguments: argparse.Namespace) -> list[MonitorAddress]:
    """Returns the addresses of the monitors that were chosen.

    Raises:
        UsageError: one is no address.
    """
    from qmpnbd.qmp.address import LibvirtAddress, parse_address

    found: list[MonitorAddress] = [parse_address(each) for each in arguments.qmp]
    if arguments.domain is not None:
        found.append(LibvirtAddress(arguments.libvirt or "", arguments.domain))
    return found


def monitor(arguments: argparse.Namespace) -> MonitorAddress | None:
    """Returns the address of the monitor that was chosen; ends with the command's usage if none was, or two.

    Raises:
        UsageError: it is no address.
    """
    from qmpnbd.qmp.address import LibvirtAddress, parse_address

    usage: argparse.ArgumentParser = arguments.monitor_parser
    if arguments.domain is None and arguments.libvirt is not None:
        usage.error("--libvirt needs --domain NAME")
    if arguments.domain is None and arguments.qmp is None and not arguments.monitor_required:
        return None
    if (arguments.domain is None) == (arguments.qmp is None):
        usage.error("one of --qmp ADDRESS and --domain NAME is required")
    if arguments.domain is None:
        return parse_address(arguments.qmp)
    return LibvirtAddress(arguments.libvirt or "", arguments.domain)


def add_sharing(parser: argparse.ArgumentParser) -> None:
    """Adds what commands need that have exports made in QEMU: ``--nbd``, ``--runtime-dir``, ``--allow``."""
    parser.add_argument(
        "--nbd",
        metavar="URI",
        help="share the NBD server that this QEMU runs already and that listens at URI; it is never stopped",
    )
    add_exporting(parser)


IOTHREAD = "iothread"
HAZARDS = ("allocation-after-depth", IOTHREAD, "snapshot-access")
"""Those of `qmpnbd.qmp.capabilities` that can be allowed; not imported, since a start must be light."""


def add_allow(parser: argparse._ActionsContainer, names: Sequence[str]) -> None:
    """Adds ``--allow`` and ``--allow-iothread``; `allowed` tells what was given."""
    parser.add_argument(
        "--allow-iothread",
        action="store_true",
        help="work on disks in an iothread although QEMU 7.x and 8.x may abort when an NBD client is lost",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=names,
        metavar="NAME",
        help=f"take the risk of what this QEMU is known to do wrong: {', '.join(names)}; can be repeated",
    )


def allowed(arguments: argparse.Namespace) -> frozenset[str]:
    """Returns the names of the hazards to take the risk of."""
    return frozenset(arguments.allow) | ({IOTHREAD} if arguments.allow_iothread else frozenset())


def add_exporting(parser: argparse.ArgumentParser) -> None:
    """Adds ``--runtime-dir``, ``--allow`` and ``--allow-iothread``."""
    parser.add_argument(
        "--runtime-dir",
        metavar="DIR",
        help="make the private directory with the NBD socket in DIR (default: $TMPDIR or /tmp); "
        "QEMU must be able to write to it",
    )
    add_allow(parser, (IOTHREAD,))


def add_runtime_dir(parser: argparse.ArgumentParser) -> None:
    """Adds ``--runtime-dir`` for commands that look for the directories of other runs."""
    parser.add_argument(
        "--runtime-dir",
        metavar="DIR",
        help="where the private directories of runs are, which tell whether they live (default: $TMPDIR or /tmp)",
    )


def agent_journal() -> str:
    """Returns the folder that outlives a killed run, in which is written down that a guest may be frozen."""
    import os
    from pathlib import Path

    home = Path(os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser())
    return str(home / "qmpnbd" / "agent")


def add_instant(group: argparse._ArgumentGroup, verb: str) -> None:
    """Adds how a point in time is taken; `verb` says what is done with the disks."""
    group.add_argument("--point-in-time", action="store_true", help=f"{verb} all disks as they are at one instant")
    group.add_argument(
        "--protect-guest",
        action="store_true",
        help="scratch space that fails must not fail the guest, which is paused some milliseconds for that (QEMU 8.0)",
    )
    group.add_argument(
        "--exact-chain",
        action="store_true",
        help=f"{verb} the very chain of the instant, with its allocation depth; the guest writes into an overlay in "
        "the folder of --scratch, which is committed at the end",
    )
    group.add_argument(
        "--scratch", metavar="DIR", help="where what the guest overwrites is kept (default: the private directory)"
    )
    group.add_argument(
        "--scratch-size", type=int, metavar="BYTES", help="for all disks together (default: most of what is free)"
    )


def instant(arguments: argparse.Namespace, *more: str) -> Wishes | None:
    """Returns how the point in time that was asked for shall be taken; None if none was.

    Args:
        arguments: the parsed command line.
        more: names of other options that are of use only with one.

    Raises:
        UsageError: what is said of it, and there is to be none.
    """
    if not arguments.point_in_time:
        from qmpnbd.errors import UsageError

        for option in ("protect_guest", "exact_chain", "scratch", "scratch_size", *more):
            if getattr(arguments, option):
                name = f"--{option.replace('_', '-')}"
                raise UsageError("only with --point-in-time", where=name, remedy="Leave it out, or give both.")
        return None
    from qmpnbd.qmp.planning import Wishes

    return Wishes(
        protect_guest=arguments.protect_guest,
        exact_chain=arguments.exact_chain,
        scratch_dir=arguments.scratch,
        scratch_bytes=arguments.scratch_size,
    )


def add_tls(parser: argparse.ArgumentParser) -> None:
    """Adds what TLS needs beside the URI; `tls` makes the parameters of it."""
    group = parser.add_argument_group(
        "TLS", "for nbds:// and nbds+unix://; each of these demands it for other URIs, too"
    )
    group.add_argument(
        "--tls-certificates",
        metavar="DIR",
        default="",
        help="folder with ca-cert.pem, and client-cert.pem and client-key.pem if the server asks who we are "
        "(default: the authorities the system trusts)",
    )
    group.add_argument(
        "--tls-hostname", metavar="NAME", default="", help="name in the server's certificate (default: the URI's host)"
    )
    group.add_argument(
        "--tls-psk-file",
        metavar="FILE",
        default="",
        help="lines of USERNAME:HEXKEY, for a shared secret instead of certificates; which one of several the URI says "
        "(nbds://USERNAME@HOST)",
    )
    group.add_argument(
        "--tls-no-verify", action="store_true", help="encrypt, but do not have the server prove who it is"
    )


def tls(arguments: argparse.Namespace) -> Tls | None:
    """Returns the parameters of TLS that were given, or None if none was."""
    given = (arguments.tls_certificates, arguments.tls_hostname, arguments.tls_psk_file, arguments.tls_no_verify)
    if not any(given):
        return None
    from qmpnbd.nbd.tls import Tls

    return Tls(
        certificates=arguments.tls_certificates,
        hostname=arguments.tls_hostname,
        verify=False if arguments.tls_no_verify else None,
        psk_file=arguments.tls_psk_file,
    )
