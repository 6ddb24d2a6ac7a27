"""What the scripts promise to somebody who has only just cloned the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BACKUPS = ("backup-rounds", "backup-cuts", "compare-peers")
SCRIPTS = [ROOT / "scripts" / name for name in ("setup", "test", "check", "demo", "soak", *BACKUPS)]
MADE = {".git", ".work", "dist", "__pycache__", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache"}


def texts() -> Iterator[tuple[Path, str]]:
    """Every file of the project that is text; also where it is no git checkout."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in MADE and not name.endswith(".egg-info")]
        for name in names:
            path = Path(folder, name)
            try:
                yield path.relative_to(ROOT), path.read_text()
            except (UnicodeDecodeError, FileNotFoundError):
                continue


def requirements(profile: str) -> dict[str, list[str]]:
    """Name to the hashes it is pinned by."""
    text = (ROOT / "requirements" / f"{profile}.txt").read_text()
    pins: dict[str, list[str]] = {}
    for block in re.split(r"\n(?=[a-z0-9])", text):
        match = re.match(r"([a-z0-9-]+)==\S+", block)
        if match:
            pins.setdefault(match[1], []).extend(re.findall(r"--hash=sha256:([0-9a-f]{64})", block))
    return pins


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_is_executable_strict_and_parses(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert os.access(script, os.X_OK)
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here")
    done = subprocess.run(["shellcheck", str(script)], check=False, capture_output=True, text=True)
    assert done.stdout == ""


def test_ci_runs_what_people_run() -> None:
    commands = [
        line for line in (ROOT / ".ci/run").read_text().splitlines()[1:] if not line.startswith(("set ", "cd "))
    ]
    assert commands == ["exec ./scripts/test"]


def test_tests_end_with_pytests_own_words() -> None:
    assert (ROOT / "scripts/test").read_text().splitlines()[-1].startswith("exec .work/venv/bin/python -m pytest")


@pytest.mark.parametrize("arguments", [[], ["everything"]])
def test_setup_says_how_it_is_used(arguments: list[str]) -> None:
    done = subprocess.run([ROOT / "scripts/setup", *arguments], check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: scripts/setup demo|test" in done.stderr
    assert done.stdout == ""


def test_everything_that_is_made_is_ignored_by_git() -> None:
    assert "/.work/" in (ROOT / ".gitignore").read_text().splitlines()


class TestRequirements:
    @pytest.mark.parametrize("profile", ["demo", "test"])
    def test_every_package_is_pinned_by_hash(self, profile: str) -> None:
        pins = requirements(profile)
        assert len(pins) > 10
        assert all(pins.values())

    def test_they_hold_what_the_project_declares(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        names = {
            "demo": [*project["project"]["dependencies"], *project["build-system"]["requires"], "editables"],
            "test": project["dependency-groups"]["dev"],
        }
        for profile, declared in names.items():
            wanted = {re.split(r"[^\w.-]", line)[0].lower().replace(".", "-").replace("_", "-") for line in declared}
            assert wanted <= set(requirements(profile)), f"make requirements/{profile}.txt anew, see its first lines"

    def test_test_holds_all_of_demo(self) -> None:
        demo, test = requirements("demo"), requirements("test")
        assert {name: sorted(test.get(name, [])) for name in demo} == {n: sorted(hashes) for n, hashes in demo.items()}


class TestNothingOfOneMachine:
    """A clone must work anywhere: with the reader's paths, the reader's package sources."""

    def test_no_path_of_this_machine(self) -> None:
        own = [str(ROOT)]
        if len(Path.home().parts) > 1:
            own.append(str(Path.home()) + "/")
        pattern = re.compile(r"(?<![\w.}*$/-])(?:" + "|".join(map(re.escape, own)) + ")")
        found = [f"{path}: {match[0]}" for path, text in texts() for match in pattern.finditer(text)]
        assert found == []

    def test_no_package_source_is_chosen(self) -> None:
        """Where packages come from is the machine's business: pip's and apt's own configuration."""
        choosing = re.compile(
            r"--(?:extra-)?index-url|--find-links|--trusted-host|^\s*-[if]\s+\w+:|sources\.list|\[\[?tool\.uv\.index"
        )
        for path, text in texts():
            if path.parts[0] in {"scripts", "requirements", ".ci", "vm-images"} or path.name == "pyproject.toml":
                assert not choosing.search(text), path
                if path.suffix != ".md" and path.name != "pyproject.toml":
                    assert not re.search("(?:https?|ftp|file)://", text), f"{path}: an address"

    def test_no_host_that_this_machine_gets_packages_from(self) -> None:
        hosts = set(configured_hosts())
        if not hosts:
            pytest.skip("this machine names no package sources")
        found = [f"{path}: {host}" for path, text in texts() for host in hosts if host in text]
        assert found == []


def configured_hosts() -> Iterator[str]:
    """Hosts that apt and pip are configured with here."""
    files = [Path("/etc/apt/sources.list"), Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf"]
    files += Path("/etc/apt/sources.list.d").glob("*")
    configured = [value for name, value in os.environ.items() if name.startswith("PIP_")]
    for file in files:
        if file.is_file() and os.access(file, os.R_OK):
            configured.append(file.read_text(errors="replace"))
    for text in configured:
        yield from re.findall(r"\bhttps?://(?:[^/\s@]*@)?([\w-]+(?:\.[\w-]+)+)", text)
