"""Guessing a format from the first bytes of a file, as QEMU does where no format is recorded."""

from __future__ import annotations

from qmpnbd.errors import ImageUnsupportedError
from qmpnbd.images.chain import Format
from qmpnbd.images.names import READ_FORMATS

PROBE_LENGTH = 512  # what QEMU reads to guess a format

_MAGICS = (
    (0, b"QFI\xfb\x00\x00\x00\x01", "qcow (version 1)"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"QED\x00", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)
_QCOW2 = b"QFI\xfb"
_DESCRIPTOR_VERSIONS = (b"version=1", b"version=2", b"version=3")


def probe(start: bytes, path: str, where: str) -> Format:
    """Guesses the format of a file.

    Args:
        start: the first `PROBE_LENGTH` bytes of the file, or the whole of a shorter one.
        path: the file's name: QEMU knows some formats by it.
        where: the file, for messages.

    Raises:
        ImageUnsupportedError: a format that is not read here.
    """
    found = next((name for at, magic, name in _MAGICS if start[at : at + len(magic)] == magic), None)
    if found is None and start.startswith(_QCOW2):
        return "qcow2"
    if found is None and _is_vmdk_descriptor(start):
        found = "vmdk"
    if found is None and path.endswith(".dmg"):
        found = "dmg"
    if found is None:
        return "raw"
    for known in READ_FORMATS:
        if found == known:
            return known
    raise ImageUnsupportedError(
        f"it looks like the format {found}, which is not read here",
        where=where,
        remedy="If it is raw all the same, say so: --format raw, or 'qemu-img rebase -u -F raw' on its overlay.",
    )


def _is_vmdk_descriptor(start: bytes) -> bool:
    """Whether the first line that is neither blank nor a comment says the version of a VMDK descriptor."""
    lines = (line.strip(b" \r") for line in start.split(b"\n"))
    return next((line for line in lines if line and not line.startswith(b"#")), b"") in _DESCRIPTOR_VERSIONS
