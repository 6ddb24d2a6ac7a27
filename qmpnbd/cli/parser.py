"""The parser of the command line: it knows the chosen command only, and is helpful about typing errors."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from qmpnbd import __version__
from qmpnbd.cli.commands import COMMANDS, add_verbosity, register, verbs
from qmpnbd.cli.help import USAGE, help_text

MISSING = "the following arguments are required"
"""How argparse begins to tell it."""


class Parser(argparse.ArgumentParser):
    """A parser that asks 'did you mean' where an option is not known.

    Args:
        if_missing: what to say when an argument is missing.
        settings: of `argparse.ArgumentParser`.

    Attributes:
        given: the arguments that are parsed.
    """

    def __init__(self, *, if_missing: str = "", **settings: Any) -> None:
        settings |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**settings)
        self.given: Sequence[str] = ()
        self._if_missing = if_missing

    def format_help(self) -> str:
        """Returns the help; descriptions are filled, but for those that have lines of their own."""
        if self.description is not None and "\n" not in self.description:
            self.description = textwrap.fill(self.description, shutil.get_terminal_size().columns - 2)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Ends the process with the exit code of a usage error."""
        known = [name for action in self._actions for name in action.option_strings]
        names = [word.partition("=")[0] for word in self.given if word.startswith("--") and word != "--"]
        asked = [(name, did_you_mean(name, known)) for name in names if name not in known]
        if self._if_missing and message.startswith(MISSING):
            message += f". {self._if_missing}"
        super().error(message + "".join(f" ({name} is unknown{question})" for name, question in asked if question))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns the question whether the nearest of the known words was meant, or nothing if none is near."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def command_line(arguments: Sequence[str]) -> tuple[Parser, argparse.ArgumentParser]:
    """Makes the parser of a command line: with the command that it names, and no other.

    Returns:
        The parser, and that of the command.
    """
    root = _Root()
    root.given = arguments
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is None:
        root.parse_args(arguments)
        root.error("which COMMAND?")
    if name not in COMMANDS:
        root.error(f"there is no command {name!r}{did_you_mean(name, COMMANDS)}")
    command = register(name, _commands(root))
    for each in (command, *verbs(command).values()):
        if isinstance(each, Parser):
            each.given = arguments
    return root, command


def all_commands() -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers of all commands."""
    commands = _commands(_Root())
    return {name: register(name, commands) for name in COMMANDS}


def _commands(root: Parser) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    return root.add_subparsers(prog="qmpnbd", metavar="COMMAND", parser_class=Parser)


class _Root(Parser):
    """The parser of what stands before the command."""

    def __init__(self) -> None:
        super().__init__(prog="qmpnbd", usage=USAGE)
        self.add_argument("--version", action="version", version=f"qmpnbd {__version__}")
        add_verbosity(self)

    def format_help(self) -> str:
        """Returns the help; it has words of its own, so that it can be had without this parser."""
        return help_text()
