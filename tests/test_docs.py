"""What docs/nbd-support.md says is so: the tests it names exist, and nothing of the protocol's numbers is left out."""

from __future__ import annotations

import ast
import re
from enum import Enum
from pathlib import Path

import pytest

from qmpnbd import errors
from qmpnbd.nbd import client, constants, limits, sockets, stepwise, survey, tls_socket, transfer
from qmpnbd.nbd.quirks import Quirk

TESTS = Path(__file__).parent
LINES = (TESTS.parent / "docs" / "nbd-support.md").read_text().splitlines()
NAMED = re.compile(r"`(test_\w+)::(test_\w+)`")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("| ")]
SECTIONS = dict(row for row in ROWS if len(row) == 2)
FEATURES = [row for row in ROWS if len(row) == 5 and row[1] != "qmpnbd"]

# As the specification calls them.
PREFIXES: dict[type[Enum], str] = {
    constants.HandshakeFlag: "NBD_FLAG_",
    constants.Option: "NBD_OPT_",
    constants.OptionReplyType: "NBD_REP_",
    constants.Info: "NBD_INFO_",
    constants.TransmissionFlag: "NBD_FLAG_",
    constants.Command: "NBD_CMD_",
    constants.CommandFlag: "NBD_CMD_FLAG_",
    constants.ChunkFlag: "NBD_REPLY_FLAG_",
    constants.ChunkType: "NBD_REPLY_TYPE_",
    constants.WireError: "NBD_",
}
LIMITS = {
    name: f"{value:.0f}" if isinstance(value, float) else str(value)
    for module in (constants, limits, sockets, client, stepwise, survey, transfer, tls_socket)
    for name, value in vars(module).items()
    if name.startswith(("MAX_", "MOST_")) or name.endswith("_PATIENCE")
}


def functions_of(module: str) -> set[str]:
    """Returns the tests of a module that pytest would collect outside classes."""
    path = TESTS / f"{module}.py"
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_is_named_exists() -> None:
    named = {match for line in LINES for match in NAMED.findall(line)}
    missing = [f"{module}::{test}" for module, test in sorted(named) if test not in functions_of(module)]
    assert not missing
    assert len(named) > 50


def test_every_test_that_guarantees_something_of_backups_exists() -> None:
    named = set(NAMED.findall((TESTS.parent / "docs" / "backup.md").read_text()))
    assert [f"{module}::{test}" for module, test in sorted(named) if test not in functions_of(module)] == []
    assert len(named) > 20


def test_every_yes_names_a_test_and_every_no_a_reason() -> None:
    assert len(FEATURES) > 100
    for feature, ours, *_ in FEATURES:
        reason = re.match(r"no\b[^:]*: \w", ours)
        shown = re.match(r"yes\b", ours) and NAMED.search(ours)
        assert reason or shown, f"{feature}: {ours}"


@pytest.mark.parametrize("kind", PREFIXES, ids=lambda kind: kind.__name__)
def test_every_number_of_the_protocol_is_there(kind: type[Enum]) -> None:
    expected = {PREFIXES[kind] + member.name for member in kind}
    assert expected <= {row[0] for row in FEATURES}


def test_every_quirk_is_there() -> None:
    assert {quirk.name for quirk in Quirk} <= {row[0] for row in ROWS if len(row) == 3}


def test_every_limit_is_there_with_its_value() -> None:
    told = {row[0]: row[1].split()[0].replace(",", "") for row in ROWS if len(row) == 3}
    assert {name: told.get(name) for name in LIMITS} == LIMITS


def test_every_section_of_the_specification_is_somewhere_below() -> None:
    """Its 49 headings, by hand: whoever finds a new one there finds it a place here."""
    headings = {line.removeprefix("## ") for line in LINES if line.startswith("## ")}
    del SECTIONS["section"]
    assert set(SECTIONS.values()) <= headings | {"nothing to do"}
    assert len(SECTIONS) == 49


def test_only_rows_of_tables_are_long() -> None:
    assert [line for line in LINES if len(line) > 120 and not line.startswith("| ")] == []


def test_every_test_that_the_document_on_backups_names_exists() -> None:
    text = (TESTS.parent / "docs" / "backup.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    modules = {path.stem for path in TESTS.glob("test_*.py")}
    there = {test for module in modules for test in functions_of(module)}
    assert named - there - modules == set()
    assert len(named) > 20


def test_an_exit_code_beside_an_error_is_that_of_the_error() -> None:
    text = "\n".join(path.read_text() for path in sorted((TESTS.parent / "docs").glob("*.md")))
    told = re.findall(r"`(\w+Error)`[^|\n]*\| (\d+) \|$", text, re.MULTILINE)
    told += re.findall(r"`(\w+Error)`\s\(exit\scode\s(\d+)\)", text)
    told += [(name, code) for code, name in re.findall(r"\(exit\scode\s(\d+),\s`(\w+Error)`\)", text)]
    assert [(name, code) for name, code in told if getattr(errors, name).exit_code != int(code)] == []
    assert len(told) > 10
