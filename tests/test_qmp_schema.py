"""What is said and read over QMP, against what each QEMU says of itself: ``query-qmp-schema``."""

from __future__ import annotations

import ast
import asyncio
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from qmpnbd.cli import options
from qmpnbd.deadline import Deadline
from qmpnbd.errors import CapabilityError, UnsafeOperationError
from qmpnbd.qmp import models
from qmpnbd.qmp.capabilities import HAZARDS, OVERRIDABLE, RULES, Abilities, Capability, Hazard, abilities_of, hazards_of
from qmpnbd.qmp.commands import TOLD_BY, what_tells
from qmpnbd.qmp.models import EVENTS, SchemaInfo, VersionInfo, parse_reply
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.polling import POLLED
from qmpnbd.qmp.schema import Schema
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.qmp_sites import Site, built, sites

GATES: dict[tuple[str, ...], Capability] = {
    ("blockdev-reopen",): Capability.BLOCKDEV_REOPEN,
    ("blockdev-add", "on-cbw-error"): Capability.BREAK_SNAPSHOT,
    ("blockdev-add", "cbw-timeout"): Capability.BREAK_SNAPSHOT,
    ("blockdev-add", "min-cluster-size"): Capability.MIN_CLUSTER_SIZE,
    ("blockdev-backup", "discard-source"): Capability.DISCARD_SOURCE,
    ("block-export-add", "bitmaps", "node"): Capability.BITMAP_OF_NODE,
    ("block-export-add", "bitmaps", "name"): Capability.BITMAP_OF_NODE,
}
"""Commands and arguments that not every QEMU knows, with the capability to ask for first."""

UNDESCRIBED = {"object-add"}
"""QEMU 5.2 takes the properties of an object, and describes none of them."""

COMMANDS = [*sites("execute", "command", "arguments"), *built()]
REPLIES = [site for site in sites("parse_reply", "command", "kind") if site.name]
WAITS = list(sites("events", "name", "nothing"))

_KNOWN: dict[tuple[int, int, int], tuple[Schema, Abilities]] = {}


@pytest.fixture
def known(binaries: QemuBinaries) -> tuple[Schema, Abilities]:
    """The schema of a release and what it can do; read once."""
    if binaries.version not in _KNOWN:

        async def read(monitor_path: str) -> tuple[Schema, Abilities]:
            async with await Monitor.connect(monitor_path, Deadline(30)) as monitor:
                reply = await monitor.execute("query-qmp-schema", deadline=Deadline(30))
                entries = parse_reply(list[SchemaInfo], reply, command="query-qmp-schema", where="qmp")
                return Schema(entries), abilities_of(monitor.version, Schema(entries))

        with binaries.qemu() as server:
            _KNOWN[binaries.version] = asyncio.run(read(str(server.qmp)))
    return _KNOWN[binaries.version]


def test_every_command_reply_and_event_could_be_followed() -> None:
    assert [site.where for site in [*COMMANDS, *WAITS] if not site.name] == []
    assert [site.where for site in sites("parse_reply", "command", "kind") if not site.name] == []
    assert len(COMMANDS) > 10
    assert len(REPLIES) > 7
    assert {site.name for site in WAITS} <= EVENTS.keys()


def missing(schema: Schema, abilities: Abilities, *path: str) -> bool:
    """Whether a command or argument is not there and no capability says so."""
    if schema.has_argument(*path) if path[1:] else schema.has(path[0]):
        return False
    if path[1:] and path[0] in UNDESCRIBED and abilities.version.qemu.major < 6:
        return False
    return path not in GATES or GATES[path] in abilities


def paths(name: str, node: ast.expr | None) -> Iterator[tuple[str, ...]]:
    """Every argument of a literal, those inside others as well."""
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:  # more arguments, from elsewhere
                continue
            assert isinstance(key, ast.Constant), ast.unparse(node)
            yield (name, str(key.value))
            yield from ((name, *path) for path in paths(str(key.value), value))
    elif isinstance(node, ast.List):
        for element in node.elts:
            yield from paths(name, element)


@pytest.mark.real
@each_qemu
def test_every_command_and_argument_is_there_or_gated(known: tuple[Schema, Abilities]) -> None:
    schema, abilities = known
    wrong = []
    for site in COMMANDS:
        assert site.value is None or isinstance(site.value, ast.Dict), f"{site.where}: arguments are not literal"
        arguments = [*paths(site.name, site.value), *((site.name, name) for name in site.added)]
        wrong += [f"{site.where}: {path}" for path in [(site.name,), *arguments] if missing(schema, abilities, *path)]
    wrong += [f"polling: {each.command}" for each in POLLED.values() if missing(schema, abilities, each.command)]
    assert wrong == []


@pytest.mark.real
@each_qemu
def test_no_argument_that_must_be_given_is_left_out(known: tuple[Schema, Abilities]) -> None:
    schema, _ = known
    for site in COMMANDS:
        if not schema.has(site.name):
            continue
        if isinstance(site.value, ast.Dict) and None in site.value.keys:
            continue  # more arguments, from elsewhere
        given = {path[1] for path in paths(site.name, site.value)} | site.added
        members = schema.own_members(schema.arguments_of(site.name))
        assert {name for name, member in members.items() if not member.optional} <= given, site.where


def model_of(site: Site) -> Any:
    """The model that a reply is read as."""
    assert site.value is not None
    return eval(ast.unparse(site.value), vars(models))


SOMETIMES = {"query-qmp-schema.members.type"}
"""What releases before 7.1 always had: they did not describe the members of enumerations."""

SCALARS = {str: {"str"}, int: {"int"}, bool: {"bool"}}


