"""What can be taken down, and with which commands; pure.

The same few words serve whoever made something and takes it down again (`qmpnbd.qmp.plan`), and whoever finds it by its
name after a kill (`qmpnbd.qmp.leftovers`). `qmpnbd.qmp.undoing` carries them out. Each can be done any number of times:
what is gone already is no error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Command: TypeAlias = Mapping[str, object]
"""A QMP command as it goes over the wire: ``execute`` and ``arguments``."""


def command(name: str, /, **arguments: object) -> Command:
    """Returns a command; argument names are written with underscores."""
    if not arguments:
        return {"execute": name}
    return {"execute": name, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}


@dataclass(frozen=True, slots=True)
class RemoveExport:
    """Remove an export, cutting off its clients.

    Attributes:
        export: its id.
    """

    export: str

    def __str__(self) -> str:
        return f"export {self.export}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told."""
        return (command("block-export-del", id=self.export, mode="hard"),)


@dataclass(frozen=True, slots=True)
class StopServer:
    """Stop QEMU's NBD server, unless somebody else has an export in it.

    Attributes:
        socket_path: where it listens.
    """

    socket_path: str

    def __str__(self) -> str:
        return f"NBD server at {self.socket_path}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told."""
        return (command("nbd-server-stop"),)


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Cancel a job and wait for its end.

    Attributes:
        job: its id.
    """

    job: str

    def __str__(self) -> str:
        return f"job {self.job}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told."""
        return (command("job-cancel", id=self.job),)


@dataclass(frozen=True, slots=True)
class CommitOverlay:
    """Write an overlay's data into the image that it was put above, take it out of the chain, and remove it.

    The job that does it stays, concluded, until the overlay is removed: it is the proof that the data is below. An
    overlay that nobody uses says nothing; committed twice, old data would go over new.

    Attributes:
        overlay: the overlay's node.
        base: the node below. Always named: QEMU would otherwise commit into the bottom of the chain.
        job: id of the job that does it.
        path: the overlay's file.
    """

    overlay: str
    base: str
    job: str
    path: str

    def __str__(self) -> str:
        return f"overlay {self.overlay} above {self.base}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told; the first is adapted to whatever somebody has put above the overlay meanwhile."""
        commit = {"job-id": self.job, "device": self.overlay, "top-node": self.overlay, "base-node": self.base}
        return (
            command("block-commit", **commit, auto_dismiss=False),
            command("job-complete", id=self.job),
            command("blockdev-del", node_name=self.overlay),
            command("job-dismiss", id=self.job),
        )


@dataclass(frozen=True, slots=True)
class RestoreDrive:
    """Put a device that stands on our filter back on the node below.

    Attributes:
        qom_path: the device.
        filter: our filter's node: if the device stands on another one, it is left there.
        node: the node to go back to.
    """

    qom_path: str
    filter: str
    node: str

    def __str__(self) -> str:
        return f"filter {self.filter} under {self.qom_path}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told."""
        return (command("qom-set", path=self.qom_path, property="drive", value=self.node),)


@dataclass(frozen=True, slots=True)
class DeleteNode:
    """Delete a node.

    Attributes:
        node_name: its name.
    """

    node_name: str

    def __str__(self) -> str:
        return f"node {self.node_name}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told."""
        return (command("blockdev-del", node_name=self.node_name),)


@dataclass(frozen=True, slots=True)
class RemoveBitmap:
    """Remove a dirty bitmap.

    Attributes:
        node_name: the node that has it.
        name: its name.
    """

    node_name: str
    name: str

    def __str__(self) -> str:
        return f"bitmap {self.name} of node {self.node_name}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told."""
        return (command("block-dirty-bitmap-remove", node=self.node_name, name=self.name),)


@dataclass(frozen=True, slots=True)
class AbortCheckpoint:
    """Merge back what a checkpoint recorded that its run has not decided about.

    Attributes:
        run: the run that began it.
        what: the checkpoint, in words.
        actions: of the transaction.
    """

    run: str
    what: str
    actions: tuple[Mapping[str, object], ...]

    def __str__(self) -> str:
        return f"{self.what}, begun by run {self.run}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told; planned anew when it is done, since bitmaps may be in use until then."""
        return (command("transaction", actions=list(self.actions)),)


@dataclass(frozen=True, slots=True)
class Resume:
    """Let a guest run on that we paused, if we did: an object of ours in QEMU says so.

    Attributes:
        marker: the object's id.
    """

    marker: str

    def __str__(self) -> str:
        return f"pause of the guest, marked by the object {self.marker}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told."""
        return command("cont"), command("object-del", id=self.marker)


@dataclass(frozen=True, slots=True)
class RetryInputOutput:
    """Let a guest run on that QEMU stopped because a write failed: what stood in its way is gone, or it stops again."""

    def __str__(self) -> str:
        return "guest stopped by an I/O error"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told."""
        return (command("cont"),)


@dataclass(frozen=True, slots=True)
class DeleteObject:
    """Delete a user's object.

    Attributes:
        id: its id.
    """

    id: str

    def __str__(self) -> str:
        return f"object {self.id}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told."""
        return (command("object-del", id=self.id),)


@dataclass(frozen=True, slots=True)
class RemoveFile:
    """Remove a file of ours, once no node of QEMU stands on it any more.

    Attributes:
        path: the file.
        node_name: the node that stood on it.
    """

    path: str
    node_name: str

    def __str__(self) -> str:
        return f"file {self.path}"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What QEMU is told: nothing."""
        return ()


Undo: TypeAlias = (
    RemoveExport
    | StopServer
    | CancelJob
    | CommitOverlay
    | RestoreDrive
    | DeleteNode
    | RemoveBitmap
    | AbortCheckpoint
    | Resume
    | RetryInputOutput
    | DeleteObject
    | RemoveFile
)
