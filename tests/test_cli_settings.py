"""Options from the command line, the environment and a file, and what is said about typing errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from qmpnbd.cli.commands import COMMANDS, verbs
from qmpnbd.cli.main import main
from qmpnbd.cli.parser import all_commands, command_line
from qmpnbd.cli.settings import parse
from qmpnbd.errors import UsageError

ROOT = Path(__file__).parent.parent


def parsed(*arguments: str, **environment: str) -> dict[str, object]:
    return vars(parse(*command_line(arguments), arguments, environment))


def file(folder: Path, text: str) -> str:
    (folder / "config.toml").write_text(text)
    return str(folder / "config.toml")


def test_command_line_before_environment_before_file_before_default(tmp_path: Path) -> None:
    path = file(tmp_path, "timeout = 40\n[disks]\nqmp = '/file'\n")
    line = ["disks", "--timeout", "10"]
    environment = {"QMPNBD_TIMEOUT": "20", "QMPNBD_CONFIG": path}
    for given, variables, timeout in (
        (line, environment, 10),
        (line[:1], environment, 20),
        (line[:1], {"QMPNBD_CONFIG": path}, 40),
    ):
        assert parsed(*given, **variables)["timeout"] == timeout
    assert parsed("disks", "--qmp", "x")["timeout"] == 30


def test_what_is_said_for_one_command_outweighs_what_is_said_for_all(tmp_path: Path) -> None:
    path = file(tmp_path, "timeout = 40\nqmp = 'x'\n[validate]\ntimeout = 50\n[map]\ntimeout = 60\n")
    assert parsed("validate", QMPNBD_CONFIG=path)["timeout"] == 50
    assert parsed("disks", QMPNBD_CONFIG=path)["timeout"] == 40
    both = {"QMPNBD_VALIDATE_TIMEOUT": "1", "QMPNBD_TIMEOUT": "2", "QMPNBD_CONFIG": path}
    assert parsed("validate", **both)["timeout"] == 1
    assert parsed("disks", **both)["timeout"] == 2


def test_every_kind_of_option(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "verbose = 2\n[map]\ncontext = ['a', 'b']\ntotals = true\noffset = 4096\n"
        "[chain]\nqemu = '10.0'\nbitmaps = false\nnbdinfo-text = true\n",
    )
    found = parsed("map", "nbd://x", QMPNBD_CONFIG=path)
    assert (found["context"], found["totals"], found["offset"], found["verbose"]) == (["a", "b"], True, 4096, 2)
    assert parsed("map", "nbd://x", "--context", "c", QMPNBD_CONFIG=path)["context"] == ["c"]
    found = parsed("chain", "x", QMPNBD_CONFIG=path)
    assert (found["qemu"], found["bitmaps"], found["nbdinfo_text"]) == ("10.0", False, True)
    assert parsed("map", "x", QMPNBD_MAP_TOTALS="yes")["totals"] is True
    assert parsed("map", "x", QMPNBD_MAP_TOTALS="0")["totals"] is False


def test_options_that_exclude_each_other_are_decided_where_they_are_said_first(tmp_path: Path) -> None:
    path = file(tmp_path, "json = true\n")
    assert parsed("map", "x", QMPNBD_CONFIG=path)["json"] is True
    found = parsed("map", "x", "--nbdinfo", QMPNBD_CONFIG=path)
    assert (found["json"], found["nbdinfo"]) == (False, True)


def test_the_file_is_where_xdg_says(tmp_path: Path) -> None:
    for variables, folder in (
        ({"XDG_CONFIG_HOME": f"{tmp_path}/xdg", "HOME": f"{tmp_path}/home"}, "xdg"),
        ({"HOME": f"{tmp_path}/home"}, "home/.config"),
    ):
        (tmp_path / folder / "qmpnbd").mkdir(parents=True)
        file(tmp_path / folder / "qmpnbd", f"qmp = '{folder}'")
        assert parsed("disks", **variables)["qmp"] == folder
    assert parsed("disks", "--qmp", "x", QMPNBD_CONFIG="", HOME=f"{tmp_path}/home")["qmp"] == "x"


MISTAKES = {
    "no TOML": ("timeout = \n", "not a TOML file: Invalid value (at line 1, column 11)"),
    "no number": ("timeout = 'soon'\n", "timeout: 'soon' is not a number of seconds"),
    "no scalar": ("timeout = [1]\n", "timeout: [1] is no value of this option"),
    "no flag": ("json = 'maybe'\n", "json: 'maybe' is neither true nor false"),
    "no choice": ("[disks]\nverbose = 'x'\n", "[disks] verbose: invalid literal"),
    "unknown key": ("timeot = 1\n", "'timeot' is not known here; did you mean timeout? Correct it"),
    "unknown table": ("[dsks]\n", "'dsks' is not known here; did you mean disks?"),
    "unknown key of a command": ("[disks]\nrounds = 3\n", "[disks]: 'rounds' is not known here"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_the_file_is_told_with_its_place(case: str, tmp_path: Path) -> None:
    text, words = MISTAKES[case]
    path = file(tmp_path, text)
    with pytest.raises(UsageError) as told:
        parsed("disks", "--qmp", "x", QMPNBD_CONFIG=path)
    assert str(told.value).startswith(path)
    assert words in str(told.value)


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        parsed("disks", "--qmp", "x", QMPNBD_CONFIG=str(tmp_path / "none"))


def test_a_mistake_in_the_environment_is_told_with_its_name() -> None:
    with pytest.raises(UsageError, match="environment variable QMPNBD_TIMEOUT: 'x' is not a number of seconds"):
        parsed("disks", "--qmp", "x", QMPNBD_TIMEOUT="x")
    with pytest.raises(UsageError, match="'x' is not a whole number of 0 or more"):
        parsed("repository", "prune", "x", QMPNBD_KEEP_LAST="x")
    with pytest.raises(UsageError, match=r"QMPNBD_CHAIN_QEMU: '1' is none of: 5\.2, 7\.2, 10\.0"):
        parsed("chain", "x", QMPNBD_CHAIN_QEMU="1")


def test_options_of_other_commands_at_the_top_of_the_file_are_no_mistake(tmp_path: Path) -> None:
    assert parsed("disks", "--qmp", "x", QMPNBD_CONFIG=file(tmp_path, "rounds = 3\ntls-no-verify = true\n"))


@pytest.mark.parametrize("arguments", [["--verbose", "--help"], ["disks", "--help"]])
def test_help_is_to_be_had_whatever_is_wrong_elsewhere(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QMPNBD_CONFIG", file(tmp_path, "?"))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def test_help_is_the_same_wherever_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--quiet", "-h"])
    assert capsys.readouterr().out == shown
    root = command_line(["disks"])[0]
    for action in root._actions:
        assert all(name in shown for name in action.option_strings)
        assert not action.option_strings or str(action.help) in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["valdate"], "there is no command 'valdate'; did you mean validate?"),
        (["disks", "--qmp", "x", "--jsn"], "--jsn is unknown; did you mean --json?"),
        (["disks", "--qm=x"], "--qm is unknown; did you mean --qmp?"),
        (["repository", "list", "x", "--jsn"], "--jsn is unknown; did you mean --json?"),
        (["map", "x", "--contxt", "y"], "--contxt is unknown; did you mean --context?"),
        (["chain", "--", "x", "--jsn"], "unrecognized arguments: --jsn"),
        ([], "which COMMAND?"),
    ],
)
def test_did_you_mean(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_every_command_has_examples_that_its_own_parser_takes() -> None:
    for name, parser in all_commands().items():
        assert parser.epilog is not None
        examples = [line.split() for line in parser.epilog.splitlines() if line.startswith("  qmpnbd ")]
        assert examples, name
        for _, command, *arguments in examples:
            assert command == name
            until = arguments.index(">") if ">" in arguments else len(arguments)
            parsed(name, *arguments[:until])


def test_every_command_has_verbosity_and_all_that_wait_have_a_timeout() -> None:
    for name, command in all_commands().items():
        for parser in verbs(command).values() or [command]:
            options = {option for action in parser._actions for option in action.option_strings}
            assert {"--help", "--verbose", "--quiet"} <= options
            assert name == "completion" or "--timeout" in options


def test_options_of_subcommands_can_be_set_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[checkpoint]\nchain = "nightly"\nkeep = true\n')
    environment = {"QMPNBD_CONFIG": str(tmp_path / "config.toml"), "QMPNBD_CHECKPOINT_QMP": "/nowhere"}
    for verb, has_keep in (("create", True), ("commit", False)):
        arguments = ["checkpoint", verb]
        root, command = command_line(arguments)
        parsed = parse(root, command, arguments, environment)
        assert (parsed.qmp, parsed.chain, parsed.operation) == ("/nowhere", "nightly", verb)
        assert getattr(parsed, "keep", None) is (True if has_keep else None)


def modules(*arguments: str, environment: Mapping[str, str]) -> set[str]:
    run = f"from qmpnbd.cli.main import main; main({list(arguments)!r})"
    code = f"import sys\ntry:\n    {run}\nfinally:\n    print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=30,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_little() -> None:
    """What stands here makes the difference between twice as long as a bare Python and five times."""
    environment = {**os.environ, "QMPNBD_CONFIG": ""}
    loaded = modules("--help", environment=environment)
    assert "qmpnbd.cli.help" in loaded
    heavy = {"typing", "dataclasses", "inspect", "logging", "traceback", "shutil", "pathlib", "tomllib", "difflib"}
    heavy |= {"signal", "textwrap", "argparse"}
    assert not loaded & (heavy | {"contextlib", "datetime", "json", "asyncio", "numpy", "pydantic", "subprocess"})
    assert {name for name in loaded if name.startswith("qmpnbd.")} == {
        "qmpnbd.cli",
        "qmpnbd.cli.commands",
        "qmpnbd.cli.exit_codes",
        "qmpnbd.cli.help",
        "qmpnbd.cli.main",
        "qmpnbd.cli.output",
        "qmpnbd.errors",
        "qmpnbd.printable",
    }


def test_a_command_loads_no_other() -> None:
    loaded = modules("disks", "--help", environment={**os.environ, "QMPNBD_CONFIG": ""})
    assert {f"qmpnbd.cli.{name}" for name in COMMANDS} & loaded == {"qmpnbd.cli.disks"}
