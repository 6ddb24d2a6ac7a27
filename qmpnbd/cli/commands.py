"""The table of commands: a new command is one line here and a module of its own.

The module has ``register(commands)``, which adds the command's parser, and ``EXAMPLES``: command lines, each with what
it is for. It is imported only if its command was chosen, so that no command makes the others slower.
"""

from __future__ import annotations

# Without the modules typing and argparse, which would be the most of `qmpnbd --help`.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from types import ModuleType

COMMANDS = {
    "disks": "list the guest's disks and their backing chains",
    "graph": "show every node of the block graph, and what an export of it would say",
    "validate": "prove that the served allocation depth is what the image files hold",
    "export": "export disks for other tools, until told to stop",
    "backup": "back up disks of a running guest at one instant, and prove it",
    "checkpoint": "keep the bitmaps that incremental backups go by",
    "repository": "keep backups: create, list, check and prune",
    "bitmap": "fill a dirty bitmap",
    "status": "show what qmpnbd has in a running QEMU",
    "recover": "take down what killed runs left in a running QEMU",
    "map": "show what an NBD server says of an export",
    "info": "describe an NBD server and its exports",
    "chain": "show which layer of a backing chain holds each byte, from the files",
    "copy": "copy a disk between images, block devices and NBD exports",
    "check": "hold a qcow2 file's refcounts against what its tables refer to",
    "restore": "write a disk as it was in a backup to where it is wanted",
    "verify": "prove backups: hashes, a second reader, a boot test",
    "completion": "print what makes a shell complete commands and options",
}
"""Name -> what the command does, in the order of ``qmpnbd --help``; the module is ``qmpnbd.cli.NAME``."""


def register(name: str, commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds the parser of a command, and returns it with what every command has."""
    import importlib

    module = importlib.import_module(f"qmpnbd.cli.{name}")
    module.register(commands)
    parser = commands.choices[name]
    parser.description = parser.description or f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}."
    parser.epilog = _examples(module)
    for each in verbs(parser).values() or [parser]:
        add_verbosity(each)
    return parser


def verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers of a command's subcommands, by name; none of one that has none."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            return action.choices
    return {}


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Adds ``--verbose`` and ``--quiet``."""
    verbosity = parser.add_mutually_exclusive_group()
    verbosity.add_argument("-v", "--verbose", action="count", default=0, help="tell on stderr what is done; -vv more")
    verbosity.add_argument("-q", "--quiet", action="store_true", help="tell only errors on stderr")


def _examples(module: ModuleType) -> str:
    lines = [f"  {line}\n      {what}" for line, what in module.EXAMPLES]
    return "examples:\n" + "\n".join(lines)
