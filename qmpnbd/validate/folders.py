"""Which files of a folder are images to be validated.

The rules: regular files whose first bytes are those of a format that is read here (qcow2, qed, vmdk, vdi, luks), and
those that are called ``.raw``, ``.img`` or ``.qcow2`` whatever their bytes. Folders below are looked into; names that
begin with a dot and symbolic links are passed over. Each image is a disk of its own, also one that is another one's
backing file. In the order of their names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from qmpnbd.errors import ImageUnreadableError, ImageUnsupportedError
from qmpnbd.images.formats import PROBE_LENGTH, probe
from qmpnbd.validate.target import ImageTarget

ENDINGS = {".raw": "raw", ".img": "raw", ".qcow2": "qcow2"}
"""Names of images, and the format of a file of such a name whose bytes tell none; of a .qcow2 its error will tell."""

_REMEDY = "Name the images one by one, or run as a user who may read the folder."


def absolute(path: str) -> str:
    """Returns an absolute name; ``..`` stays, because what it leads to depends on links."""
    return os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118 - a path object would tidy the name


def images_in(folder: str) -> Iterator[ImageTarget]:
    """Yields the images in a folder and the folders below it.

    Raises:
        ImageUnreadableError: a folder cannot be read; so that no image is passed over without a word.
    """
    waiting = _listed(folder)
    while waiting:  # a loop, because folders can be nested deeper than calls
        entry = waiting.pop()
        if entry.is_dir(follow_symlinks=False):
            waiting += _listed(entry.path)
        elif entry.is_file(follow_symlinks=False) and (image_format := _format_of(entry)):
            yield ImageTarget(absolute(entry.path), image_format, entry.path)


def _listed(folder: str) -> list[os.DirEntry[str]]:
    """Returns what is in a folder, the last name first."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        what = f"the folder cannot be read: {error.strerror}"
        raise ImageUnreadableError(what, where=folder, remedy=_REMEDY) from error
    return sorted(entries, key=lambda each: each.name, reverse=True)


def _format_of(entry: os.DirEntry[str]) -> str:
    """Returns the format of an image; empty for other files."""
    called = next((found for ending, found in ENDINGS.items() if entry.name.endswith(ending)), "")
    try:
        with open(entry.path, "rb") as file:  # noqa: PTH123 - a name that need not be text
            found = probe(file.read(PROBE_LENGTH), entry.path, entry.path)
    except (ImageUnsupportedError, OSError):
        return called
    return called if found == "raw" else found
