"""Looking around on real servers before choosing, through both doors, and what becomes of the connection."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    DeadlineError,
    NbdContextError,
    NbdDisconnectedError,
    NbdProtocolError,
    NbdRefusedError,
    NbdUnsupportedError,
    UsageError,
)
from qmpnbd.nbd import aio, aio_stepwise, client, stepwise
from qmpnbd.nbd.constants import Option, TransmissionFlag
from qmpnbd.nbd.quirks import Quirk
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri
from tests.hostile_nbd import BASE, DEPTH, Script, honest, serving, status
from tests.servers import listening, process, qemu_img, tool, wait_until
from tests.tls_files import Authority

LONG, SHORT = 20.0, 0.2


class Steps:
    """One negotiation, whichever door it came through."""

    def __init__(self, negotiation: Any, wait: Callable[[Any], Any]) -> None:
        self._negotiation = negotiation
        self._wait = wait

    def __call__(self, step: str, *arguments: Any, **more: Any) -> Any:
        found = getattr(self._negotiation, step)(*arguments, **more)
        return self._wait(found) if isinstance(found, Awaitable) else found

    def of(self, client: Any) -> Steps:
        """Returns the steps of a client that was agreed on."""
        return Steps(client, self._wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._negotiation, name)


@contextlib.contextmanager
def blocking(uri: str | NbdUri, **more: Any) -> Iterator[Steps]:
    deadline = Deadline(LONG)
    with stepwise.Negotiation.connect(uri, deadline=deadline, **more) as negotiation:
        yield Steps(negotiation, lambda found: found)


@contextlib.contextmanager
def awaited(uri: str | NbdUri, **more: Any) -> Iterator[Steps]:
    with asyncio.Runner() as runner:
        negotiation = runner.run(aio_stepwise.Negotiation.connect(uri, deadline=Deadline(LONG), **more))
        try:
            yield Steps(negotiation, runner.run)
        finally:
            runner.run(negotiation.abort())


Begin = Callable[..., contextlib.AbstractContextManager[Steps]]
both_doors = pytest.mark.parametrize("begin", [blocking, awaited])


@contextlib.contextmanager
def running(folder: Path, *command: str) -> Iterator[NbdUri]:
    path = folder / "s"
    with process([tool(command[0]), *command[1:]], folder / "log") as child:
        wait_until(lambda: listening(path) or child.poll() is not None, command[0])
        assert child.poll() is None, (folder / "log").read_text()
        yield NbdUri.unix(str(path))
    path.unlink(missing_ok=True)


def nbdkit(folder: Path, *arguments: str) -> contextlib.AbstractContextManager[NbdUri]:
    return running(folder, "nbdkit", "-f", "-U", f"{folder}/s", *arguments)


@both_doors
@pytest.mark.real
def test_a_look_around_on_qemu(begin: Begin, folder: Path, three_layers: Path) -> None:
    arguments = ["-k", f"{folder}/s", "-r", "-t", "-e", "9", "-A", "-x", "disk", "-D", "a disk\x1b[m", "-f", "qcow2"]
    with running(folder, "qemu-nbd", *arguments, str(three_layers / "top.qcow2")) as uri, begin(uri) as steps:
        assert (steps.style, steps.tls) == ("fixed newstyle", False)
        assert steps.replies in ("structured", "extended"), "extended since QEMU 8.2"
        assert steps("list_exports") == [("disk", r"a disk\x1b[m")]
        found = steps("info", "disk")
        assert (found.name, found.size, found.canonical) == ("disk", 16 << 20, "disk")
        assert found.description == r"a disk\x1b[m"
        assert (found.minimum_block, found.preferred_block, found.maximum_payload) == (1, 4096, 32 << 20)
        assert found.flags & TransmissionFlag.READ_ONLY
        assert steps("list_contexts", "disk") == [BASE, DEPTH]
        assert steps("list_contexts", "disk", ["qemu:"]) == [DEPTH]
        assert steps("list_contexts", "disk", ["qemu:dirty-bitmap:"]) == []
        for step in ("info", "list_contexts"):
            with pytest.raises(NbdRefusedError, match="no export of this name"):
                steps(step, "other")
        with pytest.raises(NbdContextError, match="namespace"):
            steps("set_contexts", "disk", ["qemu:"])
        assert steps("set_contexts", "disk", [DEPTH, BASE]) == [DEPTH, BASE]
        with pytest.raises(UsageError, match="selected for 'disk'"):
            steps("go", "other")
        chosen = Steps(steps("go", "disk"), steps._wait)
        assert (chosen.where, list(chosen.export.contexts)) == (str(NbdUri.unix(uri.path, "disk")), [DEPTH, BASE])
        assert chosen("maps")[DEPTH].totals().keys() == {1, 2, 3}
        with pytest.raises(UsageError, match="over"):
            steps("list_exports")
        steps("abort")
        assert chosen("read", 0, 4) == bytes(4), "the connection belongs to the client"
        chosen("close")
    log = (folder / "log").read_text().replace("Failed to read opts magic", "")
    assert "due to" not in log, "we took leave"


@both_doors
@pytest.mark.real
def test_a_bitmap_on_qemu(begin: Begin, folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", folder / "image", "1M")
    qemu_img("bitmap", "--add", folder / "image", "b0")
    command = ["-k", f"{folder}/s", "-r", "-t", "-B", "b0", "-f", "qcow2", f"{folder}/image"]
    with running(folder, "qemu-nbd", *command) as uri, begin(uri) as steps:
        assert steps("list_contexts", "", ["qemu:dirty-bitmap:"]) == ["qemu:dirty-bitmap:b0"]
        assert steps("set_contexts", "", ["qemu:dirty-bitmap:b0"]) == ["qemu:dirty-bitmap:b0"]
        steps("abort")
        with pytest.raises(UsageError, match="over"):
            steps("go", "")


@both_doors
@pytest.mark.real
def test_a_look_around_on_nbdkit(begin: Begin, folder: Path) -> None:
    names = "list_exports=echo NAMES; for i in 1 2 3; do echo export$i; done"
    with nbdkit(folder, "eval", names, "get_size=echo 1M", "pread=exit 1") as uri, begin(uri) as steps:
        assert steps("list_exports") == [("export1", ""), ("export2", ""), ("export3", "")]
        assert steps("info", "export2").size == 1 << 20
        assert steps("list_contexts", "export3") == [BASE]
        Steps(steps("go", "export3"), steps._wait)("close")


@both_doors
@pytest.mark.real
@pytest.mark.parametrize(
    ("arguments", "style"),
    [
        (["-o"], "oldstyle"),
        (["--mask-handshake=0"], "newstyle"),
        (["--mask-handshake=1"], "fixed newstyle"),
        (["--mask-handshake=2"], "newstyle"),
    ],
)
def test_old_servers_are_used_for_what_they_can_do(
    begin: Begin, folder: Path, arguments: list[str], style: str
) -> None:
    with nbdkit(folder, *arguments, "pattern", "1M") as uri, begin(uri) as steps:
        assert steps.style == style
        if style != "fixed newstyle":
            for step in ("list_exports", "info", "list_contexts"):
                with pytest.raises(NbdUnsupportedError, match=f"old as this one \\({style}\\)"):
                    steps(step, *[""] * (step != "list_exports"))
        chosen = Steps(steps("go", ""), steps._wait)
        assert chosen.export.size == 1 << 20
        assert chosen("read", 256, 16) == bytes.fromhex("00000000000001000000000000000108")
        chosen("close")


@both_doors
@pytest.mark.parametrize("best", ["extended", "structured", "simple"])
def test_the_best_form_is_not_exceeded(begin: Begin, folder: Path, best: str) -> None:
    script = Script(extended=True)
    with serving(folder, script) as uri, begin(uri, best=best) as steps:
        assert steps.replies == best
        assert (Option.EXTENDED_HEADERS in script.asked) == (best == "extended")


@both_doors
def test_after_a_violation_the_negotiation_is_closed(begin: Begin, folder: Path) -> None:
    with serving(folder, Script(options={Option.LIST: b"\0" * 20})) as uri, begin(uri) as steps:
        with pytest.raises(NbdProtocolError, match="begins with"):
            steps("list_exports")
        for step in (("list_exports",), ("go", "disk")):
            with pytest.raises(NbdDisconnectedError, match="lost before"):
                steps(*step)


@both_doors
def test_silence_ends_in_time(begin: Begin, folder: Path) -> None:
    with serving(folder, Script(options={Option.LIST: b""})) as uri, begin(uri) as steps:
        with pytest.raises(DeadlineError, match="NBD_OPT_LIST"):
            steps("list_exports", Deadline(SHORT))
        with pytest.raises(NbdDisconnectedError):
            steps("go", "disk")


@both_doors
def test_a_client_that_was_agreed_on_does_not_wait_for_ever_for_an_answer(begin: Begin, folder: Path) -> None:
    with serving(folder, Script(flush=lambda request, count: [])) as uri, begin(uri) as steps:
        agreed = steps.of(steps("go", "disk", request_seconds=SHORT))
        with pytest.raises(DeadlineError, match="NBD_CMD_FLUSH"):
            agreed("flush")
        agreed("close")


@both_doors
def test_a_client_that_was_agreed_on_bears_what_it_is_told_to(begin: Begin, folder: Path) -> None:
    script = Script(answer=lambda request, count: [status(request.cookie, 99, [(512, 0)]), *honest(request, count)])
    for lenient in (frozenset({Quirk.UNKNOWN_CONTEXT}), frozenset[Quirk]()):
        with serving(folder, script) as uri, begin(uri) as steps:
            steps("set_contexts", "disk", [DEPTH])
            agreed = steps.of(steps("go", "disk", lenient=lenient))
            if lenient:
                assert agreed("maps")[DEPTH].size == script.size
            else:
                with pytest.raises(NbdProtocolError, match="99"):
                    agreed("maps")
            agreed("close")


@both_doors
def test_leave_is_taken(begin: Begin, folder: Path) -> None:
    script = Script()
    with serving(folder, script) as uri:
        with begin(uri):
            pass
        wait_until(lambda: Option.ABORT in script.asked, "the leave")
    assert script.asked[-1] == Option.ABORT


def test_one_call_at_a_time_and_a_cancelled_one_closes(folder: Path) -> None:
    async def main() -> None:
        negotiation = await aio_stepwise.Negotiation.connect(uri)
        task = asyncio.create_task(negotiation.list_exports())
        await asyncio.to_thread(wait_until, lambda: Option.LIST in script.asked, "the question")
        with pytest.raises(UsageError, match="under way"):
            await negotiation.info("disk")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(NbdDisconnectedError):
            await negotiation.list_exports()

    script = Script(options={Option.LIST: b""})
    with serving(folder, script) as uri:
        asyncio.run(main(), debug=True)


def test_abort_ends_a_call_of_another_task(folder: Path) -> None:
    async def main() -> None:
        negotiation = await aio_stepwise.Negotiation.connect(uri)
        task = asyncio.create_task(negotiation.list_exports())
        await asyncio.to_thread(wait_until, lambda: Option.LIST in script.asked, "the question")
        await negotiation.abort()
        with pytest.raises(NbdDisconnectedError):
            await asyncio.wait_for(task, LONG)

    script = Script(options={Option.LIST: b""})
    with serving(folder, script) as uri:
        asyncio.run(main(), debug=True)


# The whole client over TLS.


@pytest.mark.real
def test_data_and_maps_over_tls_are_those_in_clear(folder: Path, three_layers: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, own = authority.server(), authority.client()
    image = ["-f", "qcow2", str(three_layers / "top.qcow2")]
    common = ["-k", f"{folder}/s", "-r", "-t", "-e", "9", "-A"]
    with running(folder, "qemu-nbd", *common, *image) as uri, client.Client.connect(uri, contexts=[DEPTH]) as clear:
        maps, data = clear.maps(), clear.read(0, 16 << 20)
    tls = Tls(certificates=str(own), hostname="localhost")
    credentials = ["--object", f"tls-creds-x509,id=t,endpoint=server,dir={server}", "--tls-creds", "t"]

    async def main() -> None:
        async with await aio.Client.connect(uri, contexts=[DEPTH], tls=tls) as secure:
            assert await secure.maps() == maps
            assert await secure.read(0, 16 << 20) == data

    with running(folder, "qemu-nbd", *common, *credentials, *image) as uri:
        with client.Client.connect(uri, contexts=[DEPTH], tls=tls) as secure:
            assert secure.export.tls
            assert secure.maps() == maps
            assert secure.read(0, 16 << 20) == data
        asyncio.run(main())
        command = [sys.executable, "-m", "qmpnbd", "map", str(NbdUri.unix(uri.path, tls=Tls()))]
        trusted = subprocess.run(
            [*command, "--tls-certificates", own, "--tls-hostname", "localhost"], check=True, capture_output=True
        )
        blind = subprocess.run(
            [*command, "--tls-certificates", own, "--tls-no-verify"], check=True, capture_output=True
        )
        wrong = subprocess.run(
            [*command, "--tls-certificates", own, "--tls-hostname", "h"], check=False, capture_output=True
        )
    assert trusted.stdout == blind.stdout != b""
    assert (wrong.returncode, wrong.stdout) == (37, b"")
