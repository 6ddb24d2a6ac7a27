"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpnbd.nbd.tls import Tls


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
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of bytes")
    return int(text)


LONG_SECONDS = 600.0
"""For what reads whole maps: ten times what a disk of a hundred million extents takes."""

SHORT_SECONDS = 30.0
"""For what only asks a few questions."""


def add_uri(parser: argparse.ArgumentParser) -> None:
    """Adds the URI of an export."""
    parser.add_argument("uri", metavar="URI", help="nbd[s]://HOST[:PORT]/EXPORT or nbd[s]+unix:///EXPORT?socket=PATH")


def add_nbdinfo(parser: argparse.ArgumentParser, command: str, schema: str) -> None:
    """Adds ``--json``, ``--nbdinfo`` and ``--nbdinfo-text``, of which one can be chosen.

    Args:
        parser: the command's.
        command: the command of nbdinfo whose output is printed.
        schema: of the JSON document.
    """
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help=f"print one JSON document (schema {schema})")
    form.add_argument("--nbdinfo", action="store_true", help=f"print the very bytes of {command} --json")
    form.add_argument("--nbdinfo-text", action="store_true", help=f"print the very bytes of {command}")


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


def add_monitor(parser: argparse.ArgumentParser) -> None:
    """Adds ``--qmp``."""
    parser.add_argument(
        "--qmp",
        required=True,
        metavar="ADDRESS",
        help="where QEMU's QMP monitor listens: PATH, unix:PATH, HOST:PORT or tcp:HOST:PORT",
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
        "--tls-no-verify", action="store_true", help="encrypt, but do not have the server prove who it is"
    )


def tls(arguments: argparse.Namespace) -> Tls | None:
    """Returns the parameters of TLS that were given, or None if none was."""
    if not (arguments.tls_certificates or arguments.tls_hostname or arguments.tls_no_verify):
        return None
    from qmpnbd.nbd.tls import Tls

    return Tls(
        certificates=arguments.tls_certificates,
        hostname=arguments.tls_hostname,
        verify=False if arguments.tls_no_verify else None,
    )
