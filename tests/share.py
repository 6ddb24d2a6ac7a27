"""The committed man pages and completion scripts; run as a module to write them anew."""

from __future__ import annotations

import shutil
from pathlib import Path

from qmpnbd.cli.described import described
from qmpnbd.cli.manpages import man_pages
from qmpnbd.cli.shells import SHELLS

FOLDER = Path(__file__).parent.parent / "share"
COMPLETIONS = {
    "bash": "bash-completion/completions/qmpnbd",
    "zsh": "zsh/site-functions/_qmpnbd",
    "fish": "fish/vendor_completions.d/qmpnbd.fish",
}


def share() -> dict[str, str]:
    """Path below ``share`` -> content, generated from the parsers."""
    commands = described()
    found = {f"man/man1/{name}": page for name, page in man_pages(commands).items()}
    return found | {path: SHELLS[shell](commands) for shell, path in COMPLETIONS.items()}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, content in share().items():
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_text(content)


if __name__ == "__main__":
    main()
