"""What a copy is read from: an export of an NBD server, or an image with its backing chain.

::

    content()   which bytes hold data, which read as zeroes     base:allocation | what the images say
    chunks()    the data of many ranges, in whatever order      pipelined reads | preadv

Both kinds look the same to the copy, so that what is read from where is nobody's business but this module's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self

import numpy as np

from qmpnbd.backup.closes import Closes
from qmpnbd.backup.content import DATA, ZERO
from qmpnbd.backup.locks import is_written_to
from qmpnbd.backup.reads import REQUEST, Buffers, assembled, side_by_side
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageChangedError, NbdContextError, NbdUnsupportedError
from qmpnbd.extents import U64, ExtentMap
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import BASE_ALLOCATION, TransmissionFlag
from qmpnbd.nbd.ranges import aligned_range, longest_payload
from qmpnbd.nbd.reconnect import Reconnect
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri, is_nbd_uri
from qmpnbd.printable import printable

if TYPE_CHECKING:
    from qmpnbd.images.layers import Chain

_READS_AS_ZEROES: Final = np.uint64(2)  # NBD_STATE_ZERO


class Source(Protocol):
    """Where the bytes of a copy come from; a context manager."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        ...

    @property
    def where(self) -> str:
        """Server and export, or file; printable."""
        ...

    def content(self, deadline: Deadline) -> ExtentMap:
        """Reads which bytes hold data (`DATA`) and which read as zeroes (`ZERO`), over the whole disk."""
        ...

    def chunks(
        self, ranges: Iterable[tuple[int, int]], deadline: Deadline, buffers: Buffers | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """Reads ranges of up to a piece (1 MiB) each.

        Args:
            ranges: offset and length of each; asked for one after the other.
            deadline: how long it may take, with what the caller does in between.
            buffers: where buffers are taken from; the caller gives each back. None to have them reused.

        Yields:
            Offset and data of a range, each as one chunk, in any order. Without `buffers` the data is good until the
            next chunk is asked for.
        """
        ...

    def close(self) -> None:
        """Closes it; may be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NbdSource(Closes):
    """An export of an NBD server. Make it with `connect`."""

    def __init__(self, clients: Sequence[Client], *, tells_zeroes: bool) -> None:
        self._clients = clients
        self._client = client = clients[0]
        self._tells_zeroes = tells_zeroes
        self.size = client.export.size
        self.where = client.where

    @classmethod
    def connect(
        cls,
        uri: str | NbdUri,
        *,
        deadline: Deadline,
        tls: Tls | None = None,
        reconnect: Reconnect | None = None,
        connections: int = 1,
    ) -> Self:
        """Connects.

        Args:
            uri: where the export is.
            deadline: how long it may take.
            tls: how to encrypt, completed by what the URI says.
            reconnect: how to go on after the connection was lost; None to tell the loss.
            connections: at most; one where the server does not keep several coherent.

        Raises:
            UsageError: the URI cannot be right.
            NbdError: no connection, or none to this export.
            DeadlineError: the time is over.
        """
        further = partial(Client.connect, uri, deadline=deadline, tls=tls, reconnect=reconnect)
        with ExitStack() as opened:
            try:
                clients = [opened.enter_context(further(contexts=[BASE_ALLOCATION]))]
            except (NbdContextError, NbdUnsupportedError):  # an old or a simple server: all of it may be data
                clients = [opened.enter_context(further())]
            if clients[0].export.flags & TransmissionFlag.CAN_MULTI_CONN:
                clients += [opened.enter_context(further()) for _ in range(connections - 1)]
            opened.pop_all()
        return cls(clients, tells_zeroes=BASE_ALLOCATION in clients[0].export.contexts)

    def content(self, deadline: Deadline) -> ExtentMap:
        """Reads ``base:allocation``; where the server does not tell, all is data.

        Raises:
            NbdError: it cannot be read.
            DeadlineError: the time is over.
        """
        if not self._tells_zeroes:
            return ExtentMap.uniform(self.size, DATA)
        return self._client.maps(deadline=deadline)[BASE_ALLOCATION].mapped(_zero_or_data)

    def chunks(
        self, ranges: Iterable[tuple[int, int]], deadline: Deadline, buffers: Buffers | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """Reads ranges, several requests in flight; see `Source.chunks`.

        Raises:
            UsageError: a range outside the export.
            NbdError: some of it cannot be read.
            DeadlineError: the time is over.
        """
        export = self._client.export
        if longest_payload(export) < REQUEST or export.minimum_block > 1:
            return self._one_by_one(ranges, deadline, buffers or Buffers())
        if len(self._clients) == 1:
            return assembled(self._client, ranges, deadline, buffers)
        return side_by_side(self._clients, ranges, deadline, buffers)

    def _one_by_one(
        self, ranges: Iterable[tuple[int, int]], deadline: Deadline, buffers: Buffers
    ) -> Iterator[tuple[int, memoryview]]:
        """Reads ranges that are not made of the export's blocks, or that do not fit into one request."""
        for offset, length in ranges:
            start, end = aligned_range(self._client.export, offset, length, self.where)
            view = buffers.take(length)
            if (start, end) == (offset, offset + length):
                self._client.read_into(offset, view, deadline=deadline)
            else:
                view[:] = self._client.read(start, end - start, deadline=deadline)[offset - start :][:length]
            yield offset, view

    def close(self) -> None:
        """Takes leave of the server; never fails, may be called twice."""
        for client in self._clients:
            client.close()


class ImageSource(Closes):
    """An image with everything behind it. Make it with `open`, or of a chain that is open already."""

    def __init__(self, chain: Chain, where: str) -> None:
        self._chain = chain
        self.size = chain.size
        self.where = where

    @classmethod
    def open(cls, path: str, *, format: str | None = None, deadline: Deadline) -> Self:  # noqa: A002 (QEMU's word)
        """Opens an image and its backing chain, as the names in the headers say.

        Args:
            path: the active layer.
            format: its format; None to guess it from the content.
            deadline: for opening, and for all that is read later.

        Raises:
            ImageError: the branch says what is wrong with which file.
            DeadlineError: the time is over.
        """
        from qmpnbd.images.files import open_chain  # noqa: PLC0415 - takes as long to load as a GiB to copy

        return cls(open_chain(path, format=format, deadline=deadline), printable(path))

    def content(self, deadline: Deadline) -> ExtentMap:
        """Computes from the images which bytes hold data; holes of the file system count as zeroes.

        Raises:
            ImageError: the branch says what is wrong with which file.
            DeadlineError: the time is over.
        """
        deadline.check("the map of the image", self.where)
        return self._chain.base_allocation().mapped(_zero_or_data)

    def chunks(
        self, ranges: Iterable[tuple[int, int]], deadline: Deadline, buffers: Buffers | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """Reads ranges one after the other; see `Source.chunks`.

        Raises:
            UsageError: a range outside the disk.
            ImageError: the branch says what is wrong with which file.
            DeadlineError: the time is over.
        """
        pool = Buffers() if buffers is None else buffers
        for offset, length in ranges:
            deadline.check("the content of the image", self.where)
            view = pool.take(length)
            self._chain.read_into(offset, view)
            yield offset, view
            if buffers is None:
                pool.give_back(view)

    def require_unwritten(self) -> None:
        """Returns if no QEMU has a layer open for writing: what is read of one is from many moments.

        Raises:
            ImageChangedError: one has.
        """
        for layer in self._chain.layers:
            if is_written_to(layer.path):
                remedy = "Copy from an export of its disk: qmpnbd export --point-in-time makes one."
                what = "a running QEMU writes to it, and a copy would be of no one moment"
                raise ImageChangedError(what, where=printable(layer.path), remedy=remedy)

    def identity(self) -> str:
        """Returns what tells these files, as they are now, from others and from what they were before a write.

        Numbers of devices are no part of it: some are others after a restart.

        Returns:
            Numbers, sizes and times of change; empty if a block device is among them, which has no such time.

        Raises:
            ImageError: a file cannot be looked at.
        """
        files = [file for member in self._chain.members for file in (member.file, member.data)]
        if any(file.identity[0] == "device" for file in files):
            return ""
        return " ".join(f"{each.st_ino}:{each.st_size}:{each.st_mtime_ns}" for each in (f.status() for f in files))

    def close(self) -> None:
        """Closes the files; may be called twice."""
        self._chain.close()


def _zero_or_data(flags: U64) -> U64:
    """Returns the content of what has these flags of ``base:allocation``."""
    return np.where(flags & _READS_AS_ZEROES != 0, np.uint64(ZERO), np.uint64(DATA))


def open_source(
    text: str,
    *,
    format: str | None = None,  # noqa: A002 (QEMU's word)
    deadline: Deadline,
    tls: Tls | None = None,
    connections: int = 1,
) -> Source:
    """Opens what a user named.

    Args:
        text: an NBD URI, or the path of an image.
        format: of an image; None to guess it from the content.
        deadline: for opening, and for all that is read from an image later.
        tls: how to encrypt, completed by what the URI says.
        connections: to an NBD server that keeps several coherent, at most.

    Raises:
        UsageError: the URI cannot be right.
        NbdError: no connection.
        ImageError: the branch says what is wrong with which file.
        ImageChangedError: a QEMU is writing to the image.
        DeadlineError: the time is over.
    """
    if is_nbd_uri(text):
        return NbdSource.connect(text, deadline=deadline, tls=tls, connections=connections)
    source = ImageSource.open(text, format=format, deadline=deadline)
    try:
        source.require_unwritten()
    except BaseException:
        source.close()
        raise
    return source
