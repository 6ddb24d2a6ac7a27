"""The table of exit codes, drawn from the error tree so that it cannot drift from it."""

from __future__ import annotations

from collections.abc import Iterator

from qmpnbd import errors

# Without the modules signal and typing, which would be a tenth of the start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal

AGREED = CLEAN = 0
DISCREPANCY = CORRUPT = 1
INCOMPLETE = LEAKS = 3
FELL_BACK = 4
NOT_QUIESCED = 5
UNREADABLE = 47
HANGUP = 129
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

_OTHERS = {
    AGREED: "success; validate: served and computed agree; check: clean; verify: proved",
    DISCREPANCY: "validate: served and computed differ; info --can: no; check: corruptions or overlaps; "
    "repository check: damage; verify: a backup is damaged or does not boot",
    INCOMPLETE: "validate: no discrepancy, but not everything could be judged; check: leaks, nothing worse; "
    "recover: runs of unknown state were left alone; repository check: only what killed runs left; "
    "verify: nothing wrong, but not everything could be judged",
    FELL_BACK: "backup: done and proved, but a disk is not the increment that was asked for; the report says why",
    NOT_QUIESCED: "backup: done and proved, but the guest's filesystems were not at rest although that was asked for",
    UNREADABLE: "chain: some ranges cannot be read, and are shown as such",
    HANGUP: "ended by SIGHUP, everything taken down",
    INTERRUPTED: "ended by Ctrl-C (SIGINT), everything taken down",
    BROKEN_PIPE: "whoever read the output went away",
    TERMINATED: "ended by SIGTERM, everything taken down",
}


class StoppedBySignal(BaseException):
    """A signal ended the work, and everything was taken down.

    Attributes:
        exit_code: 128 plus the signal's number, as shells have it.
    """

    def __init__(self, number: signal.Signals, notes: list[str]) -> None:
        super().__init__(number.name)
        self.exit_code = 128 + number
        for note in notes:
            self.add_note(note)


def exit_codes() -> dict[int, str]:
    """Returns every exit code with its meaning, in ascending order."""
    table = dict(_OTHERS)
    for kind in _tree(errors.QmpnbdError):
        # Branches of the tree share the code of its root; only the root tells it.
        if "exit_code" in vars(kind):
            table[kind.exit_code] = (kind.__doc__ or "").splitlines()[0].rstrip(".")
    table[errors.QmpnbdError.exit_code] = "a fault of qmpnbd itself"
    return dict(sorted(table.items()))


def _tree(kind: type[errors.QmpnbdError]) -> Iterator[type[errors.QmpnbdError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


def exit_code_help() -> str:
    """Returns the table as lines for ``--help``."""
    return "exit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in exit_codes().items())
