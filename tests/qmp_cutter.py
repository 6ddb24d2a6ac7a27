"""A seam between a client and a real monitor that fails the N-th command, in each of the ways a command can fail."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Failure = Literal["refused", "lost", "done and lost"]
FAILURES: tuple[Failure, ...] = ("refused", "lost", "done and lost")
"""QEMU says no; the connection ends before QEMU hears; QEMU does it, but the connection ends before it says so."""


class Cutter:
    """Counts commands and fails one.

    Attributes:
        commands: the names of the commands so far.
        happened: whether the failure took place.
    """

    def __init__(self, number: int, failure: Failure) -> None:
        self.commands: list[str] = []
        self.happened = False
        self._number = number
        self._failure = failure
        self._swallows = False
        self._reply_swallowed = threading.Event()

    def serve(self, client: socket.socket, monitor: socket.socket) -> None:
        """Hands commands and replies to and fro, until one side ends or the failure takes place."""
        replies = threading.Thread(target=self._replies, args=(monitor, client))
        replies.start()
        try:
            self._commands(client, monitor)
        finally:
            for sock in (client, monitor):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            replies.join()

    def _commands(self, client: socket.socket, monitor: socket.socket) -> None:
        decoder, text = json.JSONDecoder(), ""
        while data := client.recv(1 << 16):
            text += data.decode()
            while text.strip():
                try:
                    command, end = decoder.raw_decode(text := text.lstrip())
                except ValueError:
                    break
                line, text = text[:end], text[end:]
                self.commands.append(command["execute"])
                if len(self.commands) != self._number:
                    monitor.sendall(line.encode() + b"\n")
                    continue
                self.happened = True
                if self._failure == "refused":
                    error = {"class": "GenericError", "desc": "cut by the test"}
                    client.sendall(json.dumps({"error": error, "id": command.get("id")}).encode() + b"\r\n")
                    continue
                if self._failure == "done and lost":
                    self._swallows = True
                    monitor.sendall(line.encode() + b"\n")
                    assert self._reply_swallowed.wait(20)
                return

    def _replies(self, monitor: socket.socket, client: socket.socket) -> None:
        with monitor.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                if not self._swallows:
                    client.sendall(line)
                elif "event" not in json.loads(line):
                    self._reply_swallowed.set()


@contextlib.contextmanager
def cutting(qmp: Path, number: int, failure: Failure) -> Iterator[tuple[str, Cutter]]:
    """Yields an address for one client of the monitor `qmp`, whose command `number` (from 1) fails."""
    path = qmp.with_name("cut")
    cutter = Cutter(number, failure)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(20)

        def serve() -> None:
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                with client, socket.socket(socket.AF_UNIX) as monitor:
                    monitor.connect(str(qmp))
                    cutter.serve(client, monitor)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(path), cutter
        finally:
            thread.join(20)
            path.unlink()
            assert not thread.is_alive()
