"""Commands without data: each is checked against what the export offers before anything is sent."""

from __future__ import annotations

from collections import deque

from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.constants import Command, CommandFlag, TransmissionFlag
from qmpnbd.nbd.ranges import check_range, longest_effect, longest_payload, pieces
from qmpnbd.nbd.requests import Due, Job, Request, Wait
from qmpnbd.nbd.transfer import IN_FLIGHT, fua_flag, require_flag, require_writable
from qmpnbd.nbd.wire import Send


def flush(connection: Connection) -> Job[None]:
    """Has everything written so far made durable ("NBD_CMD_FLUSH").

    Raises:
        NbdUnsupportedError: the export does not offer it.
        NbdRequestError: it failed at the server.
    """
    require_flag(connection.export, TransmissionFlag.SEND_FLUSH, "flush", connection.where)
    return (yield from connection.call(Command.FLUSH))


def trim(connection: Connection, offset: int, length: int, *, fua: bool) -> Job[None]:
    """Tells that a range is not needed any more ("NBD_CMD_TRIM").

    Raises:
        UsageError: a range that does not do.
        NbdUnsupportedError: the export does not offer it, or is read-only.
        NbdRequestError: it failed at the server.
    """
    export, where = connection.export, connection.where
    require_writable(export, where)
    require_flag(export, TransmissionFlag.SEND_TRIM, "trim", where)
    flags = fua_flag(export, where) if fua else 0
    yield from _over(connection, Command.TRIM, offset, length, longest=longest_effect(export), flags=flags)


def write_zeroes(
    connection: Connection, offset: int, length: int, *, no_hole: bool, fast: bool, fua: bool
) -> Job[None]:
    """Has a range read as zeroes ("NBD_CMD_WRITE_ZEROES").

    Raises:
        UsageError: a range that does not do.
        NbdUnsupportedError: the export does not offer it, not like this, or is read-only.
        NbdRequestError: it failed at the server; ENOTSUP where it was to be fast and is not.
    """
    export, where = connection.export, connection.where
    require_writable(export, where)
    require_flag(export, TransmissionFlag.SEND_WRITE_ZEROES, "writing of zeroes", where)
    flags = fua_flag(export, where) if fua else 0
    if fast:
        require_flag(export, TransmissionFlag.SEND_FAST_ZERO, "fast writing of zeroes", where)
        flags |= CommandFlag.FAST_ZERO
    if no_hole:
        flags |= CommandFlag.NO_HOLE
    yield from _over(connection, Command.WRITE_ZEROES, offset, length, longest=longest_effect(export), flags=flags)


def cache(connection: Connection, offset: int, length: int) -> Job[None]:
    """Tells that a range will be read soon ("NBD_CMD_CACHE").

    Raises:
        UsageError: a range that does not do.
        NbdUnsupportedError: the export does not offer it.
        NbdRequestError: it failed at the server.
    """
    export = connection.export
    require_flag(export, TransmissionFlag.SEND_CACHE, "cache", connection.where)
    # Though no payload is sent, the server may treat it like a read of that length, as QEMU does.
    yield from _over(connection, Command.CACHE, offset, length, longest=longest_payload(export))


def _over(
    connection: Connection, command: Command, offset: int, length: int, *, longest: int, flags: int = 0
) -> Job[None]:
    """Does one thing to a range, in several requests where one is not enough; returns when all are answered."""
    check_range(connection.export, offset, length, connection.where)
    todo = deque(pieces(offset, length, longest))
    failed: list[Request] = []
    with connection.batch() as batch:
        while (todo and not failed) or batch.pending:
            headers = []
            while todo and not failed and len(batch.pending) < IN_FLIGHT:
                headers.append(connection.submit(batch, command, *todo.popleft(), flags=flags))
            if headers:
                yield Send(b"".join(headers))
            yield Wait(batch, Due(batch.pending))
            failed.extend(request for request in batch.finished if request.failure is not None)
            batch.finished.clear()
    if failed:
        connection.require_success(min(failed, key=lambda request: request.offset))
