"""Copies: what arrives is what was there, from every source to every target, and what goes wrong is told."""

from __future__ import annotations

import contextlib
import hashlib
import random
import resource
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings

from qmpnbd.backup.content import ABSENT, DATA, PIECE, ZERO, aligned, pieces
from qmpnbd.backup.copy import DIGEST, CopyOptions, Progress, copy
from qmpnbd.backup.nbd_target import NbdTarget
from qmpnbd.backup.newfile import NewFile
from qmpnbd.backup.pace import Pace
from qmpnbd.backup.qcow2_target import Qcow2Target
from qmpnbd.backup.raw_target import RawTarget
from qmpnbd.backup.sources import ImageSource, NbdSource, Source, open_source
from qmpnbd.backup.targets import Target
from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    DeadlineError,
    ImageChangedError,
    NbdDisconnectedError,
    NbdRequestError,
    TargetError,
    TargetInUseError,
    UsageError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.reconnect import Reconnect
from qmpnbd.nbd.uri import NbdUri
from tests.drawn_disks import DISKS, Drawn, MemorySource
from tests.nbd_servers import nbdkit, qemu_nbd, running
from tests.servers import qemu_img, qemu_io, tool

SIZE = 24 * PIECE + 512
BLOCKS = (
    "blocksize-minimum=4096",
    "blocksize-preferred=4096",
    "blocksize-maximum=64K",
    "blocksize-error-policy=error",
)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk of an odd size, a third of it data, in runs of any length."""
    path, rng, at = tmp_path_factory.mktemp("copy") / "disk.raw", random.Random(3), 0
    with path.open("wb") as file:
        file.truncate(SIZE)
        while at < SIZE - PIECE:
            file.seek(at)
            file.write(rng.randbytes(512 * rng.randrange(1, 2000)))
            at = file.tell() + 512 * rng.randrange(1, 4000)
        file.seek(SIZE - 512)
        file.write(rng.randbytes(512))
    return path


@pytest.fixture(scope="module")
def image(disk: Path) -> Path:
    """The same as two layers of qcow2."""
    base, top = disk.with_name("base.qcow2"), disk.with_name("top.qcow2")
    qemu_img("convert", "-O", "qcow2", disk, base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    qemu_io(top, "write -P 7 1M 128k")
    qemu_img("convert", "-O", "raw", top, disk.with_name("top.raw"))
    return top


class Collecting:
    """A target that keeps what it is told, and can be slow or break on command."""

    where = "collecting"
    lanes = 1
    read_from = ""

    def __init__(self, size: int, at_write: Callable[[int], None] = lambda _: None) -> None:
        self.disk = bytearray(b"\xee" * size)
        self._at_write = at_write

    def write(self, offset: int, data: memoryview) -> None:
        self._at_write(offset)
        self.disk[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.disk[offset : offset + length] = bytes(length)

    def settle(self) -> None: ...

    def finish(self) -> None: ...

    def discard(self) -> None: ...


@given(DISKS)
@settings(max_examples=60, deadline=None)
def test_what_is_absent_is_not_touched_and_all_else_arrives(disk: Drawn) -> None:
    target = Collecting(len(disk.disk))
    done = copy(MemorySource(disk.disk, disk.content), target, disk.content, CopyOptions(hashes=True), Deadline(60))
    for each in disk.content:
        expected = b"\xee" * each.length if each.value == ABSENT else disk.disk[each.offset : each.end]
        assert target.disk[each.offset : each.end] == expected
    totals = disk.content.totals()
    assert (done.data_bytes, done.zero_bytes) == (totals.get(DATA, 0), totals.get(ZERO, 0))
    offsets, lengths = (column.tolist() for column in pieces(disk.content))
    assert done.digests is not None
    for index, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        digest = hashlib.sha256(disk.disk[offset : offset + length]).digest()
        assert done.digests[DIGEST * index : DIGEST * (index + 1)] == digest


@given(DISKS)
@settings(deadline=None)
def test_aligning_loses_no_data_and_shows_nothing_else(disk: Drawn) -> None:
    for granularity in (512, 4096, 65536):
        found = aligned(disk.content, granularity)
        assert found.size == disk.content.size
        assert all(end % granularity == 0 for end in found.ends.tolist()[:-1])
        for each in disk.content.differences(found):
            assert each.right == DATA
            # Only what shares its granule with another kind may have become data.
            for start in range(each.offset // granularity * granularity, each.end, granularity):
                whole = disk.content.clip(start, min(start + granularity, found.size))
                assert len(whole.totals()) > 1


def sources(disk: Path, image: Path, folder: Path, name: str) -> Iterator[tuple[Source, Path]]:
    deadline = Deadline(60)
    if name == "raw":
        yield ImageSource.open(str(disk), format="raw", deadline=deadline), disk
    elif name == "chain":
        yield ImageSource.open(str(image), deadline=deadline), image.with_name("top.raw")
    elif name == "nbdkit, blocks of 4096":
        filters = ("--filter=blocksize-policy", "--filter=noextents", "--filter=truncate")
        with nbdkit(folder, *filters, "file", str(disk), *BLOCKS, "round-up=4096") as uri:
            yield NbdSource.connect(uri, deadline=deadline), disk
    elif name == "nbdkit, old":
        with nbdkit(folder, "-o", "file", str(disk)) as uri:
            yield NbdSource.connect(uri, deadline=deadline), disk
    else:
        with qemu_nbd(folder, "-r", "-e", "8", "-f", "raw", str(disk)) as uri:
            yield NbdSource.connect(uri, deadline=deadline, connections=4 if "4" in name else 1), disk


NAMES = ["raw", "chain", "qemu-nbd", "qemu-nbd, 4 connections", "nbdkit, old", "nbdkit, blocks of 4096"]


@pytest.mark.real
@pytest.mark.parametrize("name", NAMES)
def test_every_source_gives_what_qemu_img_reads(
    disk: Path, image: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    for source, expected in sources(disk, image, folder, name):
        with source:
            content = source.content(Deadline(60))
            if "nbdkit" not in name:
                assert content.totals()[ZERO] > 0
            target: Target = RawTarget.create(tmp_path / "raw", source.size)
            copy(source, target, content, CopyOptions(hashes=True), Deadline(60))
            target.finish()
            target = Qcow2Target.create(tmp_path / "qcow2", content)
            copy(source, target, content, CopyOptions(), Deadline(60))
            target.finish()
        assert (tmp_path / "raw").read_bytes()[:SIZE] == expected.read_bytes()
        qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", tmp_path / "raw", tmp_path / "qcow2")
        qemu_img("check", "-q", tmp_path / "qcow2")


@pytest.mark.real
@pytest.mark.parametrize("server", ["qemu-nbd", "nbdkit", "blocks of 4096", "no zeroes"])
def test_an_export_holds_what_was_copied_to_it(disk: Path, folder: Path, tmp_path: Path, server: str) -> None:
    there = tmp_path / "there.raw"
    beyond = random.Random(2).randbytes(3584)
    there.write_bytes(random.Random(1).randbytes(SIZE) + beyond)  # to be overwritten, also where there are zeroes
    servers = {
        "qemu-nbd": qemu_nbd(folder, "-e", "8", "-f", "raw", str(there)),
        "nbdkit": nbdkit(folder, "file", str(there)),
        "blocks of 4096": nbdkit(
            folder, "--filter=blocksize-policy", "file", str(there), *BLOCKS, "blocksize-maximum=1M"
        ),
        "no zeroes": nbdkit(folder, "--filter=nozero", "file", str(there)),
    }
    deadline = Deadline(60)
    with servers[server] as uri, ImageSource.open(str(disk), format="raw", deadline=deadline) as source:
        with pytest.raises(TargetInUseError, match="it holds data"):
            NbdTarget.connect(uri, source.size, deadline=deadline)
        target = NbdTarget.connect(uri, source.size, deadline=deadline, force=True)
        copy(source, target, source.content(deadline), CopyOptions(), deadline)
        target.finish()
    assert there.read_bytes() == disk.read_bytes() + beyond


@pytest.mark.real
def test_an_export_that_cannot_hold_it_is_refused(disk: Path, folder: Path) -> None:
    with nbdkit(folder, "memory", "1M") as uri, pytest.raises(TargetError, match="has 1048576 bytes, and the disk"):
        NbdTarget.connect(uri, SIZE, deadline=Deadline(20))
    with qemu_nbd(folder, "-r", "-f", "raw", str(disk)) as uri, pytest.raises(TargetError, match="read-only"):
        NbdTarget.connect(uri, SIZE, deadline=Deadline(20), force=True)


@pytest.mark.real
def test_an_empty_export_is_written_to_without_force(folder: Path, tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "raw", tmp_path / "new.raw", "8M")  # which allocates a block of zeroes
    with qemu_nbd(folder, "-f", "raw", str(tmp_path / "new.raw")) as uri:
        NbdTarget.connect(uri, 8 * PIECE, deadline=Deadline(20)).finish()


class TestFaults:
    def test_a_file_that_may_not_grow_leaves_nothing(self, tmp_path: Path) -> None:
        content, before = ExtentMap.uniform(8 * PIECE, DATA), resource.getrlimit(resource.RLIMIT_FSIZE)
        for make in (RawTarget.create(tmp_path / "x", 2 * PIECE), Qcow2Target.create(tmp_path / "y", content)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PIECE, before[1]))
            try:
                with pytest.raises(TargetError, match="cannot write at byte"):
                    copy(MemorySource(bytes(8 * PIECE), content), make, content, CopyOptions(), Deadline(60))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            make.discard()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.real
    def test_a_full_server_is_told(self, folder: Path) -> None:
        content = ExtentMap.uniform(8 * PIECE, DATA)
        with nbdkit(folder, "full", "8M") as uri:
            target = NbdTarget.connect(uri, 8 * PIECE, deadline=Deadline(20), force=True)
            with pytest.raises(TargetError, match=r"cannot be written at byte .*Make room where the server keeps it"):
                copy(MemorySource(b"\1" * 8 * PIECE, content), target, content, CopyOptions(), Deadline(60))
            target.discard()

    @pytest.mark.real
    def test_a_server_that_dies_while_written_to_is_told(self, folder: Path) -> None:
        content, command = ExtentMap.uniform(64 * PIECE, DATA), [tool("nbdkit"), "-f", "-U", str(folder / "s")]
        with running(folder, *command, "memory", "64M") as (uri, child):
            target = NbdTarget.connect(uri, 64 * PIECE, deadline=Deadline(60), force=True)
            options = CopyOptions(progress=killing(child.kill, 9 * PIECE))
            with pytest.raises(TargetError, match="its server is gone"):
                copy(MemorySource(b"\1" * 64 * PIECE, content), target, content, options, Deadline(60))
            target.discard()

    @pytest.mark.real
    @pytest.mark.parametrize("at", [0, 1, 3, 7, 11])
    def test_a_server_that_dies_while_read_is_told_and_nothing_is_left(
        self, disk: Path, folder: Path, tmp_path: Path, at: int
    ) -> None:
        command = [tool("qemu-nbd"), "-k", str(folder / "s"), "-t", "-r", "-e", "4", "-f", "raw", str(disk)]
        with running(folder, *command) as (uri, child):
            source = NbdSource.connect(uri, deadline=Deadline(60), connections=1 + at % 2)
            content = ExtentMap.uniform(source.size, DATA)
            target = RawTarget.create(tmp_path / "x", source.size)
            with source, pytest.raises(NbdDisconnectedError):
                copy(source, target, content, CopyOptions(progress=killing(child.kill, at * PIECE)), Deadline(60))
            target.discard()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.real
    @pytest.mark.parametrize("reconnects", [True, False])
    def test_a_connection_cut_at_random_is_told_or_made_again(
        self, disk: Path, folder: Path, tmp_path: Path, reconnects: bool
    ) -> None:
        rng = random.Random(8)
        with (
            qemu_nbd(folder, "-r", "-f", "raw", str(disk)) as behind,
            cutting(folder / "cut", behind, lambda: rng.randrange(1 << 20, 6 << 20)) as uri,
        ):
            again = Reconnect(attempts=5, delay=0.0) if reconnects else None
            source = NbdSource.connect(uri, deadline=Deadline(60), reconnect=again)
            target = RawTarget.create(tmp_path / "x", source.size)
            content = ExtentMap.uniform(source.size, DATA)
            with source, contextlib.nullcontext() if reconnects else pytest.raises(NbdDisconnectedError):
                copy(source, target, content, CopyOptions(), Deadline(60))
            if reconnects:
                target.finish()
                assert (tmp_path / "x").read_bytes() == disk.read_bytes()
            target.discard()
        assert len(list(tmp_path.iterdir())) == reconnects

    @pytest.mark.real
    def test_a_sector_that_cannot_be_read_ends_the_copy(self, disk: Path, folder: Path, tmp_path: Path) -> None:
        bad = ("--filter=error", "file", str(disk), "error-pread=EIO", "error-pread-rate=20%")
        with nbdkit(folder, *bad) as uri, NbdSource.connect(uri, deadline=Deadline(60)) as source:
            target = RawTarget.create(tmp_path / "x", source.size)
            with pytest.raises(NbdRequestError):
                copy(source, target, ExtentMap.uniform(source.size, DATA), CopyOptions(), Deadline(60))
            target.discard()
        assert list(tmp_path.iterdir()) == []

    def test_a_target_that_breaks_ends_the_copy_with_its_own_error(self) -> None:
        def breaks(offset: int) -> None:
            if offset >= 3 * PIECE:
                raise TargetError("broken", where="collecting")

        content = ExtentMap.uniform(64 * PIECE, DATA)
        with pytest.raises(TargetError, match="broken"):
            copy(
                MemorySource(bytes(64 * PIECE), content),
                Collecting(64 * PIECE, breaks),
                content,
                CopyOptions(),
                Deadline(60),
            )

    def test_a_target_that_takes_nothing_more_is_waited_for_as_long_as_allowed(self) -> None:
        """The reader waits for room; the write that hangs is the target's own business, and ends here at last."""
        content, free, deadline = ExtentMap.uniform(64 * PIECE, DATA), threading.Event(), Deadline(None)
        writes = threading.Semaphore(0)

        def hang(_offset: int) -> None:
            writes.release()
            free.wait(20)

        def stop() -> None:
            writes.acquire()
            deadline.stop()
            stopped.set()

        def release() -> None:
            stopped.wait(20)
            free.set()

        stopped = threading.Event()
        threading.Thread(target=stop).start()
        threading.Thread(target=release).start()
        with pytest.raises(DeadlineError, match="stopped while waiting"):
            copy(
                MemorySource(bytes(64 * PIECE), content), Collecting(64 * PIECE, hang), content, CopyOptions(), deadline
            )

    @pytest.mark.real
    def test_a_copy_that_is_told_to_stop_ends_and_a_silent_server_does_not_hold_it(self, folder: Path) -> None:
        deadline = Deadline(None)
        with nbdkit(folder, "--filter=delay", "memory", "64M", "rdelay=60") as uri:
            source = NbdSource.connect(uri, deadline=Deadline(20), connections=3)
            stopping = threading.Timer(0.2, deadline.stop)
            stopping.start()
            content = ExtentMap.uniform(source.size, DATA)
            with source, pytest.raises(DeadlineError, match="stopped"):
                copy(source, Collecting(source.size), content, CopyOptions(), deadline)
            stopping.join()


