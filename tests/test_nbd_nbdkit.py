"""nbdkit's filters and plugins: what each of them does to data, maps, abilities, errors and time arrives as it is."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    DeadlineError,
    NbdConnectError,
    NbdDisconnectedError,
    NbdRefusedError,
    NbdRequestError,
    NbdUnsupportedError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import TransmissionFlag
from qmpnbd.nbd.stepwise import Negotiation
from qmpnbd.nbd.uri import NbdUri
from tests.hostile_nbd import BASE
from tests.nbd_doors import LONG, SHORT, Door, both_doors
from tests.nbd_servers import nbdkit, running, tcp_server
from tests.servers import tool, wait_until

pytestmark = pytest.mark.real
MIB = 1 << 20
HOLE = 3


# Filters that change what there is.


def counting(offset: int, length: int) -> bytes:
    """What nbdkit's plugin `pattern` holds: at each multiple of 8, the offset itself."""
    first, last = offset // 8, (offset + length + 7) // 8
    return b"".join((8 * n).to_bytes(8, "big") for n in range(first, last))[offset % 8 :][:length]


@both_doors
def test_nofilter_changes_nothing(door: Door, folder: Path) -> None:
    outcomes = []
    for filters in ([], ["--filter=nofilter"]):
        with nbdkit(folder, *filters, "data", "1 @9000 2", "size=1M") as uri:
            outcomes.append(door(uri, ("read", 0, MIB), "maps", contexts=[BASE]))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == b"\1" + bytes(8999) + b"\2" + bytes(MIB - 9001)


@both_doors
def test_noextents_makes_a_hole_look_like_data(door: Door, folder: Path) -> None:
    with nbdkit(folder, "--filter=noextents", "memory", "1M") as uri:
        read, maps = door(uri, ("read", 0, MIB), "maps", contexts=[BASE])
    assert (read, maps) == (bytes(MIB), {BASE: ExtentMap.uniform(MIB, 0)})


@both_doors
def test_extentlist_tells_exactly_its_extents(door: Door, folder: Path) -> None:
    (folder / "list").write_text("0 4096 hole,zero\n4096 8192 0\n12288 4096 hole\n16384 1032192 zero\n")
    with nbdkit(folder, "--filter=extentlist", "-r", "memory", "1M", f"extentlist={folder}/list") as uri:
        maps, part = door(uri, "maps", ("maps", 5000, 8000), contexts=[BASE])
    assert maps == {BASE: ExtentMap.of_extents([(4096, 3), (8192, 0), (4096, 1), (MIB - 16384, 2)])}
    assert part == {BASE: ExtentMap.of_extents([(7288, 0), (712, 1)])}


@both_doors
def test_truncate_rounds_a_size_up_with_zeroes(door: Door, folder: Path) -> None:
    with nbdkit(folder, "--filter=truncate", "pattern", "1000", "round-up=512") as uri:
        with Client.connect(uri) as client:
            assert client.export.size == 1024
        read, maps = door(uri, ("read", 0, 1024), "maps", contexts=[BASE])
    assert read == counting(0, 1000) + bytes(24)
    assert maps[BASE].size == 1024
    assert maps[BASE].at(1023) == HOLE


@both_doors
def test_offset_serves_a_part(door: Door, folder: Path) -> None:
    with nbdkit(folder, "--filter=offset", "data", "1 @1000 2", "size=1M", "offset=512", "range=1024") as uri:
        read, maps = door(uri, ("read", 0, 1024), "maps", contexts=[BASE])
    assert read == bytes(488) + b"\2" + bytes(535)
    assert maps == {BASE: ExtentMap.uniform(1024, 0)}


@both_doors
def test_swab_swaps_the_bytes_and_not_the_map(door: Door, folder: Path) -> None:
    found = []
    data = ["data", "1 2 3 4 @8192 5 6", "size=64K"]
    for arguments in (data, ["--filter=swab", *data, "swab-bits=16"]):
        with nbdkit(folder, *arguments) as uri:
            found.append(door(uri, ("read", 0, 65536), "maps", contexts=[BASE]))
    plain, swapped = found
    swab = bytearray(65536)
    swab[::2], swab[1::2] = plain[0][1::2], plain[0][::2]
    assert swapped == [swab, plain[1]]
    assert swab != plain[0]