def differences(schema: Schema, kind: Any, type_names: set[str], place: str) -> Iterator[str]:
    """What a model and the types that it may be read from do not agree in; a model may leave things out."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    sorts = {schema.meta_type(name) for name in type_names}
    if get_origin(kind) is list:
        if sorts != {"array"}:
            yield f"{place}: no list"
            return
        (kind,) = get_args(kind)
    elif kind in SCALARS and not type_names <= SCALARS[kind] and (kind is not str or sorts != {"enum"}):
        yield f"{place}: {type_names}, and not {kind.__name__}"
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return
    owned = [schema.own_members(name) for name in type_names]
    every = [member for name in type_names for member in schema.members(name)]
    for field in kind.model_fields.values():
        name = str(field.alias)
        always = [name in own and not own[name].optional for own in owned]
        if field.is_required() and not all(always):
            yield f"{place}.{name}: need not be there"
        if not field.is_required() and all(always) and f"{place}.{name}" not in SOMETIMES:
            yield f"{place}.{name}: is always there"
        inner = {member.type for member in every if member.name == name and member.type}
        yield from differences(schema, field.annotation, inner, f"{place}.{name}") if inner else ()


@pytest.mark.real
@each_qemu
@pytest.mark.parametrize("site", REPLIES, ids=lambda site: site.where)
def test_a_reply_is_read_as_it_is_described(known: tuple[Schema, Abilities], site: Site) -> None:
    schema, _ = known
    if schema.has(site.name):
        assert list(differences(schema, model_of(site), {schema.reply_of(site.name)}, site.name)) == []


@pytest.mark.real
@each_qemu
@pytest.mark.parametrize("event", EVENTS)
def test_an_event_is_read_as_it_is_described(known: tuple[Schema, Abilities], event: str) -> None:
    schema, _ = known
    assert list(differences(schema, EVENTS[event], {schema.arguments_of(event)}, event)) == []


@pytest.mark.real
@each_qemu
def test_capabilities_appear_with_the_release_that_the_table_names(
    known: tuple[Schema, Abilities], binaries: QemuBinaries
) -> None:
    _, abilities = known
    due = {rule.capability for rule in RULES if rule.by != "wire" and binaries.version[:2] >= rule.since}
    assert abilities.found == due


def version(major: int, minor: int) -> VersionInfo:
    return VersionInfo.model_validate({"qemu": {"major": major, "minor": minor, "micro": 3}, "package": ""})


@pytest.mark.parametrize(
    ("release", "names"),
    [
        ((5, 2), []),
        ((6, 2), ["allocation-after-depth"]),
        ((7, 0), ["iothread", "server-stop", "snapshot-access"]),
        ((7, 2), ["iothread", "server-stop", "snapshot-access"]),
        ((8, 0), ["iothread", "server-stop"]),
        ((8, 2), ["iothread", "server-stop"]),
        ((9, 0), ["server-stop"]),
        ((10, 0), []),
    ],
)
def test_hazards_of_a_release(release: tuple[int, int], names: list[str]) -> None:
    assert [hazard.name for hazard in hazards_of(version(*release))] == names


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.name)
def test_a_hazard_is_refused_where_it_applies_and_nowhere_else(hazard: Hazard) -> None:
    hazard.refuse(version(*hazard.fixed), "this", where="here")
    with pytest.raises(UnsafeOperationError, match=r"^here: this, and QEMU \d+\.\d+\.3 ") as caught:
        hazard.refuse(version(*hazard.first), "this", where="here")
    assert caught.value.remedy
    hazard.refuse(version(*hazard.first), "this", where="here", allowed=[hazard.name])


def test_what_can_be_allowed_is_what_the_command_line_takes() -> None:
    assert OVERRIDABLE == options.HAZARDS


def test_what_a_qemu_cannot_do_is_refused_with_the_release_that_can() -> None:
    none = Abilities(version(5, 2), frozenset())
    with pytest.raises(CapabilityError, match=r"QEMU 5\.2\.3 cannot do this: break-snapshot .* QEMU 7\.1 and later"):
        none.require(Capability.BREAK_SNAPSHOT, where="here")
    Abilities(version(7, 1), frozenset({Capability.BREAK_SNAPSHOT})).require(Capability.BREAK_SNAPSHOT, where="here")


def test_the_documentation_has_the_same_tables() -> None:
    text = (Path(__file__).parent.parent / "docs" / "controller.md").read_text()
    for rule in RULES:
        since = f"{rule.since[0]}.{rule.since[1]}"
        assert f"| `{rule.capability.value}` | {since} | {rule.by} | {rule.what} |" in text
    for hazard in HAZARDS:
        first, fixed = (f"{release[0]}.{release[1]}" for release in (hazard.first, hazard.fixed))
        assert f"| `{hazard.name}` | {first} | {fixed} | {hazard.what} | {hazard.remedy.rstrip('.')} |" in text


def test_every_command_that_changes_something_has_what_tells_afterwards() -> None:
    """Where it was carried out or not is a question with an answer."""
    changing = {site.name for site in COMMANDS if what_tells(site.name)}
    assert changing <= TOLD_BY.keys()


@pytest.mark.real
@each_qemu
def test_what_tells_afterwards_is_there(known: tuple[Schema, Abilities]) -> None:
    schema, abilities = known
    asked = {ask.partition(" ")[0] for asks in TOLD_BY.values() for ask in asks}
    assert [name for name in [*TOLD_BY, *asked] if missing(schema, abilities, name)] == []


def test_every_capability_has_one_rule_and_every_gate_its_capability() -> None:
    assert sorted(rule.capability.value for rule in RULES) == sorted(each.value for each in Capability)
    assert set(GATES.values()) <= set(Capability)
