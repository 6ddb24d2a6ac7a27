"""Names of what is made inside a QEMU.

QEMU keeps exports and its NBD server when the one who made them is killed. So each name says whose it is::

    qmpnbd-3f9a01c7-x0
    ------ -------- --
    prefix   run    role and number (x: export, b: bitmap, others: `Role`)

The run is also the name of its private directory, whose lock tells whether the run still lives
(`qmpnbd.qmp.rundir`). A later run needs no other record to recognise leftovers.
"""

from __future__ import annotations

import re
import secrets
from enum import StrEnum

PREFIX = "qmpnbd"
_RUN = re.compile(rf"{PREFIX}-([0-9a-f]{{8}})(?:-.*)?", re.DOTALL)
_ROLE = re.compile(rf"{PREFIX}-[0-9a-f]{{8}}-([a-z]+)([0-9]{{1,9}})")


class Role(StrEnum):
    """What something of a point in time is for; the letters in its name."""

    SCRATCH = "s"
    """Node of a scratch image, which keeps what the guest overwrites; also the scratch file's name."""

    SCRATCH_FILE = "sf"
    """Protocol node below a scratch node."""

    JOB = "j"
    """Block job."""

    FILTER = "f"
    """Filter node that a job inserts."""

    TOUCH = "t"
    """Dirty bitmap of what was written before the instant."""

    COPY = "c"
    """copy-before-write node."""

    ACCESS = "a"
    """snapshot-access node."""

    OVERLAY = "o"
    """Node of the overlay of an external snapshot, which holds the guest's newest data; also the file's name."""

    OVERLAY_FILE = "of"
    """Protocol node below an overlay node."""

    PAUSE = "p"
    """Object that says: the guest was paused by us."""


def new_run() -> str:
    """Returns a fresh run id: eight hexadecimal digits."""
    return secrets.token_hex(4)


def export_id(run: str, number: int) -> str:
    """Returns the id of a run's block export; NBD clients see it as the export name too."""
    return f"{PREFIX}-{run}-x{number}"


def bitmap_name(run: str, number: int) -> str:
    """Returns the name of a run's dirty bitmap."""
    return f"{PREFIX}-{run}-b{number}"


def name_of(run: str, role: Role, number: int) -> str:
    """Returns the name of something of a run; short enough for a node-name (31 bytes) up to a million of them."""
    return f"{PREFIX}-{run}-{role}{number}"


def role_of(name: str) -> Role | None:
    """Returns what something of this name is for, or None if it is not of our making, an export or a bitmap."""
    match = _ROLE.fullmatch(name)
    return Role(match[1]) if match and match[1] in set(Role) else None


def number_of(name: str) -> int:
    """Returns the number in a name that has a role; 0 in others."""
    match = _ROLE.fullmatch(name)
    return int(match[2]) if match else 0


def run_directory_name(run: str) -> str:
    """Returns the name of a run's private directory."""
    return f"{PREFIX}-{run}"


def run_of(name: str) -> str | None:
    """Returns the run that made something of this name, or None if it is not of our making."""
    match = _RUN.fullmatch(name)
    return match[1] if match else None
