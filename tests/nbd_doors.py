"""The two doors as one function each, so that every test can run through both and compare."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import QmpnbdError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import aio
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri
from tests.hostile_nbd import BASE, DEPTH

Outcome = dict[str, ExtentMap] | QmpnbdError | None
Door = Callable[..., list[Outcome]]
LONG, SHORT = 20.0, 0.2


def blocking(
    uri: str | NbdUri, *steps: str, contexts: Sequence[str] = (DEPTH, BASE), seconds: float = LONG
) -> list[Outcome]:
    """Connects and takes the steps, each one's outcome or error; an error of connecting is raised."""
    outcomes: list[Outcome] = []
    deadline = Deadline(seconds)
    with Client.connect(uri, contexts=contexts, deadline=deadline) as client:
        for step in steps:
            try:
                if step == "maps":
                    outcomes.append(client.maps(deadline))
                else:
                    client.flush(deadline)
                    outcomes.append(None)
            except QmpnbdError as error:
                outcomes.append(error)
    return outcomes


def awaited(
    uri: str | NbdUri, *steps: str, contexts: Sequence[str] = (DEPTH, BASE), seconds: float = LONG
) -> list[Outcome]:
    """The same through asyncio."""

    async def main() -> list[Outcome]:
        outcomes: list[Outcome] = []
        deadline = Deadline(seconds)
        async with await aio.Client.connect(uri, contexts=contexts, deadline=deadline) as client:
            for step in steps:
                try:
                    if step == "maps":
                        outcomes.append(await client.maps(deadline))
                    else:
                        await client.flush(deadline)
                        outcomes.append(None)
                except QmpnbdError as error:
                    outcomes.append(error)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return outcomes

    return asyncio.run(main())


both_doors = pytest.mark.parametrize("door", [blocking, awaited])
