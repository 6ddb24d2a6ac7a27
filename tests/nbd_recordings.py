"""Sessions with real servers, byte by byte: recorded once, played again to programs and to doors, whole or damaged.

``python -m tests.nbd_recordings`` records them anew, with the servers that are installed, into nbd_recordings.json. A
session is what the server said, in turns, each with how much the client had said before it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from qmpnbd.errors import NbdDisconnectedError
from qmpnbd.nbd import commands, transfer
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.export import Export, Replies
from qmpnbd.nbd.handshake import handshake
from qmpnbd.nbd.requests import Job
from qmpnbd.nbd.survey import Survey
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.nbd.wire import Program, Receive
from tests.hostile_nbd import BASE, DEPTH, pattern
from tests.nbd_doors import Step, blocking
from tests.nbd_servers import nbdkit, qemu_nbd
from tests.servers import new_qemu_nbd, qemu_img, qemu_io, short_folder

FILE: Final = Path(__file__).with_name("nbd_recordings.json")
SIZE: Final = 64 << 10
READS: Final[list[Step]] = [
    ("read", 0, 700),
    ("chunks", [[0, 1024], [16384, 1024], [40960, 100]], {"size": 512, "in_flight": 4}),
    ("read", 20000, 1000),
]
MAPS: Final[list[Step]] = ["maps", ("block_status", 0, 8192), ("maps", 5000, 20000)]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Recording:
    """One session.

    Attributes:
        name: what was recorded.
        contexts: the metadata contexts asked for.
        best: the form of replies not to be exceeded.
        steps: the calls made.
        turns: bytes the client had sent before, and what the server said then.
    """

    name: str
    contexts: tuple[str, ...]
    best: Replies
    steps: tuple[Step, ...]
    turns: tuple[tuple[int, bytes], ...]

    @property
    def said(self) -> bytes:
        """All that the server said."""
        return b"".join(data for _, data in self.turns)


def load() -> list[Recording]:
    """Returns the recordings."""
    return [
        Recording(
            each["name"],
            tuple(each["contexts"]),
            each["best"],
            tuple(step if isinstance(step, str) else tuple(step) for step in each["steps"]),
            tuple((before, base64.b85decode(data)) for before, data in each["turns"]),
        )
        for each in json.loads(FILE.read_text())
    ]


def save(recordings: Sequence[Recording]) -> None:
    """Writes the recordings."""
    told = [
        vars(each) | {"turns": [(before, base64.b85encode(data).decode()) for before, data in each.turns]}
        for each in recordings
    ]
    FILE.write_text(json.dumps(told, indent=1) + "\n")


# Playing to programs.


def begin(recording: Recording, said: bytearray, most: int) -> Export:
    """Runs the handshake with what a server said, and takes that away from it."""
    program: Program[Export] = handshake("", recording.contexts, "here", best=recording.best)
    try:
        operation = next(program)
        while True:
            if not isinstance(operation, Receive):
                operation = program.send(b"")
                continue
            assert 0 < operation.count <= most, f"{operation.count} bytes wanted at once"
            if operation.count > len(said):
                operation = program.throw(NbdDisconnectedError("the end", where="here"))
                continue
            taken = said[: operation.count]
            del said[: operation.count]
            operation = program.send(taken)
    except StopIteration as stop:
        export: Export = stop.value
        return export


def job(connection: Connection, step: Step, fill: int) -> tuple[Job[Any], bytearray]:
    """Returns the program of a call, and the buffer of a read, full of `fill`."""
    name, *arguments = (step,) if isinstance(step, str) else step
    named = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    export, buffer = connection.export, bytearray()
    if name == "read":
        offset, length = arguments
        buffer = bytearray([fill]) * length
        return transfer.Reading(export, "here", offset, memoryview(buffer)).run(connection), buffer
    if name == "chunks":
        return transfer.Chunks(export, "here", arguments[0], **named).run(connection), buffer
    if name == "maps":
        return Survey(export, "here", *arguments).run(connection), buffer
    if name == "block_status":
        return Survey(export, "here", *arguments).once(connection, one=False), buffer
    return commands.flush(connection), buffer


# Playing to doors.


def in_turns(recording: Recording, said: bytes) -> list[tuple[int, bytes]]:
    """Returns bytes in as many turns as a session had, each as long as it was there; the last one has the rest."""
    turns, at = [], 0
    for before, data in recording.turns[:-1]:
        turns.append((before, said[at : at + len(data)]))
        at += len(data)
    return [*turns, (recording.turns[-1][0], said[at:])]


class Player:
    """A server that says the turns of a recording to whoever connects, each when the client has said enough."""

    IMPATIENCE: Final = 0.02
    """Seconds after which a turn comes anyway: a client that was told something else may say less."""

    def __init__(self, folder: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "p"))
        self._listener.listen()
        self.uri = NbdUri.unix(str(folder / "p"))

    def play(self, turns: Sequence[tuple[int, bytes]]) -> threading.Thread:
        """Has the next client served; the thread ends when it has left."""
        thread = threading.Thread(target=self._serve, args=(turns,), daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Closes the listener."""
        self._listener.close()

    def _serve(self, turns: Sequence[tuple[int, bytes]]) -> None:
        client, _ = self._listener.accept()
        client.settimeout(20)
        heard = 0
        with client, contextlib.suppress(OSError):
            for before, data in turns:
                while heard < before and select.select([client], [], [], self.IMPATIENCE)[0]:
                    got = len(client.recv(65536))
                    if not got:
                        return
                    heard += got
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass


