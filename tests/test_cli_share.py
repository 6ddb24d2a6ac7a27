"""What the package installs beside itself: man pages, and completion as the shells themselves do it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from qmpnbd.cli.commands import COMMANDS
from qmpnbd.cli.described import described
from tests.share import COMPLETIONS, FOLDER, share

PAGES = sorted((FOLDER / "man/man1").iterdir())

BASH = """
compopt() { :; }
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_qmpnbd
printf '%s\\n' "${COMPREPLY[@]}"
"""


def have(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"no {program} here")
    return found


def test_what_is_committed_is_what_the_parsers_say() -> None:
    files = {str(path.relative_to(FOLDER)): path.read_text() for path in FOLDER.rglob("*") if path.is_file()}
    assert files == share(), "run scripts/update-share"


def test_a_wheel_puts_all_of_it_where_the_system_looks(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("the build backend is not installed here")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=FOLDER.parent, timeout=60)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as wheel:
        names = {name.partition(".data/data/")[2] for name in wheel.namelist()}
    assert {f"share/{name}" for name in share()} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_man_pages_are_without_fault(page: Path) -> None:
    done = subprocess.run([have("mandoc"), "-T", "lint", page], check=False, capture_output=True, text=True)
    # A date would differ from build to build.
    assert [line for line in done.stdout.splitlines() if "missing date" not in line and "STYLE" not in line] == []


def test_man_pages_tell_every_option() -> None:
    for command in described():
        done = subprocess.run(
            [have("mandoc"), "-T", "ascii", FOLDER / f"man/man1/qmpnbd-{command.name}.1"],
            check=True,
            capture_output=True,
            text=True,
        )
        shown = subprocess.run(["col", "-b"], input=done.stdout, check=True, capture_output=True, text=True).stdout
        for argument in command.arguments:
            assert all(name in shown for name in argument.names)
            assert argument.value in shown
        assert all(line.strip() in shown for line in command.examples.splitlines()[1:])


def bash(*words: str) -> list[str]:
    script = FOLDER / COMPLETIONS["bash"]
    done = subprocess.run(
        [have("bash"), "-c", BASH, "bash", script, *words],
        check=True,
        capture_output=True,
        text=True,
        cwd=FOLDER.parent,
    )
    assert done.stderr == ""
    return done.stdout.split()


def fish(*words: str) -> list[str]:
    code = f"source {FOLDER / COMPLETIONS['fish']}; complete -C '{' '.join(words)}'"
    with tempfile.TemporaryDirectory() as home:  # which fish writes to
        done = subprocess.run(
            [have("fish"), "--no-config", "-c", code],
            check=True,
            capture_output=True,
            text=True,
            cwd=FOLDER.parent,
            env={**os.environ, "HOME": home, "XDG_CONFIG_HOME": home},
        )
    return [line.partition("\t")[0] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("complete", [bash, fish])
class TestCompletion:
    def test_commands(self, complete: object) -> None:
        assert callable(complete)
        assert set(COMMANDS) <= set(complete("qmpnbd", ""))
        assert complete("qmpnbd", "val") == ["validate"]

    def test_options_of_the_command_and_no_others(self, complete: object) -> None:
        assert callable(complete)
        assert complete("qmpnbd", "validate", "--rou") == ["--rounds"]
        assert complete("qmpnbd", "disks", "--rou") == []

    def test_values(self, complete: object) -> None:
        assert callable(complete)
        assert set(complete("qmpnbd", "chain", "--qemu", "")) == {"5.2", "7.2", "10.0"}
        assert set(complete("qmpnbd", "completion", "")) == {"bash", "zsh", "fish"}

    def test_files(self, complete: object) -> None:
        assert callable(complete)
        assert "README.md" in complete("qmpnbd", "check", "READ")
        assert [word.rstrip("/") for word in complete("qmpnbd", "validate", "--runtime-dir", "tes")] == ["tests"]

    @pytest.mark.parametrize("words", [["validate"], ["copy"], ["copy", "x"], ["restore", "x", "latest"]])
    def test_files_and_folders_that_a_command_is_for(self, complete: object, words: list[str]) -> None:
        assert callable(complete)
        assert "README.md" in complete("qmpnbd", *words, "READ")

    @pytest.mark.parametrize("words", [["backup"], ["verify"], ["repository", "list"]])
    def test_repositories(self, complete: object, words: list[str]) -> None:
        assert callable(complete)
        assert [word.rstrip("/") for word in complete("qmpnbd", *words, "tes")] == ["tests"]
        assert complete("qmpnbd", *words, "READ") == []

    def test_subcommands(self, complete: object) -> None:
        assert callable(complete)
        assert complete("qmpnbd", "repository", "li") == ["list"]
        assert complete("qmpnbd", "checkpoint", "li") == ["list"]


def test_zsh_offers_the_same(tmp_path: Path) -> None:
    """In a real zsh on a terminal of its own (zsh/zpty): completion works nowhere else."""
    script = f"""
zmodload zsh/zpty
zpty shell {have("zsh")} -f -i
zpty -w shell 'PS1="" TERM=dumb; unsetopt zle_bracketed_paste; fpath=({FOLDER}/zsh/site-functions $fpath)'
zpty -w shell 'autoload -Uz compinit; compinit -u -D; zstyle ":completion:*" list-colors ""; print rea""dy'
zpty -r -m shell seen '*ready*'
zpty -w -n shell 'qmpnbd val'$'\\t'
zpty -r -m shell seen '*validate *' && print validate
zpty -w -n shell '--rou'$'\\t'
zpty -r -m shell seen '*--rounds*' && print rounds
zpty -w -n shell $'\\x15qmpnbd repository lis\\ttes\\t'
zpty -r -m shell seen '*list *tests/*' && print tests
zpty -d shell
"""
    done = subprocess.run(
        [have("zsh"), "-f", "-c", script], check=False, capture_output=True, text=True, timeout=60, cwd=FOLDER.parent
    )
    assert done.stdout.split() == ["validate", "rounds", "tests"], done.stderr
