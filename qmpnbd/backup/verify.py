"""Verification: that a repository holds what was backed up, shown in more than one way.

::

    check            manifests, order, files, tables, every piece against its hash      our own reader
    second reader    every byte that either reader calls data, compared                 QEMU, over NBD
    boot test        a guest says its marker                                            QEMU, on a throw-away overlay

What a check has found to be broken is not handed to QEMU: the names in its headers may lead anywhere. A checksum that
is missing is a fault like one that is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.boottest import BootImage, BootOptions, BootResult, boot_test
from qmpnbd.backup.check import Checked, check
from qmpnbd.backup.check_rules import Rule
from qmpnbd.backup.content import DATA, ZERO
from qmpnbd.backup.layers import RestoreSource
from qmpnbd.backup.point import Point, opened, point_of
from qmpnbd.backup.proof import ranges_of
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.sources import NbdSource
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageUnreadableError, NbdError, RepositoryDamagedError, UsageError
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.storage_daemon import PROGRAM
from qmpnbd.validate.content import differences
from qmpnbd.validate.daemon import Daemon
from qmpnbd.validate.live import in_thread

Which = Literal["none", "newest", "all"]

MAX_DIFFERENCES = 100
"""Runs of differing blocks that are told of one disk."""


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How to verify.

    Attributes:
        chain: only this chain; empty for all of them.
        backup: for the second reader and the boot test only this backup, whatever `second_reader` says; empty for none
            in particular.
        second_reader: which backups of a chain QEMU reads, too.
        boot: how to boot the newest backup of each chain; None not to.
        template: the image that shallow backups stand on; empty if there is none.
        program: the storage daemon.
        runtime_dir: where private directories are made; None for the folder for temporary files.
    """

    chain: str = ""
    backup: str = ""
    second_reader: Which = "newest"
    boot: BootOptions | None = None
    template: str = ""
    program: str = PROGRAM
    runtime_dir: str | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """Bytes for which QEMU and our own reader disagree, or what one of them cannot read.

    Attributes:
        offset: first byte; None if it concerns all of the disk.
        end: the byte after the last one.
        what: what is wrong.
    """

    offset: int | None
    end: int | None
    what: str


@dataclass(frozen=True, slots=True)
class SecondReading:
    """A disk of a backup that QEMU read, too.

    Attributes:
        point: the disk.
        bytes: bytes that were compared.
        differences: what is wrong, the first `MAX_DIFFERENCES`.
    """

    point: Point
    bytes: int
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class Boot:
    """A boot test of a backup."""

    backup: Backup
    result: BootResult


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that could not be judged.

    Attributes:
        chain: the chain.
        backup: id of the backup.
        what: what was left out, and why.
    """

    chain: str
    backup: str
    what: str


@dataclass(frozen=True, slots=True)
class Verified:
    """The result.

    Attributes:
        checked: what the check found.
        qemu: version of the second reader; empty if there was none.
        readings: what it read.
        boots: the boot tests.
        skipped: what could not be judged.
        seconds: how long it took.
    """

    checked: Checked
    qemu: str
    readings: tuple[SecondReading, ...]
    boots: tuple[Boot, ...]
    skipped: tuple[Skipped, ...]
    seconds: float

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong; what killed runs left is not."""
        failed = any(each.differences for each in self.readings) or not all(each.result.reached for each in self.boots)
        return not failed and all(each.rule is Rule.UNFINISHED for each in self.checked.findings)


async def verify(path: str, options: VerifyOptions, deadline: Deadline) -> Verified:
    """Verifies a repository; nobody can prune it meanwhile.

    Args:
        path: its folder.
        options: how.
        deadline: for all of it.

    Raises:
        NoSuchBackupError: there is no such repository, chain or backup.
        RepositoryBusyError: backups are just being removed.
        RepositoryDamagedError: it cannot be read at all, or is to be recovered first.
        UsageError: a program is missing.
        MonitorError: the storage daemon does not do what it is told.
        DeadlineError: the time is over.
    """
    began = time.monotonic()
    repository = Repository.open(Path(path))
    with repository.reading():
        work = partial(check, repository, options.chain or None, content=True, deadline=deadline)
        work_done = _Verification(await in_thread(work, deadline), options, deadline)
        work_done.choose(repository)
        await work_done.read_again()
        await work_done.boot()
    return work_done.result(time.monotonic() - began)


