"""The one error tree, and the exit code of each branch.

::

    QmpnbdError                      70  a fault of qmpnbd itself, or a bug
    ├── UsageError                    2  the caller's mistake
    ├── DeadlineError                50  the time given was not enough
    ├── ReportFileError              51  a report file could not be written
    ├── MonitorError
    │   ├── MonitorConnectError      10  no such socket, nobody listens, no permission
    │   ├── NotAMonitorError         11  something answers, but it does not speak QMP
    │   ├── MonitorSilentError       12  no greeting: another client holds the monitor, or QEMU is stopped
    │   ├── MonitorLostError         13  the connection ended; what a pending command did is unknown
    │   │   ├── OutcomeUnknownError  13  a command that changes something was under way: ask before doing it again
    │   │   └── ReplyTooLongError    13  a reply that nothing of sense can need; the connection is given up
    │   ├── CommandFailedError       14  QEMU refused a command
    │   │   └── ExportRefusedError   24  it refused an export or the NBD server, for a reason that is known
    │   ├── UnsafeOperationError     15  QEMU would do it, and the guest could be hurt
    │   ├── LeftBehindError          16  done, but something of ours could not be taken down
    │   ├── InterferenceError        17  somebody else changed the block graph or our export meanwhile
    │   └── CapabilityError          18  this QEMU cannot do it
    ├── DiskError
    │   ├── NoSuchDiskError          20  no disk of that name
    │   ├── DiskNotLocalError        21  the disk is not made of files that can be read here
    │   ├── GraphUnsupportedError    22  a block graph whose depth is not known for certain
    │   ├── DiskBusyError            27  another job, a snapshot or a filter holds the disk
    │   └── ScratchError             25  no room for what the guest overwrites, or the room ran out
    ├── ServerBusyError              23  this QEMU already runs an NBD server, and it cannot be reached
    ├── BitmapError                  26  a bitmap or checkpoint is missing, undecided, in use, or cannot be made
    ├── AgentError
    │   ├── AgentSilentError         60  the guest agent does not answer
    │   └── AgentRefusedError        61  the guest agent refused, or does not speak its protocol
    ├── NbdError
    │   ├── NbdConnectError          30  cannot connect to the NBD server
    │   ├── NbdProtocolError         31  the server broke the protocol; the connection is dead
    │   ├── NbdRefusedError          32  the server refused an option: unknown export, policy, TLS required
    │   ├── NbdContextError          33  the metadata context is not offered
    │   ├── NbdRequestError          34  one request failed at the server; the connection lives
    │   ├── NbdUnsupportedError      35  the server cannot do what is needed
    │   ├── NbdDisconnectedError     36  the server ended the connection
    │   └── NbdTlsError              37  no TLS, or the peer is not who it should be
    ├── BackupError
    │   ├── RepositoryBusyError      80  another run holds the repository
    │   ├── RepositoryDamagedError   81  a manifest, image or hash file is missing, foreign, cut or rotten
    │   ├── NoSuchBackupError        82  no backup of that name, or no repository
    │   ├── TargetError              83  the target cannot be written: full, gone, too small
    │   ├── TargetInUseError         84  the target exists, or somebody uses it
    │   └── NotProvedError           85  what was read back is not what was written
    └── ImageError
        ├── ImageMissingError        40  no such file
        ├── ImageUnreadableError     41  not permitted, not a file, or an I/O error
        ├── ImageTruncatedError      42  the file ends before what it describes
        ├── ImageCorruptError        43  a structure of the image contradicts the format
        ├── ImageUnsupportedError    44  a format or feature that is not read here
        ├── ChainError               45  the backing chain loops or is too deep
        ├── BackingNotLocalError     46  a layer's backing file is not a local file
        └── ImageChangedError        48  somebody else changed the file while it was read

Exit codes are API: never renumbered. 0, 1 and 3 are verdicts (agreed or clean, discrepancies or corruptions found, not
everything could be judged or leaks), not errors, and so is 47 (a map with unreadable ranges); 130, 143 and 129 are
SIGINT, SIGTERM and SIGHUP after everything was taken down.
"""

from __future__ import annotations

# Without the module typing, which would be a tenth of the start of `qmpnbd --help`.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar


