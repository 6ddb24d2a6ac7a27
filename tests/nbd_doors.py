"""The two doors as one function each, so that every test can run through both and compare."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import QmpnbdError
from qmpnbd.nbd import aio
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri
from tests.hostile_nbd import BASE, DEPTH

Outcome = Any
Step = str | tuple[Any, ...]
Door = Callable[..., list[Any]]
LONG, SHORT = 20.0, 0.2


def _taken(step: Step, seconds: float) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Returns a step as the method to call, and what with: ``"maps"``, ``("read", 0, 1)``, ``("trim", 0, 1, {})``."""
    name, *arguments = (step,) if isinstance(step, str) else step
    named = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    return name, tuple(arguments), {"deadline": Deadline(seconds)} | named


def blocking(
    uri: str | NbdUri, *steps: Step, contexts: Sequence[str] = (DEPTH, BASE), seconds: float = LONG, **options: Any
) -> list[Outcome]:
    """Connects and takes the steps, each one's outcome or error; an error of connecting is raised."""
    outcomes: list[Outcome] = []
    with Client.connect(uri, contexts=contexts, deadline=Deadline(seconds), **options) as client:
        for step in steps:
            name, arguments, named = _taken(step, seconds)
            try:
                outcome = getattr(client, name)(*arguments, **named)
                if name == "chunks":
                    outcome = [(offset, bytes(view)) for offset, view in outcome]
                outcomes.append(outcome)
            except QmpnbdError as error:
                outcomes.append(error)
    return outcomes


def awaited(
    uri: str | NbdUri, *steps: Step, contexts: Sequence[str] = (DEPTH, BASE), seconds: float = LONG, **options: Any
) -> list[Outcome]:
    """The same through asyncio."""

    async def main() -> list[Outcome]:
        outcomes: list[Outcome] = []
        connecting = aio.Client.connect(uri, contexts=contexts, deadline=Deadline(seconds), **options)
        async with await connecting as client:
            for step in steps:
                name, arguments, named = _taken(step, seconds)
                try:
                    outcome = getattr(client, name)(*arguments, **named)
                    if name == "chunks":
                        outcomes.append([(offset, bytes(view)) async for offset, view in outcome])
                    else:
                        outcomes.append(await outcome)
                except QmpnbdError as error:
                    outcomes.append(error)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return outcomes

    return asyncio.run(main())


both_doors = pytest.mark.parametrize("door", [blocking, awaited])