@both_doors
def test_cow_keeps_what_was_written_and_the_rest(door: Door, folder: Path) -> None:
    with nbdkit(folder, "--filter=cow", "pattern", "1M") as uri:
        written, changed, rest = door(
            uri, ("write", 70_000, b"x" * 5000), ("read", 65536, 65536), ("read", 0, 65536), contexts=[]
        )
    assert written is None
    assert changed == counting(65536, 4464) + b"x" * 5000 + counting(75_000, 56_072)
    assert rest == counting(0, 65536)


@both_doors
def test_checkwrite_is_told_the_same_or_says_no(door: Door, folder: Path) -> None:
    with nbdkit(folder, "--filter=checkwrite", "pattern", "1M") as uri:
        same, other, after = door(
            uri, ("write", 4096, counting(4096, 8192)), ("write", 4096, b"x" * 512), ("read", 4096, 8), contexts=[]
        )
    assert same is None
    assert isinstance(other, NbdRequestError)
    assert other.wire_error == 5
    assert after == counting(4096, 8)


@both_doors
@pytest.mark.parametrize("filters", [["readahead"], ["rate"], ["noparallel", "delay"], ["cacheextents"]])
def test_filters_that_change_only_when(door: Door, folder: Path, filters: list[str]) -> None:
    options = {"rate": ["rate=400M"], "delay": ["delay-read=1ms"]}
    more = [option for name in filters for option in options.get(name, [])]
    chosen = [f"--filter={name}" for name in filters]
    with nbdkit(folder, *chosen, "pattern", "4M", *more) as uri:
        whole, pieces, maps = door(
            uri, ("read", 0, 4 * MIB), ("chunks", [(7, 3 * MIB)], {"size": 65536}), "maps", contexts=[BASE]
        )
    assert whole == counting(0, 4 * MIB)
    assert b"".join(data for _, data in sorted(pieces)) == counting(7, 3 * MIB)
    assert maps == {BASE: ExtentMap.uniform(4 * MIB, 0)}


# Filters that change what can be done.

FLAGS = {
    "multi-conn": ("multi-conn-mode=disable", TransmissionFlag.CAN_MULTI_CONN),
    "nozero": ("zeromode=none", TransmissionFlag.SEND_WRITE_ZEROES),
    "nocache": ("cachemode=none", TransmissionFlag.SEND_CACHE),
    "fua": ("", TransmissionFlag.SEND_FUA),  # without an option
}


@both_doors
@pytest.mark.parametrize("name", FLAGS)
def test_filters_that_take_an_ability_away(door: Door, folder: Path, name: str) -> None:
    option, flag = FLAGS[name]
    calls = {
        TransmissionFlag.SEND_WRITE_ZEROES: ("write_zeroes", 0, 512),
        TransmissionFlag.SEND_CACHE: ("cache", 0, 512),
        TransmissionFlag.SEND_FUA: ("write", 0, b"x", {"fua": True}),
    }
    found = []
    for arguments in (["memory", "1M"], [f"--filter={name}", "memory", "1M", *filter(None, [option])]):
        with nbdkit(folder, *arguments) as uri:
            with Client.connect(uri) as client:
                found.append(bool(client.export.flags & flag))
            if flag in calls:
                (outcome,) = door(uri, calls[flag], contexts=())
                assert isinstance(outcome, NbdUnsupportedError) if not found[-1] else outcome is None
    assert found == [True, False]


@both_doors
def test_protect_lets_nobody_change_a_range(door: Door, folder: Path) -> None:
    with nbdkit(folder, "--filter=protect", "data", "(0xff)*1048576", "protect=0-1023") as uri:
        steps = (("write", 512, b"x" * 512), ("write_zeroes", 0, 4096), ("write", 1024, b"y" * 512), ("read", 0, 1536))
        refused, zeroes, written, read = door(uri, *steps, contexts=())
    for outcome in (refused, zeroes):
        assert isinstance(outcome, NbdRequestError)
        assert outcome.wire_error == 1
    assert (written, read) == (None, b"\xff" * 1024 + b"y" * 512)


@both_doors
def test_a_full_disk_says_so(door: Door, folder: Path) -> None:
    with nbdkit(folder, "full", "1M") as uri:
        read, written = door(uri, ("read", 0, 1000), ("write", 0, b"x" * 512), contexts=())
    assert read == bytes(1000)
    assert isinstance(written, NbdRequestError)
    assert written.wire_error == 28


# Filters that fail, and are late.