class QmpnbdError(Exception):
    """Something that went wrong, told so that the reader knows what to do next.

    Attributes:
        what: what went wrong, without a full stop.
        where: the socket, file, disk or export it concerns.
        remedy: what to do next, a sentence; may be empty where nothing sensible can be advised.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, what: str, *, where: str, remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}"
        end = "" if text.endswith("?") else "."
        return f"{text}{end} {self.remedy}" if self.remedy else text


class UsageError(QmpnbdError):
    """The caller asked for something that makes no sense."""

    exit_code = 2


class DeadlineError(QmpnbdError):
    """The time given was not enough."""

    exit_code = 50


class ReportFileError(QmpnbdError):
    """A report file or stdout could not be written; what was in the file before is unchanged."""

    exit_code = 51


class MonitorError(QmpnbdError):
    """The conversation over QMP failed."""


class MonitorConnectError(MonitorError):
    """There is nothing to connect to: no such socket, nobody listens, no permission."""

    exit_code = 10


class NotAMonitorError(MonitorError):
    """Something answers there, but it does not speak QMP."""

    exit_code = 11


class MonitorSilentError(MonitorError):
    """The greeting never came: a QMP socket serves one client at a time, the next one just waits."""

    exit_code = 12


class MonitorLostError(MonitorError):
    """The connection ended under us; whether a pending command was carried out is unknown."""

    exit_code = 13


class OutcomeUnknownError(MonitorLostError):
    """The connection ended during a command that changes something: it must not be repeated before QEMU was asked.

    Attributes:
        command: the QMP command.
        asks: what to ask, over a new connection, to learn whether it was carried out.
    """

    def __init__(self, command: str, asks: tuple[str, ...], why: str, *, where: str) -> None:
        super().__init__(
            f"{why} during {command}; whether QEMU carried it out is unknown",
            where=where,
            remedy=f"See whether QEMU still runs, and before doing it again ask: {', '.join(asks)}.",
        )
        self.command = command
        self.asks = asks


class ReplyTooLongError(MonitorLostError):
    """The reply to a command was longer than any that is asked for here, and the connection had to be given up."""


class CommandFailedError(MonitorError):
    """QEMU refused a command.

    Attributes:
        command: the QMP command.
        error_class: QMP's error class, nearly always ``GenericError``.
        description: QEMU's own words.
    """

    exit_code = 14

    def __init__(self, command: str, error_class: str, description: str, *, where: str, remedy: str = "") -> None:
        super().__init__(f"QEMU refused {command}: {description}", where=where, remedy=remedy)
        self.command = command
        self.error_class = error_class
        self.description = description


class ExportRefusedError(CommandFailedError):
    """QEMU refused an export or its NBD server; the message says why.

    Attributes:
        reason: a word for why, from the table in `qmpnbd.qmp.refusals`.
    """

    exit_code = 24

    def __init__(
        self, command: str, error_class: str, description: str, *, reason: str, where: str, remedy: str
    ) -> None:
        super().__init__(command, error_class, description, where=where, remedy=remedy)
        self.reason = reason


class UnsafeOperationError(MonitorError):
    """QEMU would do it, but the guest or its data could be hurt."""

    exit_code = 15


class LeftBehindError(MonitorError):
    """Something made inside QEMU could not be taken down; the message names it."""

    exit_code = 16


class InterferenceError(MonitorError):
    """Somebody else changed the block graph or an export of ours meanwhile."""

    exit_code = 17


class CapabilityError(MonitorError):
    """This QEMU cannot do it: it is too old, or was built without it.

    Attributes:
        capability: the name, as in the table of docs/controller.md.
    """

    exit_code = 18

    def __init__(self, what: str, *, where: str, capability: str, remedy: str) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.capability = capability


class DiskError(QmpnbdError):
    """A disk cannot be worked on."""


class NoSuchDiskError(DiskError):
    """No disk of that name."""

    exit_code = 20


class DiskNotLocalError(DiskError):
    """The disk is not made of files that can be read here."""

    exit_code = 21


class GraphUnsupportedError(DiskError):
    """A block graph for which the right allocation depth is not known for certain."""

    exit_code = 22


class DiskBusyError(DiskError):
    """Another job, a snapshot or somebody's filter holds the disk."""

    exit_code = 27


class ScratchError(DiskError):
    """The scratch space for a point in time cannot be made, or ran out."""

    exit_code = 25


