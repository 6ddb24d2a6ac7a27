"""A seam between a client and a real monitor at which something happens before chosen commands.

What lies between two commands of a client is where a guest's write gets lost, if it does. Here it is made to lie there.
File descriptors that a client passes along (`getfd`) are passed on.
"""

from __future__ import annotations

import array
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Before = Callable[[Mapping[str, Any]], None]
ASKING = ("query-", "x-debug-query-", "qom-list", "qom-get")


class CutError(Exception):
    """Raised by what happens before a command, to end the connection instead."""


class Between:
    """What passed.

    Attributes:
        commands: the names of the commands so far, without those that only ask.
        fault: what went wrong in the seam itself, for the test to raise.
    """

    def __init__(self, before: Before) -> None:
        self.commands: list[str] = []
        self.fault: BaseException | None = None
        self._before = before

    def serve(self, client: socket.socket, monitor: socket.socket) -> None:
        """Hands commands and replies to and fro until one side ends."""
        replies = threading.Thread(target=self._replies, args=(monitor, client))
        replies.start()
        try:
            self._commands(client, monitor)
        except CutError:
            pass
        except (OSError, AssertionError) as error:
            self.fault = error
        finally:
            for sock in (client, monitor):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            replies.join()

    def _commands(self, client: socket.socket, monitor: socket.socket) -> None:
        decoder, text = json.JSONDecoder(), ""
        while True:
            data, passed = _receive(client)
            if not data:
                return
            text += data.decode()
            while text.strip():
                try:
                    command, end = decoder.raw_decode(text := text.lstrip())
                except ValueError:
                    break
                line, text = text[:end], text[end:]
                if not command["execute"].startswith(ASKING):
                    self._before(command)
                    self.commands.append(command["execute"])
                with passed:
                    _send(monitor, line.encode() + b"\n", passed)

    def _replies(self, monitor: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := monitor.recv(1 << 16):
                client.sendall(data)


class _Passed:
    """Descriptors that came with data and go on with it, once."""

    def __init__(self, descriptors: array.array[int]) -> None:
        self.descriptors = descriptors

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors:
            socket.close(descriptor)
        self.descriptors = array.array("i")


def _receive(sock: socket.socket) -> tuple[bytes, _Passed]:
    try:
        data, descriptors, _, _ = socket.recv_fds(sock, 1 << 16, 4)
    except ConnectionResetError:
        return b"", _Passed(array.array("i"))
    return data, _Passed(array.array("i", descriptors))


def _send(sock: socket.socket, data: bytes, passed: _Passed) -> None:
    if passed.descriptors:
        socket.send_fds(sock, [data], passed.descriptors)
    else:
        sock.sendall(data)


@contextlib.contextmanager
def between(qmp: Path, before: Before) -> Iterator[tuple[str, Between]]:
    """Yields an address for clients of the monitor `qmp`, one after the other, and what passed.

    Args:
        qmp: the monitor's own socket.
        before: called with each command that changes something, before it is passed on. It may write to the guest's
            disks; a `CutError` from it ends the connection.
    """
    path = qmp.with_name("between")
    seam = Between(before)
    ending = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            while True:
                client, _ = listener.accept()
                if ending.is_set():
                    client.close()
                    return
                with client, socket.socket(socket.AF_UNIX) as monitor:
                    monitor.connect(str(qmp))
                    seam.serve(client, monitor)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(path), seam
        finally:
            ending.set()
            with socket.socket(socket.AF_UNIX) as waker:
                waker.connect(str(path))
            thread.join(20)
            path.unlink()
            assert not thread.is_alive()
    if seam.fault is not None:
        raise seam.fault
