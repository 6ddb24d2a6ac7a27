"""What the parsers know, as values: for completion scripts and man pages."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from qmpnbd.cli.commands import COMMANDS, verbs
from qmpnbd.cli.parser import all_commands

_FILES = {"FILE", "IMAGE", "ADDRESS", "REPORT", "SOURCE", "TARGET"}
_FOLDERS = {"DIR", "REPOSITORY", "REPO"}


@dataclass(frozen=True, slots=True)
class Argument:
    """An option or a positional argument.

    Attributes:
        names: the option's names, short ones first; none for a positional argument.
        value: what stands for its value (``SECONDS``); empty for a flag.
        words: what it is for.
        choices: the values it can have; none if there are others.
        files: ``file`` or ``folder`` if the value names one, else empty.
        group: the title of the group of options that it belongs to.
    """

    names: tuple[str, ...]
    value: str
    words: str
    choices: tuple[str, ...]
    files: str
    group: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command.

    Attributes:
        name: as on the command line.
        words: what it does, in a line.
        usage: the arguments.
        description: what it does, in sentences.
        examples: command lines as ``--help`` shows them.
        arguments: all there are.
    """

    name: str
    words: str
    usage: str
    description: str
    examples: str
    arguments: tuple[Argument, ...]

    @property
    def options(self) -> tuple[Argument, ...]:
        """The arguments that have names."""
        return tuple(each for each in self.arguments if each.names)


def described() -> tuple[Command, ...]:
    """Returns all commands."""
    return tuple(
        Command(
            name=name,
            words=COMMANDS[name],
            usage="; ".join(_usage(each) for each in verbs(parser).values() or [parser]),
            description=" ".join((parser.description or "").split()),
            examples=parser.epilog or "",
            arguments=tuple(dict.fromkeys(_all_arguments(parser))),
        )
        for name, parser in all_commands().items()
    )


def _usage(parser: argparse.ArgumentParser) -> str:
    return " ".join(parser.format_usage().removeprefix("usage: ").split())


def _all_arguments(parser: argparse.ArgumentParser) -> Iterator[Argument]:
    """Yields the arguments of a command and of its subcommands."""
    for each in (parser, *verbs(parser).values()):
        yield from _arguments(each)


def _arguments(parser: argparse.ArgumentParser) -> Iterator[Argument]:
    for group in parser._action_groups:
        for action in group._group_actions:
            value = "" if action.nargs == 0 else action.metavar or ",".join(map(str, action.choices or ()))
            yield Argument(
                names=tuple(action.option_strings),
                value=value if isinstance(value, str) else " ".join(value),
                words=action.help or "",
                choices=tuple(map(str, action.choices or ())),
                files=_files(action, value),
                group=group.title or "",
            )


def _files(action: argparse.Action, value: object) -> str:
    # What validate takes are images and folders of them, or disks.
    if value in _FILES or (value == "NAME" and not action.option_strings):
        return "file"
    return "folder" if value in _FOLDERS else ""
