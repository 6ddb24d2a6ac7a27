"""The blocking and the asyncio door are one interface: who knows the one knows the other."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from qmpnbd.nbd import aio, aio_stepwise, client, stepwise

PAIRS = [(client.Client, aio.Client), (stepwise.Negotiation, aio_stepwise.Negotiation)]
both_pairs = pytest.mark.parametrize(("blocking", "awaited"), PAIRS, ids=["Client", "Negotiation"])
AT_ONCE = {"agreed", "duplicate"}
"""What waits for nothing, so that nobody needs to await it."""


def public(door: type) -> dict[str, Any]:
    """Returns what a class offers, as it is defined, with the names that `with` uses made one."""
    found = {}
    for name, member in vars(door).items():
        plain = name.replace("__a", "__") if name in {"__aenter__", "__aexit__"} else name
        if not name.startswith("_") or plain in {"__enter__", "__exit__"}:
            found[plain] = member
    return found


def function(member: Any) -> Any:
    """Returns the function behind a method, class method or property."""
    return member.fget if isinstance(member, property) else getattr(member, "__func__", member)


@both_pairs
def test_they_offer_the_same_in_the_same_way(blocking: type, awaited: type) -> None:
    one, other = public(blocking), public(awaited)
    assert {name: type(member) for name, member in one.items()} == {
        name: type(member) for name, member in other.items()
    }
    assert len(one) > 10


@both_pairs
def test_parameters_defaults_and_types_are_the_same(blocking: type, awaited: type) -> None:
    for name, member in public(blocking).items():
        mine, other = (inspect.signature(function(each)) for each in (member, public(awaited)[name]))
        assert [(p.name, p.kind, p.default, p.annotation) for p in mine.parameters.values()] == [
            (p.name, p.kind, p.default, p.annotation) for p in other.parameters.values()
        ], name
        assert mine.return_annotation == other.return_annotation.removeprefix("Async"), name


@both_pairs
def test_whatever_waits_is_awaited(blocking: type, awaited: type) -> None:
    for name, member in public(awaited).items():
        waits = inspect.iscoroutinefunction(function(member)) or inspect.isasyncgenfunction(function(member))
        assert waits == (not isinstance(member, property) and name not in AT_ONCE), name
    for name, member in public(blocking).items():
        assert not inspect.iscoroutinefunction(function(member)), name


@both_pairs
def test_arguments_results_and_errors_are_told_in_the_same_words(blocking: type, awaited: type) -> None:
    def told(member: Any) -> list[str]:
        return (inspect.getdoc(function(member)) or "").split("\n\n")[1:]

    for name, member in public(blocking).items():
        sections = [part for part in told(member) if part.startswith(("Args:", "Returns:", "Raises:", "Yields:"))]
        for section in sections:
            assert section in told(public(awaited)[name]), name