@both_doors
def test_an_error_of_the_extents_only(door: Door, folder: Path) -> None:
    faulty = ["--filter=error", "data", "(5)*1048576", "error-extents=EIO", "error-extents-rate=100%"]
    with nbdkit(folder, *faulty) as uri:
        failed, read, again = door(uri, "maps", ("read", 0, 4096), "maps", contexts=[BASE])
    for outcome in (failed, again):
        assert isinstance(outcome, NbdRequestError)
        assert outcome.wire_error == 5
    assert read == b"\5" * 4096


def test_errors_come_and_go_and_the_client_stays(folder: Path) -> None:
    trigger = folder / "trigger"
    faulty = ["error-pread=ENOMEM", "error-pread-rate=100%", f"error-pread-file={trigger}"]
    with nbdkit(folder, "--filter=error", "pattern", "1M", *faulty) as uri, Client.connect(uri) as client:
        assert client.read(8, 8) == counting(8, 8)
        trigger.touch()
        with pytest.raises(NbdRequestError) as caught:
            client.read(8, 8)
        assert caught.value.wire_error == 12
        trigger.unlink()
        assert client.read(8, 8) == counting(8, 8)
        assert client.statistics.connections == 1


def test_a_server_that_tries_again_itself(folder: Path) -> None:
    """Its first try fails; what fails it goes away before the second one, a second later."""
    trigger, log = folder / "trigger", folder / "log"
    trigger.touch()
    faulty = ["error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={trigger}", f"logfile={log}"]
    filters = ["--filter=retry-request", "--filter=log", "--filter=error"]
    with (
        nbdkit(folder, *filters, "pattern", "1M", *faulty, "retry-request-delay=1") as uri,
        Client.connect(uri) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        reading = pool.submit(client.read, 8, 4096)
        wait_until(lambda: "return=-1" in log.read_text(), "the first try to fail")
        trigger.unlink()
        assert reading.result(LONG) == counting(8, 4096)


@both_doors
@pytest.mark.parametrize(("option", "step"), [("delay-read=400ms", ("read", 0, 512)), ("delay-extents=400ms", "maps")])
def test_a_late_answer_is_dropped_and_the_client_goes_on(door: Door, folder: Path, option: str, step: Any) -> None:
    name, *rest = (step,) if isinstance(step, str) else step
    with nbdkit(folder, "--filter=delay", "data", "(5)*1048576", option) as uri:
        late = (name, *rest, {"deadline": Deadline(0.2)})
        silent, flushed, right = door(uri, late, "flush", step, contexts=[BASE])
    assert isinstance(silent, DeadlineError)
    assert flushed is None
    assert right == (b"\5" * 512 if name == "read" else {BASE: ExtentMap.uniform(MIB, 0)})


@both_doors
def test_a_server_that_takes_its_time_to_open(door: Door, folder: Path) -> None:
    with nbdkit(folder, "--filter=delay", "pattern", "1M", "delay-open=400ms") as uri:
        with pytest.raises(DeadlineError, match="NBD_OPT_GO"):
            door(uri, contexts=(), seconds=0.1)
        assert door(uri, ("read", 0, 16), contexts=()) == [counting(0, 16)]


def test_a_server_that_pauses(folder: Path) -> None:
    with (
        nbdkit(folder, "--filter=pause", "pattern", "1M", f"pause-control={folder}/c") as uri,
        Client.connect(uri) as client,
        socket.socket(socket.AF_UNIX) as control,
    ):
        control.connect(str(folder / "c"))
        control.settimeout(LONG)
        control.sendall(b"p")
        assert control.recv(1) == b"P"
        with pytest.raises(DeadlineError):
            client.read(0, 16, deadline=Deadline(SHORT))
        control.sendall(b"r")
        assert control.recv(1) == b"R"
        assert client.read(8, 16, deadline=Deadline(LONG)) == counting(8, 16)


# Filters about connections.


@both_doors
def test_a_server_at_its_limit_hangs_up_without_a_greeting(door: Door, folder: Path) -> None:
    with nbdkit(folder, "--filter=limit", "pattern", "1M", "limit=1") as uri, Client.connect(uri) as client:
        with pytest.raises((NbdConnectError, NbdDisconnectedError)):
            door(uri, contexts=())
        assert client.read(0, 16) == counting(0, 16), "the first one is served as before"


@both_doors
def test_exitlast_ends_with_its_last_client(door: Door, folder: Path) -> None:
    command = [tool("nbdkit"), "-f", "-U", f"{folder}/s", "--filter=exitlast", "pattern", "1M"]
    with running(folder, *command) as (uri, child):
        assert door(uri, ("read", 0, 16), contexts=()) == [counting(0, 16)]
        assert child.wait(20) == 0


def test_exitwhen_serves_who_is_there_to_the_end(folder: Path) -> None:
    options = [f"exit-when-file-created={folder}/stop", "exit-when-poll=1"]
    command = [tool("nbdkit"), "-f", "-U", f"{folder}/s", "--filter=exitwhen", "pattern", "1M", *options]
    with running(folder, *command) as (uri, child):
        with Client.connect(uri) as client:
            (folder / "stop").touch()
            assert client.read(0, 16) == counting(0, 16)
            assert child.poll() is None
        assert child.wait(20) == 0


@both_doors
def test_an_address_that_is_not_welcome(door: Door, folder: Path) -> None:
    command = [tool("nbdkit"), "-f", "-i", "127.0.0.1", "-p", "PORT", "--filter=ip", "memory", "1M", "deny=all"]
    with tcp_server(folder, *command) as uri, pytest.raises((NbdConnectError, NbdDisconnectedError)):
        door(uri, contexts=())


# What the server was asked.


@both_doors
def test_the_server_was_asked_what_we_mean(door: Door, folder: Path) -> None:
    command = [tool("nbdkit"), "-f", "-U", f"{folder}/s", "--filter=stats", "--filter=log", "memory", "1M"]
    with running(folder, *command, f"statsfile={folder}/stats", f"logfile={folder}/log") as (uri, child):
        outcomes = door(
            uri,
            ("read", 512, 1024),
            ("write", 4096, b"x" * 4096, {"fua": True}),
            ("write_zeroes", 8192, 4096, {"no_hole": True, "fast": True}),
            ("trim", 16384, 4096),
            ("cache", 0, 65536),
            ("block_status", 0, 65536, {"one": True}),
            "flush",
            contexts=[BASE],
        )
        child.terminate()
        assert child.wait(20) == 0
    assert not any(isinstance(outcome, Exception) for outcome in outcomes)
    begun = re.findall(r"connection=1 (\w+) id=\d+ (?:(.*) )?\.\.\.$", (folder / "log").read_text(), re.MULTILINE)
    assert begun == [
        ("Read", "offset=0x200 count=0x400"),
        ("Write", "offset=0x1000 count=0x1000 fua=1"),
        ("Zero", "offset=0x2000 count=0x1000 trim=0 fua=0 fast=1"),
        ("Trim", "offset=0x4000 count=0x1000 fua=0"),
        ("Cache", "offset=0x0 count=0x10000"),
        ("Extents", "offset=0x0 count=0x10000 req_one=1"),
        ("Flush", ""),
    ]
    counted = re.findall(r"^(\w+): (\d+) ops", (folder / "stats").read_text(), re.MULTILINE)
    assert {name for name, count in counted if count == "1"} == {name.lower() for name, _ in begun}


# Exports by name.


@both_doors
def test_exports_are_listed_and_no_other_is_served(door: Door, folder: Path) -> None:
    names = ["exportname=one", "exportname=two", "exportname-list=explicit", "exportname-strict=true"]
    with nbdkit(folder, "--filter=exportname", "info", "exportname", *names) as uri:
        with Negotiation.connect(uri) as negotiation:
            assert [name for name, _ in negotiation.list_exports()] == ["one", "two"]
            with pytest.raises(NbdRefusedError):
                negotiation.info("three")
            assert negotiation.info("two").size == 3
            with negotiation.go("one") as client:
                assert client.read(0, 3) == b"one"
        assert door(NbdUri.unix(uri.path, "two"), ("read", 0, 3), contexts=()) == [b"two"]
        with pytest.raises(NbdRefusedError, match="no export of this name"):
            door(NbdUri.unix(uri.path, "three"), contexts=())


@both_doors
def test_exports_made_on_demand_are_apart(door: Door, folder: Path) -> None:
    (folder / "disks").mkdir()
    with nbdkit(folder, "ondemand", f"dir={folder}/disks", "size=1M", "command=truncate -s $size $disk") as uri:
        for name in ("a", "b"):
            found = door(NbdUri.unix(uri.path, name), ("write", 0, name.encode() * 512), ("read", 0, 3), contexts=())
            assert found == [None, name.encode() * 3]

        def found_again() -> bool:
            """Reads, unless nbdkit has not yet learned that the client before has gone: a disk is one client's."""
            try:
                assert door(NbdUri.unix(uri.path, "a"), ("read", 0, 2), contexts=()) == [b"aa"]
            except NbdRefusedError:
                return False
            return True

        wait_until(found_again, "nbdkit to let go of the disk")


def test_many_exports_are_listed(folder: Path) -> None:
    script = "list_exports=echo NAMES; for i in $(seq 300); do echo e$i; done"
    with (
        nbdkit(folder, "eval", "get_size=echo 512", "pread=head -c $3 /dev/zero", script) as uri,
        Negotiation.connect(uri) as negotiation,
    ):
        assert [name for name, _ in negotiation.list_exports()] == [f"e{n}" for n in range(1, 301)]


# Extents and errors of a script.


def evaluated(folder: Path, **functions: str) -> contextlib.AbstractContextManager[NbdUri]:
    """An nbdkit whose functions are lines of shell."""
    zeroes = {"can_extents": "exit 0", "pread": "head -c $3 /dev/zero"} | functions
    return nbdkit(folder, "eval", *(f"{name}={line}" for name, line in zeroes.items()))


@both_doors
def test_extents_of_one_byte_are_joined(door: Door, folder: Path) -> None:
    with evaluated(folder, get_size="echo 32", extents="echo $4 1 0") as uri:
        assert door(uri, "maps", contexts=[BASE]) == [{BASE: ExtentMap.uniform(32, 0)}]


@both_doors
def test_one_extent_for_several_requests(door: Door, folder: Path) -> None:
    with evaluated(folder, get_size="echo 10G", extents="echo 0 10G hole,zero") as uri:
        assert door(uri, "maps", contexts=[BASE]) == [{BASE: ExtentMap.uniform(10 << 30, HOLE)}]


@both_doors
@pytest.mark.parametrize("extents", ["exit 0", "echo 512 4096 hole"])
def test_extents_that_the_server_itself_does_not_like(door: Door, folder: Path, extents: str) -> None:
    with evaluated(folder, get_size="echo 64K", extents=extents) as uri:
        failed, read = door(uri, "maps", ("read", 0, 512), contexts=[BASE])
    assert isinstance(failed, NbdRequestError)
    assert read == bytes(512)


@both_doors
@pytest.mark.parametrize(
    ("error", "wire_error"),
    [("EPERM", 1), ("ENOMEM", 12), ("ENOSPC", 28), ("EBADF", 5)],
)
def test_errors_of_a_script(door: Door, folder: Path, error: str, wire_error: int) -> None:
    with evaluated(folder, get_size="echo 64K", pread=f"echo {error} no such luck >&2; exit 1") as uri:
        (failed,) = door(uri, ("read", 0, 512), contexts=())
    assert isinstance(failed, NbdRequestError)
    assert failed.wire_error == wire_error


@both_doors
def test_an_export_that_cannot_be_opened(door: Door, folder: Path) -> None:
    refusing = evaluated(folder, get_size="echo 512", open="echo EPERM not today >&2; exit 1")
    with refusing as uri, pytest.raises(NbdRefusedError):
        door(uri, contexts=())


# Sizes and contents.


@both_doors
def test_the_largest_export_there_is(door: Door, folder: Path) -> None:
    with nbdkit(folder, "null", str(2**63 - 1)) as uri:
        with Client.connect(uri) as client:
            assert client.export.size == 2**63 - 1
        read, told = door(uri, ("read", 2**63 - 1024, 1023), ("block_status", 2**63 - 4096, 4095), contexts=[BASE])
    assert read == bytes(1023)
    assert told[BASE].at(0) == HOLE


@both_doors
@pytest.mark.parametrize("plugin", [["sparse-random", "32M", "seed=42"], ["random", "1M", "seed=42"]])
def test_what_is_mapped_as_a_hole_reads_as_zeroes(door: Door, folder: Path, plugin: list[str]) -> None:
    with nbdkit(folder, *plugin) as uri:
        size = int(subprocess.check_output([tool("nbdinfo"), "--size", str(uri)], timeout=60))
        whole, maps = door(uri, ("read", 0, size), "maps", contexts=[BASE])
        said = subprocess.run(
            [tool("nbdinfo"), "--map", str(uri)], check=True, capture_output=True, text=True, timeout=60
        ).stdout
    assert maps[BASE] == ExtentMap.of_extents([(int(f[1]), int(f[2])) for f in map(str.split, said.splitlines())])
    for extent in maps[BASE]:
        assert bool(extent.value) == (not any(whole[extent.offset :][: extent.length]))
