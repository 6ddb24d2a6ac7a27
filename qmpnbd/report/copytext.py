"""What was copied, as text, without pydantic: loading that takes longer than many a copy."""

from __future__ import annotations

from qmpnbd.backup.destination import Form
from qmpnbd.backup.whole_copy import WholeCopy
from qmpnbd.printable import printable
from qmpnbd.report.sizes import human_size


def copy_text(source: str, target: str, form: Form, done: WholeCopy) -> str:
    """Returns the result of a copy; the arguments are those of `qmpnbd.report.copy.copy_document`."""
    copied = done.copied
    proved = ""
    if done.read_back_bytes is not None:
        proved = f"; {human_size(done.read_back_bytes)} read back and proved"
    before = f"; {human_size(done.resumed_bytes)} of data were there already" if done.resumed_bytes else ""
    return (
        f"{printable(source)}: copied to {printable(target)} ({form})\n"
        f"  {human_size(done.size)}: {human_size(copied.data_bytes)} of data and "
        f"{human_size(copied.zero_bytes)} of zeroes, in {copied.seconds:.1f} s{before}{proved}\n"
    )
