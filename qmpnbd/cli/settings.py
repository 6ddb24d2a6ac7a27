"""Options from elsewhere: the environment and a file.

Precedence: command line, environment, file, default. An option is known by its long name, the same for all commands
or for one::

    qmpnbd validate --timeout 60
    QMPNBD_VALIDATE_TIMEOUT=60     before  QMPNBD_TIMEOUT=60
    [validate] timeout = 60        before  timeout = 60 at the top of the file

The file is ``$XDG_CONFIG_HOME/qmpnbd/config.toml`` or what ``QMPNBD_CONFIG`` names; empty for none.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qmpnbd.cli.commands import COMMANDS, verbs
from qmpnbd.cli.parser import Parser, all_commands, did_you_mean
from qmpnbd.errors import UsageError

_NOT_SET = {"--help", "--version"}
_YES_NO = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
_MAX_BYTES = 1 << 20
"""Of the file: more than anybody writes by hand."""

_REMEDY = "Correct it there (QMPNBD_CONFIG= in the environment goes without a file)."


def parse(
    root: Parser, command: argparse.ArgumentParser, arguments: Sequence[str], environment: Mapping[str, str]
) -> argparse.Namespace:
    """Parses a command line, and fills in what it leaves open.

    Args:
        root: the parser.
        command: the parser of the command that `arguments` name.
        arguments: the command line.
        environment: as `os.environ`.

    Raises:
        UsageError: the environment or the file has a mistake.
    """
    if {"-h", "--help"} & set(arguments):
        root.parse_args(arguments)  # which ends the process, whatever is wrong elsewhere
    name = command.prog.rpartition(" ")[2]
    chosen = _chosen(command, arguments)
    elsewhere = {**_from_file(name, chosen, environment), **_from_environment(name, chosen, environment)}
    defaults = {action.dest: action.default for action in chosen._actions}
    for action in (*root._actions, *command._actions, *chosen._actions):
        action.default = argparse.SUPPRESS
        action.required = action.required and action.dest not in elsewhere
    for group in chosen._mutually_exclusive_groups:
        group.required = group.required and not any(action.dest in elsewhere for action in group._group_actions)
    parsed, rest = root.parse_known_args(arguments)
    if rest:
        chosen.error(f"unrecognized arguments: {' '.join(rest)}")
    _fill_in(parsed, chosen, elsewhere)
    for dest, default in defaults.items():
        if dest not in parsed and default is not argparse.SUPPRESS:
            setattr(parsed, dest, default)
    return parsed


def _chosen(command: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Returns the parser of the subcommand that is named, or of the command if it has none or none is named."""
    words = [word for word in arguments if not word.startswith("-")]
    return verbs(command).get(words[1], command) if len(words) > 1 else command


def _fill_in(parsed: argparse.Namespace, command: argparse.ArgumentParser, elsewhere: Mapping[str, Any]) -> None:
    given = set(vars(parsed))
    for group in command._mutually_exclusive_groups:
        members = {action.dest for action in group._group_actions}
        if members & given:
            given |= members  # what excludes each other is decided where it is said first
    for dest, value in elsewhere.items():
        if dest not in given:
            setattr(parsed, dest, value)


def _options(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Returns the options that can be set elsewhere, by their long names without dashes; of subcommands as well."""
    return {
        name.removeprefix("--"): action
        for parser in (command, *verbs(command).values())
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--") and name not in _NOT_SET
    }


def _from_environment(
    command_name: str, command: argparse.ArgumentParser, environment: Mapping[str, str]
) -> dict[str, Any]:
    found = {}
    for prefix in ("QMPNBD_", f"QMPNBD_{_variable(command_name)}_"):  # the second outweighs the first
        for name, action in _options(command).items():
            variable = prefix + _variable(name)
            if variable in environment:
                found[action.dest] = _value(action, environment[variable], f"environment variable {variable}")
    return found


def _variable(name: str) -> str:
    return name.upper().replace("-", "_")


def _from_file(command_name: str, command: argparse.ArgumentParser, environment: Mapping[str, str]) -> dict[str, Any]:
    path = _file(environment)
    content = _read(path) if path else {}
    options, found = _options(command), {}
    for key, value in content.items():
        if isinstance(value, dict):
            _require(key, COMMANDS, path)
        elif key in options:
            found[options[key].dest] = _value(options[key], value, f"{path}: {key}")
        else:
            _require(key, {name for parser in all_commands().values() for name in _options(parser)}, path)
    for key, value in content.get(command_name, {}).items():
        where = f"{path}: [{command_name}]"
        if key not in options:
            _require(key, _options(all_commands()[command_name]), where)
            continue  # of another subcommand
        found[options[key].dest] = _value(options[key], value, f"{where} {key}")
    return found


def _file(environment: Mapping[str, str]) -> str:
    """Returns the name of the file; empty for none. One that was named must be there."""
    named = environment.get("QMPNBD_CONFIG")
    if named is not None:
        return named
    home = environment.get("XDG_CONFIG_HOME") or f"{environment.get('HOME', '')}/.config"
    path = Path(home, "qmpnbd", "config.toml")
    return str(path) if path.exists() else ""


def _read(path: str) -> dict[str, Any]:
    import tomllib

    try:
        with Path(path).open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise UsageError(f"the file has more than {_MAX_BYTES} bytes", where=path, remedy=_REMEDY)
        return tomllib.loads(text.decode())
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=path, remedy=_REMEDY) from error
    except ValueError as error:  # not UTF-8, or not TOML: which says the line
        raise UsageError(f"not a TOML file: {error}", where=path, remedy=_REMEDY) from error


def _require(key: str, known: Iterable[str], where: str) -> None:
    if key not in known:
        raise UsageError(f"{key!r} is not known here{did_you_mean(key, known)}", where=where, remedy=_REMEDY)


def _value(action: argparse.Action, given: Any, where: str) -> Any:
    """Returns the value of an option from what stands in the environment (a string) or in the file."""
    if isinstance(action, argparse._CountAction):
        return _converted(int, given, where)
    if action.nargs == 0:
        wanted = given if isinstance(given, bool) else _YES_NO.get(str(given).lower())
        if wanted is None:
            raise UsageError(f"{given!r} is neither true nor false", where=where, remedy=_REMEDY)
        return action.const if wanted else action.default
    if isinstance(action, argparse._AppendAction):
        return [_one(action, each, where) for each in (given if isinstance(given, list) else [given])]
    return _one(action, given, where)


def _one(action: argparse.Action, given: Any, where: str) -> Any:
    value = _converted(action.type if callable(action.type) else str, given, where)
    if action.choices is not None and value not in action.choices:
        known = ", ".join(map(str, action.choices))
        raise UsageError(f"{given!r} is none of: {known}", where=where, remedy=_REMEDY)
    return value


def _converted(kind: Callable[[str], Any], given: Any, where: str) -> Any:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise UsageError(f"{given!r} is no value of this option", where=where, remedy=_REMEDY)
    try:
        return kind(str(given))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UsageError(str(error), where=where, remedy=_REMEDY) from error
