"""What is compared; pure.

::

    depth      qemu:allocation-depth   which layer holds each byte
    base       base:allocation         data, zeroes or a hole
    bitmaps    qemu:dirty-bitmap:NAME  persistent bitmaps of the active layer that can be relied on
    content    bytes                   none of them, a sample, or all
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from qmpnbd.errors import UsageError
from qmpnbd.report.contexts import CONTENT

ContentMode: TypeAlias = Literal["none", "sample", "whole"]

MAPS = ("depth", "base", "bitmaps")
MODES: tuple[ContentMode, ...] = get_args(ContentMode)


@dataclass(frozen=True, slots=True)
class Choice:
    """What to compare.

    Attributes:
        depth: allocation depth.
        base: base:allocation.
        bitmaps: dirty bitmaps.
        content: how many of the bytes.
        seed: chooses the sample: the same one for the same disk every time.
    """

    depth: bool = True
    base: bool = True
    bitmaps: bool = True
    content: ContentMode = "sample"
    seed: int = 0

    @classmethod
    def of(cls, maps: Iterable[str], content: ContentMode = "sample", seed: int = 0) -> Choice:
        """Makes a choice of the names in `MAPS`.

        Raises:
            UsageError: an unknown name, or nothing at all is to be compared.
        """
        names = set(maps)
        if unknown := names - set(MAPS):
            what = f"{min(unknown)!r} cannot be compared"
            raise UsageError(what, where="what to compare", remedy=f"Choose from {', '.join(MAPS)}.")
        if not names and content == "none":
            remedy = f"Choose from {', '.join(MAPS)}, or compare content."
            raise UsageError("nothing is to be compared", where="what to compare", remedy=remedy)
        return cls("depth" in names, "base" in names, "bitmaps" in names, content, seed)

    def __str__(self) -> str:
        maps = [name for name in MAPS if getattr(self, name)]
        seed = f",seed={self.seed}" if self.content == "sample" else ""
        return ",".join([*maps, f"content={self.content}{seed}"])

    @classmethod
    def parse(cls, text: str) -> Choice | None:
        """Reads what ``str`` wrote; None for anything else."""
        words = dict(word.partition("=")[::2] for word in text.split(","))
        content = next((mode for mode in MODES if mode == words.get(CONTENT)), None)
        seed = words.get("seed", "0")
        if content is None or not seed.isdecimal():
            return None
        choice = cls("depth" in words, "base" in words, "bitmaps" in words, content, int(seed))
        return choice if str(choice) == text else None

    def covers(self, other: Choice) -> bool:
        """Returns whether all that `other` compares is compared by this one, too."""
        if any(getattr(other, name) and not getattr(self, name) for name in MAPS):
            return False
        if self.content == other.content == "sample":
            return self.seed == other.seed
        return MODES.index(self.content) >= MODES.index(other.content)