class _Verification:
    """A verification after its check."""

    def __init__(self, checked: Checked, options: VerifyOptions, deadline: Deadline) -> None:
        self._checked = checked
        self._options = options
        self._deadline = deadline
        self._skipped: list[Skipped] = []
        self._readings: list[SecondReading] = []
        self._boots: list[Boot] = []
        self._qemu = ""
        self._to_read: list[Backup] = []
        self._to_boot: list[Backup] = []

    def choose(self, repository: Repository) -> None:
        """Chooses the backups that QEMU shall read and boot from."""
        for chain, found in self._checked.found.items():
            whole = [each.backup for each in found if each.backup is not None]
            if self._options.backup:
                whole = [repository.find(chain, self._options.backup)]
            if self._options.second_reader != "none":
                self._to_read += whole if self._options.second_reader == "all" else whole[-1:]
            if self._options.boot is not None:
                self._to_boot += whole[-1:]

    async def read_again(self) -> None:
        """Has QEMU read what was chosen."""
        points = [point for backup in self._to_read for point in self._sound(backup)]
        if not points:
            return
        daemon = await Daemon.start(self._options.program, self._options.runtime_dir)
        try:
            self._qemu = str(daemon.monitor.version)
            for point in points:
                self._readings.append(await self._read_point(daemon, point))
        finally:
            await daemon.stop()

    def _sound(self, backup: Backup) -> Iterator[Point]:
        """Yields the disks of a backup that the check found nothing wrong with; tells the others."""
        manifest = backup.manifest
        for disk in manifest.disks:
            if (manifest.chain, manifest.id, disk.name) in self._checked.broken:
                what = f"disk {disk.name}: not read by QEMU, because of what was found"
                self._skipped.append(Skipped(manifest.chain, manifest.id, what))
                continue
            try:
                yield point_of(backup, disk.name, self._options.template)
            except UsageError as error:
                what = f"disk {disk.name}: {error.what}. {error.remedy}"
                self._skipped.append(Skipped(manifest.chain, manifest.id, what))

    async def _read_point(self, daemon: Daemon, point: Point) -> SecondReading:
        image = str(point.image.absolute())
        try:
            async with daemon.serving(image, "qcow2", [], self._deadline) as uri:
                return await in_thread(partial(compare, uri, point, self._deadline), self._deadline)
        except ImageUnreadableError as error:
            return SecondReading(point, 0, (Difference(None, None, error.what),))

    async def boot(self) -> None:
        """Boots from what was chosen."""
        options = self._options.boot
        for backup in self._to_boot if options is not None else ():
            points = list(self._sound(backup))
            if len(points) < len(backup.manifest.disks):
                result = BootResult(False, "not tried: a disk is damaged, or cannot be judged", "")
            else:
                images = [BootImage(str(point.image.absolute()), point.disk.size) for point in points]
                result = await boot_test(images, options or BootOptions(""), self._deadline)
            self._boots.append(Boot(backup, result))

    def result(self, seconds: float) -> Verified:
        """Returns what came out."""
        return Verified(
            self._checked,
            self._qemu,
            tuple(self._readings),
            tuple(self._boots),
            tuple(dict.fromkeys(self._skipped)),
            seconds,
        )


def compare(uri: NbdUri, point: Point, deadline: Deadline) -> SecondReading:
    """Compares a disk as QEMU serves it with what our own reader finds, hashed; blocking.

    Args:
        uri: where QEMU serves it.
        point: the disk.
        deadline: for all of it.

    Raises:
        DeadlineError: the time is over.
    """
    try:
        with opened(point, deadline) as source, NbdSource.connect(uri, deadline=deadline) as served:
            return _compared(served, source, point, deadline)
    except (RepositoryDamagedError, NbdError) as error:
        return SecondReading(point, 0, (Difference(None, None, f"{error.where}: {error.what}"),))


def _compared(served: NbdSource, source: RestoreSource, point: Point, deadline: Deadline) -> SecondReading:
    wanted = source.content(deadline)
    # QEMU rounds the size of a disk up to whole sectors.
    told = served.content(deadline).resized(wanted.size, ZERO)
    either = wanted.combine(told, lambda ours, theirs: (ours == DATA) | (theirs == DATA))
    found: list[Difference] = []
    done = 0
    for offset, theirs in served.chunks(ranges_of(either, 1), deadline):
        for _, ours in source.chunks([(offset, len(theirs))], deadline):
            if len(found) < MAX_DIFFERENCES and not np.array_equal(theirs, ours):
                for each in differences(offset, theirs, bytes(ours)):
                    what = f"QEMU reads {each.served:#04x} where {each.computed:#04x} was backed up"
                    found.append(Difference(each.offset, each.end, what))
        done += len(theirs)
    return SecondReading(point, done, tuple(found[:MAX_DIFFERENCES]))