@contextlib.contextmanager
def cutting(path: Path, behind: NbdUri, after: Callable[[], int]) -> Iterator[NbdUri]:
    """Passes connections on, and cuts each when so many bytes have come back."""

    def forward(client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(behind.path)
            left = after()
            while left > 0:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    (server if ready is client else client).sendall(data)
                    left -= len(data) if ready is server else 0

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            if closing.is_set():
                client.close()
                return
            threading.Thread(target=suppressed, args=(forward, client), daemon=True).start()

    closing = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield NbdUri.unix(str(path))
        finally:
            closing.set()
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(str(path))
            thread.join()


def suppressed(forward: Callable[[socket.socket], None], client: socket.socket) -> None:
    with contextlib.suppress(OSError):  # one side has gone
        forward(client)


def killing(kill: Callable[[], None], at: int) -> Callable[[Progress], None]:
    def progress(progress: Progress) -> None:
        if progress.data_bytes > at:
            kill()

    return progress


def test_what_is_done_already_is_neither_read_nor_written() -> None:
    disk = random.Random(5).randbytes(6 * PIECE)
    content = ExtentMap.of_extents([(4 * PIECE, DATA), (2 * PIECE, ZERO)])
    done = ExtentMap.of_extents([(PIECE, 1), (PIECE, 0), (PIECE, 1), (2 * PIECE, 0), (PIECE, 1)])
    target = Collecting(len(disk))
    found = copy(MemorySource(disk, content), target, content, CopyOptions(done=done), Deadline(60))
    assert (found.data_bytes, found.zero_bytes) == (2 * PIECE, PIECE)
    untouched = b"\xee" * PIECE
    expected = [untouched, disk[PIECE : 2 * PIECE], untouched, disk[3 * PIECE : 4 * PIECE], bytes(PIECE), untouched]
    assert bytes(target.disk) == b"".join(expected)


def test_a_copy_of_more_than_there_is_is_refused() -> None:
    content = ExtentMap.uniform(2 * PIECE, DATA)
    with pytest.raises(UsageError, match="2097152 bytes of a disk that has 1048576"):
        copy(MemorySource(bytes(PIECE), content), Collecting(2 * PIECE), content, CopyOptions(), Deadline(60))


def test_progress_ends_with_everything() -> None:
    content, told = ExtentMap.uniform(9 * PIECE + 512, DATA), list[Progress]()
    options = CopyOptions(progress=told.append)
    copy(MemorySource(bytes(content.size), content), Collecting(content.size), content, options, Deadline(60))
    assert [each.data_bytes for each in told] == sorted({each.data_bytes for each in told})
    assert (told[-1].data_bytes, told[-1].of_bytes) == (content.size, content.size)


class TestPace:
    """On a clock that only goes on when somebody sleeps."""

    def setup_method(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def pace(self, bytes_per_second: int) -> Pace:
        return Pace(bytes_per_second, lambda: self.now, self.sleep)

    def test_an_average_is_kept(self) -> None:
        pace = self.pace(1000)
        for _ in range(50):
            pace.wait(100, Deadline(None), "x")
        assert self.now == pytest.approx(105.0)

    def test_what_was_not_used_is_not_saved_for_long(self) -> None:
        pace = self.pace(1000)
        self.now += 3600
        for _ in range(50):
            pace.wait(100, Deadline(None), "x")
        assert self.now == pytest.approx(3600 + 105.0, abs=0.11)

    def test_a_wish_to_stop_ends_the_wait(self) -> None:
        deadline = Deadline(None)

        def stop(seconds: float) -> None:
            self.now += seconds
            if self.now > 101:
                deadline.stop()

        with pytest.raises(DeadlineError, match="its share of the bandwidth limit"):
            Pace(1, lambda: self.now, stop).wait(3600, deadline, "x")
        assert self.now < 102


class TestNewFile:
    def test_a_name_that_is_taken_meanwhile_is_not_taken_over(self, tmp_path: Path) -> None:
        file = NewFile(tmp_path / "x")
        (tmp_path / "x").write_text("somebody else's")
        with pytest.raises(TargetInUseError, match="meanwhile"):
            file.publish(force=False)
        file.discard()
        assert [path.read_text() for path in tmp_path.iterdir()] == ["somebody else's"]

    def test_a_link_stays_and_what_it_leads_to_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "there").write_text("old")
        (tmp_path / "there").chmod(0o640)
        (tmp_path / "link").symlink_to("there")
        file = NewFile(tmp_path / "link", force=True)
        file.write(0, memoryview(b"new"))
        file.publish(force=True)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there").read_text() == "new"
        assert (tmp_path / "there").stat().st_mode & 0o777 == 0o640

    @pytest.mark.real
    def test_what_a_qemu_uses_is_not_replaced_even_with_force(self, folder: Path, tmp_path: Path) -> None:
        qemu_img("create", "-q", "-f", "raw", tmp_path / "x", "8M")
        with qemu_nbd(folder, "-f", "raw", str(tmp_path / "x")) as uri:
            Client.connect(uri, deadline=Deadline(20)).close()  # it listens before it opens the image
            with pytest.raises(TargetInUseError, match="another process uses it"):
                NewFile(tmp_path / "x", force=True)
            with pytest.raises(ImageChangedError, match="a running QEMU writes to it"):
                open_source(str(tmp_path / "x"), format="raw", deadline=Deadline(20))

    @pytest.mark.real
    def test_what_a_qemu_only_reads_can_be_copied(self, folder: Path, disk: Path) -> None:
        with qemu_nbd(folder, "-r", "-f", "raw", str(disk)) as uri:
            Client.connect(uri, deadline=Deadline(20)).close()
            open_source(str(disk), format="raw", deadline=Deadline(20)).close()
