"""``python -m qmpnbd``."""

from qmpnbd.cli.main import entry

if __name__ == "__main__":
    entry()
