"""``qmpnbd completion``: what makes a shell complete commands and options."""

from __future__ import annotations

import argparse

from qmpnbd.cli import output

EXAMPLES = (
    ("qmpnbd completion bash > ~/.local/share/bash-completion/completions/qmpnbd", "for bash"),
    ("qmpnbd completion zsh > ~/.zfunc/_qmpnbd", "for zsh, with ~/.zfunc in fpath"),
    ("qmpnbd completion fish > ~/.config/fish/completions/qmpnbd.fish", "for fish"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser("completion")
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose script")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli.described import described
    from qmpnbd.cli.shells import SHELLS

    output.write([SHELLS[arguments.shell](described())])
    return 0
