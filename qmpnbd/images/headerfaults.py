"""What can be wrong with the header of an image that is not qcow2, said in the same words for all formats."""

from __future__ import annotations

from qmpnbd.errors import ImageCorruptError, ImageTruncatedError, ImageUnsupportedError
from qmpnbd.images.qcow2_format import CHECK, CUT

_CONVERT = "'qemu-img convert' makes a qcow2 image of it."


def need(data: bytes, length: int, where: str) -> None:
    """Raises ImageTruncatedError if a header has fewer than `length` bytes."""
    if len(data) < length:
        raise ImageTruncatedError(f"the file ends at byte {len(data)}, inside its header", where=where, remedy=CUT)


def not_like(kind: str, where: str) -> ImageUnsupportedError:
    """Returns the error for a file that lacks the magic of its format."""
    what = f"the image is said to be {kind}, but does not start like one"
    return ImageUnsupportedError(what, where=where, remedy="Name its true format.")


def unsupported(what: str, where: str) -> ImageUnsupportedError:
    """Returns the error for what the format allows, but is not read here."""
    return ImageUnsupportedError(what, where=where, remedy=_CONVERT)


def corrupt(
    field: str, offset: int, value: int, where: str, *, what: str = "a value that cannot be", structure: str = "header"
) -> ImageCorruptError:
    """Returns the error for a field that contradicts the format.

    Args:
        field: its name in the format's specification.
        offset: where in the file it lies.
        value: what it says.
        where: the file, for messages.
        what: the contradiction.
        structure: what the field is part of.
    """
    return ImageCorruptError(
        what, where=where, structure=f"{structure} field {field}", offset=offset, value=value, remedy=CHECK
    )
