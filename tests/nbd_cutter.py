"""A seam between NBD clients and a server that ends a connection after some bytes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path


class _Seam:
    def __init__(self, server: Path, most: int) -> None:
        self._server, self._left = server, most
        self._lock = threading.Lock()

    def relay(self, client: socket.socket) -> None:
        """Hands bytes to and fro until there were too many from the server."""
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(str(self._server))
            forth = threading.Thread(target=self._forward, args=(client, server))
            forth.start()
            with contextlib.suppress(OSError):
                while (data := server.recv(1 << 16)) and self._may(len(data)):
                    client.sendall(data)
            for sock in (client, server):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            forth.join()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _may(self, count: int) -> bool:
        with self._lock:
            self._left -= count
            return self._left > 0


@contextlib.contextmanager
def cutting_after(server: Path, most: int) -> Iterator[Path]:
    """Yields the socket of a server whose connections all end once it has sent some bytes over them together.

    Args:
        server: the socket of the real one.
        most: bytes.
    """
    path = server.with_name("cut.sock")
    seam, threads = _Seam(server, most), []
    ending = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)

        def serve() -> None:
            while True:
                client, _ = listener.accept()
                if ending.is_set():
                    client.close()
                    return
                threads.append(threading.Thread(target=seam.relay, args=(client,)))
                threads[-1].start()

        acceptor = threading.Thread(target=serve)
        acceptor.start()
        try:
            yield path
        finally:
            ending.set()
            with socket.socket(socket.AF_UNIX) as waker:
                waker.connect(str(path))
            for thread in (acceptor, *threads):
                thread.join(20)
                assert not thread.is_alive()
            path.unlink()
