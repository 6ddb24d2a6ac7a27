"""A boot sector that says a few words on the serial line, and a guest with a kernel that does."""

from __future__ import annotations

from pathlib import Path

# xor ax, ax; mov ds, ax; mov si, text; mov dx, 0x3f8; again: lodsb; test al, al; jz end; out dx, al; jmp again;
# end: hlt; jmp end
_CODE = bytes.fromhex("31c0 8ed8 be187c baf803 ac 84c0 7403 ee ebf8 f4 ebfd")
_TEXT_AT = 0x18

SAYS = "backup boots"


def boot_sector(text: str = SAYS) -> bytes:
    """Returns the first sector of a disk that a BIOS boots from; it says the text on the first serial line."""
    sector = _CODE.ljust(_TEXT_AT, b"\x90") + text.encode() + b"\r\n\0"
    return sector.ljust(510, b"\0") + b"\x55\xaa"


def write_sector(folder: Path, text: str = SAYS) -> str:
    """Returns a command of qemu-io that writes the sector."""
    path = folder / "sector"
    path.write_bytes(boot_sector(text))
    return f"write -s {path} 0 512"
