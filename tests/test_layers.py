"""The house rules on imports: they point down only, the cores do no I/O, and a start is light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "qmpnbd").rglob("*.py"))

DOORS = {"nbd.client", "nbd.aio", "nbd.runner", "nbd.aio_runner", "nbd.channel", "nbd.sockets", "nbd.aio_sockets"}
DOORS |= {"nbd.tls_socket", "nbd.stepwise", "nbd.aio_stepwise"}
DOORS |= {"qmp.transport", "qmp.direct", "qmp.dialling", "qmp.libvirt"}
DOORS |= {"qmp.monitor", "qmp.inventory", "qmp.exports", "qmp.bitmaps", "qmp.recover"}
DOORS |= {"qmp.checkpoints", "qmp.populate", "qmp.agent", "qmp.agent_journal", "qmp.quiesce"}
DOORS |= {"qmp.teardown", "qmp.process", "qmp.rundir", "qmp.server", "qmp.listeners", "qmp.credentials"}
DOORS |= {"qmp.storage_daemon"}
DOORS |= {
    "qmp.planning",
    "qmp.pointintime",
    "qmp.held",
    "qmp.scratch",
    "qmp.jobs",
    "qmp.undoing",
    "qmp.checkpoint_at",
    "qmp.rehearsal",
}
DOORS |= {"images.files", "images.layers", "images.hostfile", "images.qcow2_file"}
DOORS |= {"images.qcow2_source", "images.qcow2_metadata", "images.tabled_source", "images.check_file", "images.content"}
DOORS |= {"images.block_source", "images.members"}
"""Layer 2; everything else below nbd, qmp and images is layer 1."""

RUN_MODULES = {"validate.run", "validate.live", "validate.daemon", "validate.fleet", "validate.instant_run"}
RUN_MODULES |= {"control.populate", "export.session", "export.blocking", "export.joining"}
RUN_MODULES |= {"backup.run", "backup.begin", "backup.machine", "backup.restore", "backup.verify", "backup.instantly"}
RUN_MODULES |= {"backup.boottest"}
"""Of layer 3, those that may wait for something."""

WAITING = {"socket", "asyncio", "subprocess", "select", "selectors", "ssl", "qemu"}
SISTERS = {"nbd", "qmp", "images"}


def name_of(path: Path) -> str:
    relative = path.relative_to(ROOT / "qmpnbd").with_suffix("")
    parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
    return ".".join(parts)


def layer_of(name: str) -> int:
    package = name.partition(".")[0]
    if name in ("", "errors", "extents", "deadline", "printable"):
        return 0
    if package in SISTERS:
        return 2 if name in DOORS else 1
    if package in ("validate", "control", "export", "backup", "report"):
        return 3
    assert package in ("cli", "__main__"), f"{name} belongs to no layer of docs/design.md"
    return 4


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if (ROOT / (whole.replace(".", "/") + ".py")).exists() else str(node.module)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    own = name_of(path)
    for imported in imports_of(path):
        if imported.partition(".")[0] != "qmpnbd":
            continue
        other = imported.removeprefix("qmpnbd").removeprefix(".")
        assert layer_of(other) <= layer_of(own), f"{own} imports {other}, which is above it"
        families = {own.partition(".")[0], other.partition(".")[0]}
        if len(families & SISTERS) == 2:
            pytest.fail(f"{own} imports {other}: sisters do not know each other")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_doors_wait(path: Path) -> None:
    own = name_of(path)
    if layer_of(own) == 2 or own in RUN_MODULES or layer_of(own) == 4:
        return
    waiting = {imported.partition(".")[0] for imported in imports_of(path)} & WAITING
    assert not waiting, f"{own} imports {waiting}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_stay_where_they_belong(path: Path) -> None:
    own = name_of(path)
    used = {imported.partition(".")[0] for imported in imports_of(path)}
    if "pydantic" in used:
        assert own in {"qmp.models", "validate.plan", "validate.former", "backup.manifest"} or own.startswith(
            "report.model"
        )
    if "numpy" in used:
        assert own in {"extents", "report.strip", "report.rows"} or own.startswith(
            ("images.", "nbd.survey", "validate.", "backup.")
        )


def test_there_is_no_import_cycle() -> None:
    graph = {
        f"qmpnbd.{name_of(path)}".removesuffix("."): {
            imported for imported in imports_of(path) if imported.startswith("qmpnbd.")
        }
        for path in MODULES
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for imported in graph.get(name, ()):
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_module_is_named_after_nothing() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "util", "common", "helpers", "misc"}


def loaded_by(*arguments: str) -> set[str]:
    code = "import sys, json; sys.argv[1:] = {!r}\ntry:\n    {}\nfinally:\n    print(json.dumps(sorted(sys.modules)))"
    run = "import qmpnbd" if not arguments else "from qmpnbd.cli.main import entry; entry()"
    done = subprocess.run(
        [sys.executable, "-c", code.format(list(arguments), run)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=30,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--version",), ("validate", "--help")])
def test_a_start_is_light(arguments: tuple[str, ...]) -> None:
    assert not loaded_by(*arguments) & {"numpy", "pydantic", "qemu.qmp", "asyncio", "rich"}


def test_what_is_no_map_needs_no_numpy() -> None:
    loaded = loaded_by("info", "nbd+unix:///?socket=/nonexistent")
    assert "qmpnbd.nbd.client" in loaded
    assert not loaded & {"numpy", "qemu.qmp", "asyncio"}


def test_a_map_needs_no_monitor() -> None:
    loaded = loaded_by("map", "nbd+unix:///?socket=/nonexistent")
    assert "qmpnbd.nbd.client" in loaded
    assert not loaded & {"qemu.qmp", "asyncio"}