class ServerBusyError(QmpnbdError):
    """QEMU has one NBD server, it is taken, and it cannot be reached from here."""

    exit_code = 23


class BitmapError(QmpnbdError):
    """A bitmap or checkpoint is missing, undecided, in use, or cannot be made like this."""

    exit_code = 26


class AgentError(QmpnbdError):
    """The conversation with the guest agent failed."""


class AgentSilentError(AgentError):
    """The guest agent does not answer: none runs, somebody else talks to it, or the guest stands still."""

    exit_code = 60


class AgentRefusedError(AgentError):
    """The guest agent refused, or what answers is no guest agent."""

    exit_code = 61


class NbdError(QmpnbdError):
    """The conversation over NBD failed."""


class NbdConnectError(NbdError):
    """There is no NBD server to connect to."""

    exit_code = 30


class NbdProtocolError(NbdError):
    """The server broke the protocol. Nothing it says afterwards can be believed: the connection is dead."""

    exit_code = 31


class NbdRefusedError(NbdError):
    """The server refused an option: unknown export, policy, TLS required, shutting down."""

    exit_code = 32


class NbdContextError(NbdError):
    """A metadata context that was asked for is not offered by the export."""

    exit_code = 33


class NbdRequestError(NbdError):
    """One request failed at the server; the connection can be used further.

    Attributes:
        wire_error: the NBD error number as sent (EIO is 5 on the wire, on every host).
        offset: first byte of the request.
        length: bytes of the request.
    """

    exit_code = 34

    def __init__(self, what: str, *, where: str, wire_error: int, offset: int, length: int, remedy: str = "") -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.wire_error = wire_error
        self.offset = offset
        self.length = length


class NbdUnsupportedError(NbdError):
    """The server cannot do what is needed; asking again will not help."""

    exit_code = 35


class NbdDisconnectedError(NbdError):
    """The server ended the connection."""

    exit_code = 36


class NbdTlsError(NbdError):
    """TLS could not be agreed or the peer could not be verified."""

    exit_code = 37


class ImageError(QmpnbdError):
    """An image file cannot be used."""


class ImageMissingError(ImageError):
    """There is no such file."""

    exit_code = 40


class ImageUnreadableError(ImageError):
    """The file is there, but it may not or cannot be read."""

    exit_code = 41


class ImageTruncatedError(ImageError):
    """The file ends before what it describes."""

    exit_code = 42


class ImageCorruptError(ImageError):
    """A structure of the image contradicts its format.

    Attributes:
        structure: the structure, in the specification's words ("L2 entry").
        offset: where in the file it lies, in bytes.
        value: what was found there.
    """

    exit_code = 43

    def __init__(
        self, what: str, *, where: str, structure: str, offset: int, value: int | None = None, remedy: str = ""
    ) -> None:
        found = "" if value is None else f" (found {value:#x})"
        super().__init__(f"{structure} at byte {offset:#x}: {what}{found}", where=where, remedy=remedy)
        self.structure = structure
        self.offset = offset
        self.value = value


class ImageUnsupportedError(ImageError):
    """A format or a feature that is not read here."""

    exit_code = 44


class ChainError(ImageError):
    """The backing chain loops, or is deeper than any sane one."""

    exit_code = 45


class BackingNotLocalError(ImageError):
    """A layer of the chain is not a local file."""

    exit_code = 46


class ImageChangedError(ImageError):
    """Somebody else changed the file while it was read."""

    exit_code = 48


class BackupError(QmpnbdError):
    """Something about copies, backups and where they are kept."""


class RepositoryBusyError(BackupError):
    """Another run holds the repository."""

    exit_code = 80


class RepositoryDamagedError(BackupError):
    """Something in a repository is missing, foreign, cut or rotten: nothing that depends on it can be trusted."""

    exit_code = 81


class NoSuchBackupError(BackupError):
    """There is no backup of that name, or no repository at all."""

    exit_code = 82


class TargetError(BackupError):
    """The target of a copy cannot be written: it is full, gone, or too small."""

    exit_code = 83


class TargetInUseError(BackupError):
    """The target of a copy exists, or somebody uses it."""

    exit_code = 84


class NotProvedError(BackupError):
    """What was read back is not what was written."""

    exit_code = 85
