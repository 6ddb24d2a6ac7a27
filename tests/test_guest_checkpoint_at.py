"""Increments of a guest that writes pairs of records all the time: each holds exactly what was written between."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.export.session import Options, exporting
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.aio import Client
from qmpnbd.qmp.checkpoint_at import NextCheckpoint
from qmpnbd.qmp.plan import Recipe
from tests.dying import CHAIN, wishes_for
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server
from tests.test_pointintime_guest import DISKS, RECORD, SIZE, go_on, marked, needs_a_kernel, records_in, writing_guest

SOON = Deadline(None)  # pytest bounds each test

pytestmark = [pytest.mark.real, pytest.mark.timeout(300), needs_a_kernel]


@dataclass(frozen=True)
class Taken:
    """What a backup would have copied.

    Attributes:
        base: the checkpoint that the increment counts from.
        number: the checkpoint that began.
        records: number -> offset, for each disk.
        increments: what was frozen of the bitmap, for each disk; none if it was to be a full backup.
    """

    base: int | None
    number: int
    records: list[dict[int, int]]
    increments: list[ExtentMap]


async def take(server: Server, folder: Path, recipe: Recipe, decision: str) -> Taken:
    wish = NextCheckpoint(CHAIN, granularity=RECORD)
    choice = Options(instant=wishes_for(recipe, folder), checkpoint=wish, runtime_dir=str(folder))
    async with exporting(str(server.qmp), DISKS, choice) as session:
        begun = session.checkpoint
        assert begun is not None
        await asyncio.to_thread(go_on, server)
        records, increments = [], []
        for export in session.exports:
            contexts = [f"qemu:dirty-bitmap:{name}" for name in export.bitmaps]
            async with await Client.connect(export.uri, contexts=contexts) as client:
                records.append(records_in(bytes(await client.read(0, SIZE))))
                increments += list((await client.maps()).values()) if contexts else []
        await asyncio.to_thread(go_on, server)
        await {"commit": session.commit, "abort": session.abort}[decision](SOON)
    base = begun.disks[0].base
    return Taken(base.number if base else None, begun.number, records, increments)


@each_qemu
@pytest.mark.parametrize("recipe", list(Recipe))
def test_an_increment_holds_exactly_what_was_written_since_its_base(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    """Committed: the next one holds later writes only. Aborted: the next one holds those of the aborted one, too."""
    with writing_guest(binaries, folder) as (server, _):
        go_on(server)
        taken = []
        for decision in ("commit", "commit", "abort", "abort", "commit"):
            taken.append(asyncio.run(take(server, folder, recipe, decision)))
            go_on(server)
        assert server.side("query-status")["status"] == "running"
    assert [(each.base, each.number) for each in taken] == [(None, 1), (1, 2), (2, 3), (2, 3), (2, 3)]
    by_base = {1: taken[0], 2: taken[1]}
    for each in taken[1:]:
        assert max(each.records[0]) - max(each.records[1]) in (0, 1), "the disks show two instants"
        assert each.base is not None
        for old, new, increment in zip(by_base[each.base].records, each.records, each.increments, strict=True):
            since = [place for number, place in new.items() if number > max(old)]
            assert len(since) > 20
            assert increment == marked(since)
