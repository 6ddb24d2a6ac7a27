"""Names of what is made inside a QEMU.

QEMU keeps exports and its NBD server when the one who made them is killed. So each name says whose it is::

    qmpnbd-3f9a01c7-x0
    ------ -------- --
    prefix   run    role and number (x: export, b: bitmap, others: `Role`)

The run is also the name of its private directory, whose lock tells whether the run still lives
(`qmpnbd.qmp.rundir`). A later run needs no other record to recognise leftovers.

Checkpoints outlive the run that made them, so their bitmaps are named after the chain they belong to, in a form that
is no run's::

    qmpnbd.nightly.c12.5d0e77b2
    ------ ------- --- --------
    prefix  chain   |   backup  of that point in time: a bitmap that was lost and made anew is another one
                    number of the point in time since which it records; orders them
"""

from __future__ import annotations

import re
import secrets
from enum import StrEnum
from typing import NamedTuple

PREFIX = "qmpnbd"
MAX_CHAIN_ID = 64
"""Characters of a chain id; with the rest far below the 1023 that QEMU takes."""

CHAIN_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{MAX_CHAIN_ID - 1}}}", re.ASCII)
"""What a chain id looks like: no dot, which separates the parts of the name."""

_CHECKPOINT = re.compile(rf"{PREFIX}\.({CHAIN_ID.pattern})\.c([1-9][0-9]{{0,17}})\.([0-9a-f]{{8}})", re.ASCII)
_RUN = re.compile(rf"{PREFIX}-([0-9a-f]{{8}})(?:-.*)?", re.DOTALL)
_ROLE = re.compile(rf"{PREFIX}-[0-9a-f]{{8}}-([a-z]+)([0-9]{{1,9}})")


class Role(StrEnum):
    """What something of a run is for; the letters in its name."""

    SCRATCH = "s"
    """Node that keeps what the guest overwrites, or that keeps nothing; also the scratch file's name."""

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

    UNDECIDED = "u"
    """Disabled dirty bitmap that says: nobody has decided yet about the checkpoint of this run."""

    PAUSE = "p"
    """Object that says: the guest was paused by us."""

    SERVER = "m"
    """Object that marks the NBD server as ours."""

    CREDENTIALS = "k"
    """TLS credentials of the server."""

    CLIENTS = "z"
    """List of clients that may use the server."""


def new_run() -> str:
    """Returns a fresh run id: eight hexadecimal digits."""
    return secrets.token_hex(4)


class CheckpointName(NamedTuple):
    """What the name of a checkpoint's bitmap says.

    Attributes:
        chain: chain id, in the form of `CHAIN_ID`.
        number: of the checkpoint in its chain, from 1.
        backup: id of the backup that was begun with it: eight hexadecimal digits.
    """

    chain: str
    number: int
    backup: str

    def __str__(self) -> str:
        return f"{PREFIX}.{self.chain}.c{self.number}.{self.backup}"


def export_id(run: str, number: int) -> str:
    """Returns the id of a run's block export; NBD clients see it as the export name too."""
    return f"{PREFIX}-{run}-x{number}"


def bitmap_name(run: str, number: int) -> str:
    """Returns the name of a run's dirty bitmap."""
    return f"{PREFIX}-{run}-b{number}"


def scratch_name(run: str, number: int) -> str:
    """Returns the name of a run's scratch node; shorter than the 31 characters that QEMU takes."""
    return name_of(run, Role.SCRATCH, number)


def new_backup() -> str:
    """Returns a fresh backup id: eight hexadecimal digits."""
    return secrets.token_hex(4)


def checkpoint_of(name: str) -> CheckpointName | None:
    """Returns what the name of a checkpoint's bitmap says, or None if it is no such bitmap."""
    match = _CHECKPOINT.fullmatch(name)
    return CheckpointName(match[1], int(match[2]), match[3]) if match else None


def server_object(run: str) -> str:
    """Returns the id of the object that is there while a run's NBD server is."""
    return name_of(run, Role.SERVER, 0)


def credentials_object(run: str) -> str:
    """Returns the id of the TLS credentials of a run's NBD server."""
    return name_of(run, Role.CREDENTIALS, 0)


def authorization_object(run: str) -> str:
    """Returns the id of the list of clients that a run's NBD server lets in."""
    return name_of(run, Role.CLIENTS, 0)


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
