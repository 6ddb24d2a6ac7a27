"""Restore of a whole machine: a folder with all disks of one instant, its NVRAM, and what was told of it.

::

    machine/vd0.qcow2  vd1.qcow2       the disks, each flat; or with chain a folder of layers each
            pflash1.nvram.raw          firmware variables, as they were
            machine.json               what QEMU told of the machine, and its command line

Everything is proved as a single disk is, and the folder gets its name when all of it was.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.destination import Destination, Form
from qmpnbd.backup.fingerprint import chunks_of
from qmpnbd.backup.manifest import ExtraFile
from qmpnbd.backup.newfile import NewFile
from qmpnbd.backup.newfolder import new_folder
from qmpnbd.backup.point import LATEST, Wanted, chosen_chain
from qmpnbd.backup.prove_layer import prove_extra
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.restore import Restored, RestoreOptions, restore
from qmpnbd.backup.template import template_for
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageError, RepositoryDamagedError
from qmpnbd.printable import printable

_ENDINGS: Final[dict[Form, str]] = {"raw": ".raw", "qcow2": ".qcow2", "chain": ""}


@dataclass(frozen=True, slots=True)
class WantedMachine:
    """What is asked for.

    Attributes:
        repository: its folder.
        backup: an id, a number, ``latest`` or a time.
        chain: the chain; empty for the only one.
        templates: what shallow backups stand on (`qmpnbd.backup.template.template_for`).
    """

    repository: str
    backup: str = LATEST
    chain: str = ""
    templates: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class RestoredMachine:
    """What was restored.

    Attributes:
        backup: from what.
        target: the folder.
        disks: its disks, in the order of the manifest.
        files: what was kept beside them.
        seconds: it took.
    """

    backup: Backup
    target: str
    disks: tuple[Restored, ...]
    files: tuple[ExtraFile, ...]
    seconds: float


def restore_machine(
    wanted: WantedMachine, destination: Destination, options: RestoreOptions, deadline: Deadline
) -> RestoredMachine:
    """Restores everything that a backup holds; blocking.

    Args:
        wanted: which backup.
        destination: the folder to make, and what each disk shall be: ``raw``, ``qcow2`` or ``chain``.
        options: how; nothing that is there is overwritten even with `RestoreOptions.force`.
        deadline: how long it may take; telling it to stop ends it.

    Raises:
        NoSuchBackupError: there is no such backup.
        RepositoryBusyError: backups are just being removed.
        RepositoryDamagedError: what it depends on is missing, foreign, cut or rotten; nothing is left of the folder.
        TargetInUseError: there is something of that name.
        TargetError: the folder cannot be made, or is full.
        NotProvedError: what was read back is something else; nothing is left of the folder.
        UsageError: which backup is meant is not clear, or a template is needed and not named.
        DeadlineError: the time is over.
    """
    began = time.monotonic()
    repository = Repository.open(Path(wanted.repository))
    with repository.reading():
        backup = repository.find(chosen_chain(repository, wanted.chain), wanted.backup)
        manifest, disks = backup.manifest, []
        names = [disk.name for disk in manifest.disks]
        with new_folder(destination.target) as folder:
            for disk in manifest.disks:
                template = template_for(disk.name, wanted.templates, names)
                one = Wanted(wanted.repository, manifest.id, manifest.chain, disk.name, template)
                file = Path(disk.file).stem + _ENDINGS[destination.form]
                done = restore(one, replace(destination, target=str(folder / file)), options, deadline)
                named = replace(destination, target=str(Path(destination.target) / file))
                disks.append(replace(done, destination=named))
            for extra in manifest.extras:
                _restore_file(backup, extra, folder / extra.file, deadline)
    return RestoredMachine(backup, destination.target, tuple(disks), manifest.extras, time.monotonic() - began)


def _restore_file(backup: Backup, extra: ExtraFile, place: Path, deadline: Deadline) -> None:
    """Copies a file that is kept beside the disks, and proves it before and after."""
    source = str(backup.extra_file(extra.name))
    target = NewFile(place)
    try:
        read = hashlib.sha256()
        for offset, data in chunks_of(source, deadline):
            read.update(data)
            target.write(offset, data)
        if read.hexdigest() != extra.sha256:
            remedy = "Restore each disk on its own; this file is lost."
            raise RepositoryDamagedError(
                "it is rotten: its hash is another one", where=printable(source), remedy=remedy
            )
        target.settle()
        prove_extra(target.beside, extra, deadline, read_data=True)
        target.publish(force=False)
    except ImageError as error:
        raise RepositoryDamagedError(str(error.args[0]), where=printable(source)) from error
    finally:
        target.discard()
