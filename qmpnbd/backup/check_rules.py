"""What can be wrong in a repository; pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Rule(StrEnum):
    """What a finding is about."""

    MANIFEST = "manifest"
    """Missing, cut, edited, or that of another backup."""
    ORDER = "order"
    """A backup before it is missing or foreign."""
    FOREIGN = "foreign"
    """Something that belongs to no backup."""
    UNFINISHED = "unfinished"
    """What a killed run left; `Repository.recover` removes it."""
    FILE = "file"
    """A file is missing, cut, rotten, or no file."""
    HASHES = "hashes"
    """The hashes are missing, rotten, or not those of the manifest."""
    IMAGE = "image"
    """The image is damaged, or not what manifest and hashes say."""
    CONTENT = "content"
    """Data is not what its hash says."""
    BASE = "base"
    """What a layer stands on is missing or damaged."""
    TEMPLATE = "template"
    """The template of a shallow layer is missing or was changed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
        rule: what it is about.
        chain: the chain; empty if it is in none.
        backup: id of the backup; empty if it is in none.
        disk: the disk; empty if it concerns none.
        where: the file or folder.
        what: what is wrong.
        offset: first byte of the disk that it concerns; None if it concerns all of it, or none.
        end: the byte after the last one; None likewise.
    """

    rule: Rule
    chain: str
    backup: str
    disk: str
    where: str
    what: str
    offset: int | None = None
    end: int | None = None
