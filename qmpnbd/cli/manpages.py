"""Man pages in the macros of man(7), from what the parsers know; pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qmpnbd import __version__
from qmpnbd.cli.described import Argument, Command
from qmpnbd.cli.exit_codes import exit_codes
from qmpnbd.cli.help import PRECEDENCE

_WHAT = "prove that the allocation depth a running QEMU serves over NBD is what its disk images hold"


def man_pages(commands: Sequence[Command]) -> dict[str, str]:
    """Returns file name -> content: a page for all, and one for each command."""
    pages = {"qmpnbd.1": _main_page(commands)}
    return pages | {f"qmpnbd-{command.name}.1": _page(command, commands) for command in commands}


def _main_page(commands: Sequence[Command]) -> str:
    lines = [*_head("qmpnbd", _WHAT), ".SH SYNOPSIS", ".B qmpnbd", "[\\-h] [\\-\\-version] [\\-v | \\-q] COMMAND ..."]
    lines.append(".SH COMMANDS")
    for command in commands:
        lines += [".TP", f".BR qmpnbd\\-{_text(command.name)} (1)", _text(command.words)]
    lines += [".SH OPTIONS FROM ELSEWHERE", *map(_text, PRECEDENCE.splitlines())]
    lines += [
        "An option of one command is QMPNBD_COMMAND_OPTION there, and stands in the table [COMMAND] of the file;",
        "what is said for one command outweighs what is said for all.",
        ".SH EXIT STATUS",
    ]
    for code, meaning in exit_codes().items():
        lines += [".TP", f".B {code}", _text(meaning)]
    lines += [
        ".SH FILES",
        ".TP",
        ".I $XDG_CONFIG_HOME/qmpnbd/config.toml",
        "Defaults of options; $HOME/.config if XDG_CONFIG_HOME is not set. QMPNBD_CONFIG names another file.",
    ]
    return "\n".join([*lines, ""])


def _page(command: Command, commands: Sequence[Command]) -> str:
    lines = [*_head(f"qmpnbd-{command.name}", command.words), ".SH SYNOPSIS", _text(command.usage)]
    lines += [".SH DESCRIPTION", _text(command.description)]
    group = ""
    for argument in sorted(command.arguments, key=lambda each: bool(each.names)):
        if argument.group != group:
            group = argument.group
            lines.append(f".SH {_text(group).upper()}")
        lines += _argument(argument)
    lines += [".SH EXAMPLES", ".nf", *map(_text, command.examples.splitlines()[1:]), ".fi"]
    others = [f".BR qmpnbd\\-{_text(each.name)} (1)," for each in commands if each is not command]
    return "\n".join([*lines, ".SH SEE ALSO", ".BR qmpnbd (1),", *others[:-1], others[-1].removesuffix(","), ""])


def _argument(argument: Argument) -> Iterator[str]:
    value = f"\\fI{_text(argument.value)}\\fR"
    names = [f"\\fB{_text(name)}\\fR" + (f" {value}" if argument.value else "") for name in argument.names]
    yield ".TP"
    yield ", ".join(names) or value
    yield _text(argument.words)


def _head(name: str, words: str) -> list[str]:
    return [
        ".\\\" Made from the command line's parsers by scripts/update-share.",
        f'.TH {name.upper()} 1 "" "qmpnbd {__version__}" "User commands"',
        ".SH NAME",
        f"{_text(name)} \\- {_text(words)}",
    ]


def _text(text: str) -> str:
    """Returns text in which nothing is a request or an escape."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
