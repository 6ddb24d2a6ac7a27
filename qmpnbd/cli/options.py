"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import math


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


def add_timeout(parser: argparse.ArgumentParser, default: float) -> None:
    """Adds ``--timeout``."""
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=default,
        metavar="SECONDS",
        help=f"time for everything but taking down (default: {default:g})",
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
