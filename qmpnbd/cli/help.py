"""What ``qmpnbd --help`` says; without argparse, which takes half as long as a bare Python."""

from __future__ import annotations

from qmpnbd.cli.commands import COMMANDS
from qmpnbd.cli.exit_codes import exit_code_help

USAGE = "qmpnbd [-h] [--version] [-v | -q] COMMAND ..."

PRECEDENCE = """\
Options can also stand in the environment (QMPNBD_TIMEOUT, QMPNBD_VALIDATE_ROUNDS) and in
$XDG_CONFIG_HOME/qmpnbd/config.toml; the command line outweighs the environment, that the file.
"""
"""Where options can stand besides the command line."""

_TEXT = """\
usage: {usage}

Prove that the allocation depth a running QEMU serves over NBD is what its disk images hold.

commands (`qmpnbd COMMAND --help` tells more):
{commands}

options:
  -h, --help     show this help message and exit
  --version      show program's version number and exit
  -v, --verbose  tell on stderr what is done; -vv more
  -q, --quiet    tell only errors on stderr

{precedence}
{exit_codes}
"""


def help_text() -> str:
    """Returns the help."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return _TEXT.format(usage=USAGE, commands=commands, precedence=PRECEDENCE, exit_codes=exit_code_help())
