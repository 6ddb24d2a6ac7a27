"""Names of what is made inside a QEMU.

QEMU keeps exports and its NBD server when the one who made them is killed. So each name says whose it is::

    qmpnbd-3f9a01c7-x0
    ------ -------- --
    prefix   run    role and number

    x  export                          s  object that marks the NBD server as ours
    b  bitmap                          t  TLS credentials of the server
                                       z  list of clients that may use it

The run is also the name of its private directory, whose lock tells whether the run still lives
(`qmpnbd.qmp.rundir`). A later run needs no other record to recognise leftovers.
"""

from __future__ import annotations

import re
import secrets

PREFIX = "qmpnbd"
_RUN = re.compile(rf"{PREFIX}-([0-9a-f]{{8}})(?:-.*)?", re.DOTALL)


def new_run() -> str:
    """Returns a fresh run id: eight hexadecimal digits."""
    return secrets.token_hex(4)


def export_id(run: str, number: int) -> str:
    """Returns the id of a run's block export; NBD clients see it as the export name too."""
    return f"{PREFIX}-{run}-x{number}"


def bitmap_name(run: str, number: int) -> str:
    """Returns the name of a run's dirty bitmap."""
    return f"{PREFIX}-{run}-b{number}"


def server_object(run: str) -> str:
    """Returns the id of the object that is there while a run's NBD server is."""
    return f"{PREFIX}-{run}-s0"


def credentials_object(run: str) -> str:
    """Returns the id of the TLS credentials of a run's NBD server."""
    return f"{PREFIX}-{run}-t0"


def authorization_object(run: str) -> str:
    """Returns the id of the list of clients that a run's NBD server lets in."""
    return f"{PREFIX}-{run}-z0"


def run_directory_name(run: str) -> str:
    """Returns the name of a run's private directory."""
    return f"{PREFIX}-{run}"


def run_of(name: str) -> str | None:
    """Returns the run that made something of this name, or None if it is not of our making."""
    match = _RUN.fullmatch(name)
    return match[1] if match else None
