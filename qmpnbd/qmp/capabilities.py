"""What a QEMU can do, and what it does wrong: the one place that knows releases; pure.

What shows in the schema is taken from there: a distribution can have it sooner, or be built without it. What does not
show is taken from the version. What only the NBD connection tells is asked there. And some things that a QEMU can do
it does wrong: those are hazards, refused by name unless somebody takes the risk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias

from qmpnbd.errors import CapabilityError, UnsafeOperationError
from qmpnbd.qmp.models import VersionInfo
from qmpnbd.qmp.schema import Schema

Release: TypeAlias = tuple[int, int]


class Capability(Enum):
    """Something that not every QEMU can do; the value is its name for people and in JSON."""

    BLOCK_EXPORT = "block-export"
    ALLOCATION_DEPTH = "allocation-depth"
    BLOCKDEV_REOPEN = "blockdev-reopen"
    COPY_BEFORE_WRITE = "copy-before-write"
    QOM_SET_DRIVE = "qom-set-drive"
    SNAPSHOT_ACCESS = "snapshot-access"
    TLS_ON_UNIX = "tls-on-unix"
    BREAK_SNAPSHOT = "break-snapshot"
    BITMAP_OF_NODE = "bitmap-of-node"
    EXTENDED_HEADERS = "extended-headers"
    DISCARD_SOURCE = "discard-source"
    MIN_CLUSTER_SIZE = "min-cluster-size"
    HANDSHAKE_LIMIT = "handshake-limit"


@dataclass(frozen=True, slots=True)
class Rule:
    """How a capability is found out.

    Attributes:
        capability: which.
        since: the first release that has it.
        what: what it is, in words.
        seen: in the schema; None where that does not show it.
        by: ``schema``, ``version``, or ``wire`` (the NBD connection tells).
    """

    capability: Capability
    since: Release
    what: str
    seen: Callable[[Schema], bool] | None = None
    by: Literal["schema", "version", "wire"] = "schema"


RULES = (
    Rule(Capability.BLOCK_EXPORT, (5, 2), "exports with an id (block-export-add)", lambda s: s.has("block-export-add")),
    Rule(
        Capability.ALLOCATION_DEPTH,
        (5, 2),
        "qemu:allocation-depth on an export",
        lambda s: s.has_argument("block-export-add", "allocation-depth"),
    ),
    Rule(
        Capability.BLOCKDEV_REOPEN,
        (6, 1),
        "changing the options of nodes in one step",
        lambda s: s.has("blockdev-reopen"),
    ),
    Rule(
        Capability.COPY_BEFORE_WRITE,
        (6, 2),
        "the copy-before-write filter as a node of one's own",
        lambda s: s.has_value("blockdev-add", "driver", "copy-before-write"),
    ),
    Rule(Capability.QOM_SET_DRIVE, (6, 2), "putting another node under a running device (qom-set drive)", by="version"),
    Rule(
        Capability.SNAPSHOT_ACCESS,
        (7, 0),
        "reading the state before copy-before-write; see the hazard of the same name",
        lambda s: s.has_value("blockdev-add", "driver", "snapshot-access"),
    ),
    Rule(Capability.TLS_ON_UNIX, (7, 0), "TLS on UNIX sockets", by="version"),
    Rule(
        Capability.BREAK_SNAPSHOT,
        (7, 1),
        "a full scratch space breaks the point in time, not the guest (on-cbw-error, cbw-timeout)",
        lambda s: s.has_argument("blockdev-add", "on-cbw-error"),
    ),
    Rule(
        Capability.BITMAP_OF_NODE,
        (7, 1),
        "exporting a bitmap that another node has",
        lambda s: s.has_argument("block-export-add", "bitmaps", "node"),
    ),
    Rule(Capability.EXTENDED_HEADERS, (8, 2), "64-bit requests and extents over NBD", by="wire"),
    Rule(
        Capability.DISCARD_SOURCE,
        (9, 1),
        "a backup job that frees what it has copied",
        lambda s: s.has_argument("blockdev-backup", "discard-source"),
    ),
    Rule(
        Capability.MIN_CLUSTER_SIZE,
        (9, 2),
        "the size of what copy-before-write copies",
        lambda s: s.has_argument("blockdev-add", "min-cluster-size"),
    ),
    Rule(
        Capability.HANDSHAKE_LIMIT,
        (10, 0),
        "how long an NBD client may take to negotiate",
        lambda s: s.has_argument("nbd-server-start", "handshake-max-seconds"),
    ),
)
"""The table; in the order of releases."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What one QEMU can do.

    Attributes:
        version: its release.
        found: its capabilities, but for those that only the NBD connection tells.
    """

    version: VersionInfo
    found: frozenset[Capability]

    def __contains__(self, capability: Capability) -> bool:
        return capability in self.found

    def require(self, capability: Capability, *, where: str) -> None:
        """Does nothing if this QEMU has a capability.

        Raises:
            CapabilityError: it does not; the message names the release that has it.
        """
        if capability in self.found:
            return
        rule = next(rule for rule in RULES if rule.capability is capability)
        raise CapabilityError(
            f"QEMU {self.version} cannot do this: {capability.value} ({rule.what})",
            where=where,
            capability=capability.value,
            remedy=f"QEMU {rule.since[0]}.{rule.since[1]} and later can.",
        )


def abilities_of(version: VersionInfo, schema: Schema) -> Abilities:
    """Finds out what a QEMU can do from what it says of itself."""
    release = version.qemu.major, version.qemu.minor
    found = {
        rule.capability
        for rule in RULES
        if (rule.seen is not None and rule.seen(schema)) or (rule.by == "version" and release >= rule.since)
    }
    return Abilities(version, frozenset(found))


@dataclass(frozen=True, slots=True)
class Hazard:
    """Something that a QEMU can do, and does wrong.

    Attributes:
        name: by which it is refused, and can be allowed.
        first: the first release that does it wrong.
        fixed: the first that does not any more.
        what: what happens.
        remedy: what to do instead.
    """

    name: str
    first: Release
    fixed: Release
    what: str
    remedy: str

    def applies(self, version: VersionInfo) -> bool:
        """Returns whether a QEMU does it wrong."""
        return self.first <= (version.qemu.major, version.qemu.minor) < self.fixed

    def refuse(self, version: VersionInfo, found: str, *, where: str, allowed: Collection[str] = ()) -> None:
        """Does nothing on a QEMU that does it right, or if the risk is taken.

        Args:
            version: the QEMU's.
            found: what of it was going to be done, as the beginning of a sentence.
            where: the disk or monitor concerned.
            allowed: names of hazards to take the risk of.

        Raises:
            UnsafeOperationError: the hazard applies.
        """
        if self.applies(version) and self.name not in allowed:
            raise UnsafeOperationError(f"{found}, and QEMU {version} {self.what}", where=where, remedy=self.remedy)


IOTHREAD = Hazard(
    "iothread",
    (7, 0),
    (9, 0),
    "aborts when an NBD client of a disk in an iothread is lost",
    "Update QEMU to 9.0 or later, or accept the risk with --allow-iothread, the same as --allow iothread.",
)
"""Measured on 7.2.22: assertion in ``nbd_blockdev_client_closed``; 5.2 and 10.0 survive. 9.0 is inferred."""

SNAPSHOT_ACCESS = Hazard(
    "snapshot-access",
    (7, 0),
    (8, 0),
    "reads some of what the guest has overwritten from the live disk: the copy would be corrupt without a word",
    "Use another recipe, update QEMU to 8.0 or later, or accept the risk with --allow snapshot-access.",
)
"""``hbitmap_status`` returned the wrong answer for a run that is dirty from its first bit and ends inside the range."""

ALLOCATION_AFTER_DEPTH = Hazard(
    "allocation-after-depth",
    (6, 2),
    (7, 0),
    "shows holes of raw files as data in base:allocation once qemu:allocation-depth was asked there",
    "Export without allocation depth, update QEMU to 7.0 or later, or accept it with --allow allocation-after-depth.",
)
"""The block status cache, new in 6.2, kept answers to the question that does not look for zeroes."""

SERVER_STOP = Hazard(
    "server-stop",
    (7, 0),
    (10, 0),
    "stands still for ever, the guest too, if its NBD server is stopped while a client is in option haggling",
    "End that client; qmpnbd waits for it, and leaves the server up if it stays.",
)
"""Measured on 7.2.22; 5.2 and 10.0 go on. 8 and 9 are taken for affected."""

HAZARDS = (ALLOCATION_AFTER_DEPTH, IOTHREAD, SERVER_STOP, SNAPSHOT_ACCESS)
"""Every known one; a guest that migrates is refused on any release (`qmpnbd.qmp.inventory.require_safe_moment`)."""


OVERRIDABLE = tuple(hazard.name for hazard in HAZARDS if "--allow" in hazard.remedy)
"""Names that can be allowed; the others are not refused but waited for."""


def hazards_of(version: VersionInfo) -> tuple[Hazard, ...]:
    """Returns the hazards of a QEMU."""
    return tuple(hazard for hazard in HAZARDS if hazard.applies(version))