# Recording.


class _Recorder:
    """Stands between one client and a server, and writes down what the server says."""

    def __init__(self, folder: Path, server: NbdUri) -> None:
        self._server = server
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "r"))
        self._listener.listen()
        self.uri = replace(server, path=str(folder / "r"))
        self.turns: list[tuple[int, bytes]] = []

    def run(self) -> None:
        heard = 0
        with self._listener, self._listener.accept()[0] as client, socket.socket(socket.AF_UNIX) as server:
            server.connect(self._server.path)
            while True:
                ready, _, _ = select.select([client, server], [], [], 20)
                # What the client says is counted first: the server cannot have answered what it was not given yet.
                if client in ready:
                    if not (data := client.recv(65536)):
                        return
                    heard += len(data)
                    server.sendall(data)
                elif server in ready:
                    if not (data := server.recv(65536)):
                        return
                    self.turns.append((heard, data))
                    client.sendall(data)


def record(
    name: str, server: NbdUri, steps: Sequence[Step], contexts: Sequence[str] = (), best: Replies = "extended"
) -> tuple[Recording, list[Any]]:
    """Makes calls to a real server and returns the session, with their outcomes."""
    with short_folder() as folder:
        recorder = _Recorder(folder, server)
        thread = threading.Thread(target=recorder.run, daemon=True)
        thread.start()
        outcomes = blocking(recorder.uri, *steps, contexts=contexts, best=best)
        thread.join(20)
    assert not thread.is_alive(), "the recorder does not end"
    # Pieces that came one behind the other are one turn.
    turns: list[tuple[int, bytes]] = []
    for before, data in recorder.turns:
        if turns and turns[-1][0] == before:
            turns[-1] = (before, turns[-1][1] + data)
        else:
            turns.append((before, data))
    return Recording(name, tuple(contexts), best, tuple(steps), tuple(turns)), outcomes


def chain(folder: Path) -> Path:
    """Makes two layers that hold `pattern` in some parts and zeroes in others."""
    (folder / "base").write_bytes(pattern(0, 16384) + bytes(16384) + pattern(32768, 16384))
    top = folder / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "-b", "base", "-F", "raw", top, str(SIZE))
    qemu_io(top, "write -q -P 7 8k 8k", "write -q -z 20k 4k", "write -q -P 9 40k 4k")
    return top


def everything() -> Iterator[tuple[Recording, list[Any]]]:
    """Records every session, and yields it with the outcomes of its calls."""
    both = [DEPTH, BASE]
    with short_folder() as folder:
        image = str(chain(folder))
        with qemu_nbd(folder, "-r", "-A", "-f", "qcow2", image) as uri:
            yield record("qemu-nbd, structured", uri, [*MAPS, *READS, "flush"], both, "structured")
            yield record("qemu-nbd, simple", uri, [*READS, "flush"], best="simple")
        with qemu_nbd(folder, "-r", "-A", "-f", "qcow2", image, program=new_qemu_nbd()) as uri:
            yield record("qemu-nbd, extended", uri, [*MAPS, *READS, "flush"], both)
        broken = "driver=blkdebug,inject-error.0.event=none,inject-error.0.iotype=block-status,inject-error.0.once=on"
        broken += f",inject-error.0.errno=5,image.driver=qcow2,image.file.filename={image}"
        with qemu_nbd(folder, "-r", "-A", "--image-opts", broken) as uri:
            yield record("qemu-nbd, an error and late chunks", uri, ["maps", *MAPS, *READS], both, "structured")
        data = ["data", "1 @9000 2 3 @20100 4 @40970 5", f"size={SIZE}"]
        with nbdkit(folder, *data) as uri:
            yield record("nbdkit, structured", uri, [*MAPS, *READS, "flush"], [BASE])
        with nbdkit(folder, "--no-sr", *data) as uri:
            yield record("nbdkit, simple", uri, [*READS, "flush"])
        with nbdkit(folder, "--filter=error", *data, "error-pread=EIO", "error-pread-rate=50%") as uri:
            yield record("nbdkit, errors", uri, [*MAPS, *READS, *READS], [BASE])


if __name__ == "__main__":
    save([recording for recording, _ in everything()])
