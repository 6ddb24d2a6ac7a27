"""An export of an NBD server that is overwritten, over as many connections as it bears.

An export cannot be hidden until it is whole, nor be made anew: so one that holds data is overwritten only where that
was asked for, and what of it failed half-way is told as such.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from queue import SimpleQueue
from typing import Final, Self

import numpy as np

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    NbdContextError,
    NbdDisconnectedError,
    NbdError,
    NbdRequestError,
    NbdUnsupportedError,
    TargetError,
    TargetInUseError,
)
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import BASE_ALLOCATION, TransmissionFlag, WireError
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri

CONNECTIONS: Final = 4
"""To a server that keeps them coherent: enough to have a write under way while others are answered."""

_ZEROES: Final = memoryview(bytes(1 << 20))
_READS_AS_ZEROES: Final = np.uint64(2)  # NBD_STATE_ZERO
_LITTLE: Final = 1 << 20  # bytes: qemu-img allocates some of a new file
_HALF: Final = "What is in the export now is of no use: copy again."


class NbdTarget:
    """A writable export. Make it with `connect`."""

    def __init__(self, clients: list[Client], uri: str, deadline: Deadline, *, is_blank: bool) -> None:
        self.read_from = uri
        self._clients = clients
        self._deadline = deadline
        self._is_blank = is_blank
        self._free: SimpleQueue[Client] = SimpleQueue()
        for client in clients:
            self._free.put(client)
        self._block = clients[0].export.minimum_block
        self._edges = threading.Lock()
        self._can_zero = bool(clients[0].export.flags & TransmissionFlag.SEND_WRITE_ZEROES)
        self.where = clients[0].where
        self.lanes = len(clients)

    @classmethod
    def connect(
        cls,
        uri: str | NbdUri,
        size: int,
        *,
        deadline: Deadline,
        tls: Tls | None = None,
        force: bool = False,
        connections: int = CONNECTIONS,
    ) -> Self:
        """Connects to an export that is to be overwritten.

        Args:
            uri: where it is.
            size: bytes of the disk; the export may have more, which are left alone.
            deadline: for all that is done with it.
            tls: how to encrypt, completed by what the URI says.
            force: whether it may be overwritten although it holds data.
            connections: at most; one where the server does not keep several coherent.

        Raises:
            UsageError: the URI cannot be right.
            TargetError: it is read-only, or too small.
            TargetInUseError: it holds data, or the server does not tell, and `force` was not given.
            NbdError: no connection, or none to this export.
            DeadlineError: the time is over.
        """
        further = partial(Client.connect, uri, deadline=deadline, tls=tls)
        with contextlib.ExitStack() as opened:
            try:
                first = opened.enter_context(further(contexts=[BASE_ALLOCATION]))
            except (NbdContextError, NbdUnsupportedError):
                first = opened.enter_context(further())
            _check(first, size)
            is_blank = _reads_as_zeroes(first, size, deadline)
            if not is_blank and not force:
                what = "it holds data, or its server does not tell, and all that is there would be lost"
                raise TargetInUseError(what, where=first.where, remedy="Say that it may be overwritten (--force).")
            wanted = connections if first.export.flags & TransmissionFlag.CAN_MULTI_CONN else 1
            clients = [first]
            for _ in range(wanted - 1):
                clients.append(opened.enter_context(further()))
            opened.pop_all()
        return cls(clients, str(uri), deadline, is_blank=is_blank)

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes of the disk; see `Target.write`.

        Raises:
            TargetError: the export is full, gone, or broken.
            DeadlineError: the time is over.
        """
        with self._client(f"cannot be written at byte {offset:#x}") as client:
            self._write(client, offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Has bytes of the disk read as zeroes; see `Target.zero`, and `write` for what is raised."""
        if self._is_blank:
            return
        with self._client(f"cannot be zeroed at byte {offset:#x}") as client:
            end = offset + length
            first = min(-(-offset // self._block) * self._block, end)
            last = max(end // self._block * self._block, first)
            if self._can_zero and first < last:
                self._fill(client, offset, first)
                client.write_zeroes(first, last - first, deadline=self._deadline)
                self._fill(client, last, end)
            else:
                self._fill(client, offset, end)

    def _fill(self, client: Client, offset: int, end: int) -> None:
        while offset < end:
            zeroes = _ZEROES[: end - offset]
            self._write(client, offset, zeroes)
            offset += len(zeroes)

    def _write(self, client: Client, offset: int, data: memoryview) -> None:
        """Writes whole blocks, and blocks at the edges completed by what is there, one thread at a time."""
        end = offset + len(data)
        first = min(-(-offset // self._block) * self._block, end)
        last = max(end // self._block * self._block, first)
        for low, high in ((offset, first), (last, end)):
            if low < high:
                with self._edges:
                    start = low // self._block * self._block
                    block = client.read(start, self._block, deadline=self._deadline)
                    block[low - start : high - start] = data[low - offset : high - offset]
                    client.write(start, block, deadline=self._deadline)
        if first < last:
            client.write(first, data[first - offset : last - offset], deadline=self._deadline)

    def settle(self) -> None:
        """Has the server make durable what was written, on every connection; see `Target.settle`.

        Raises:
            TargetError: it could not, or knows no way to.
        """
        for client in self._clients:
            with self._told("cannot be made durable"):
                if client.export.flags & TransmissionFlag.SEND_FLUSH:
                    client.flush(self._deadline)

    def finish(self) -> None:
        """Settles the export and takes leave; see `Target.finish`."""
        self.settle()
        self.discard()

    def discard(self) -> None:
        """Takes leave; what was overwritten cannot be brought back."""
        for client in self._clients:
            client.close()

    @contextlib.contextmanager
    def _client(self, what: str) -> Iterator[Client]:
        client = self._free.get()
        try:
            with self._told(what):
                yield client
        finally:
            self._free.put(client)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Has failures of the server told as failures of the target."""
        try:
            yield
        except NbdRequestError as error:
            full = error.wire_error == WireError.ENOSPC
            remedy = f"Make room where the server keeps it. {_HALF}" if full else _HALF
            raise TargetError(f"{what}: {error.what}", where=self.where, remedy=remedy) from error
        except NbdDisconnectedError as error:
            raise TargetError(f"{what}: its server is gone ({error.what})", where=self.where, remedy=_HALF) from error
        except NbdError as error:
            raise TargetError(f"{what}: {error.what}", where=self.where, remedy=_HALF) from error


def _check(client: Client, size: int) -> None:
    if client.export.flags & TransmissionFlag.READ_ONLY:
        raise TargetError("the export is read-only", where=client.where, remedy="Have it exported writable.")
    if client.export.size < size:
        what = f"the export has {client.export.size} bytes, and the disk {size}"
        raise TargetError(what, where=client.where, remedy="Choose one that is large enough.")


def _reads_as_zeroes(client: Client, size: int, deadline: Deadline) -> bool:
    """Returns whether there is nothing to be lost: what the server does not tell to be zero is little, and is."""
    if BASE_ALLOCATION not in client.export.contexts:
        return False
    flags = client.maps(0, size, deadline=deadline)[BASE_ALLOCATION]
    held = flags.mapped(lambda each: each & _READS_AS_ZEROES == 0)
    if held.totals().get(1, 0) > _LITTLE:
        return False
    data = ((each.offset, each.length) for each in held if each.value)
    return not any(np.frombuffer(found, np.uint8).any() for _, found in client.chunks(data, deadline=deadline))
