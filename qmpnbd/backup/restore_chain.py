"""Restore of a chain: a folder with an image for each layer, each standing on the one before.

::

    vm-disk/0001-vda.qcow2 <- 0002-vda.qcow2 <- 0003-vda.qcow2      the names in the headers are relative

Every layer is copied and proved on its own, with the hashes that the backup recorded for it. The folder gets its name
when all of it was proved.
"""

from __future__ import annotations

import os
from pathlib import Path

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.content import aligned
from qmpnbd.backup.copy import CopyOptions, copy
from qmpnbd.backup.layers import RestoreSource
from qmpnbd.backup.newfolder import new_folder
from qmpnbd.backup.point import Point, open_layer
from qmpnbd.backup.prove_layer import prove_layer
from qmpnbd.backup.qcow2_target import Backing, Compression, Qcow2Target
from qmpnbd.deadline import Deadline
from qmpnbd.printable import printable


class ChainCopy:
    """Restores the layers of a disk, each as an image of its own.

    Args:
        point: the disk.
        compression: of clusters.
        options: how to copy.
        deadline: for all of it.
    """

    def __init__(self, point: Point, compression: Compression, options: CopyOptions, deadline: Deadline) -> None:
        self._point = point
        self._compression: Compression = compression
        self._options = options
        self._deadline = deadline

    def restore(self, target: str) -> int:
        """Makes the folder.

        Args:
            target: its name; it must not be there.

        Returns:
            Bytes that were read back.

        Raises:
            TargetInUseError: there is something of that name.
            TargetError: it cannot be written.
            RepositoryDamagedError: a layer is missing, cut or rotten.
            NotProvedError: what was read back is something else.
            DeadlineError: the time is over.
        """
        read_back = 0
        with new_folder(target) as folder:
            below = self._template()
            for backup in reversed(self._point.layers):
                disk = backup.disk(self._point.disk.name)
                name = f"{backup.manifest.number:04}-{disk.file}"
                read_back += self._layer(backup, folder / name, below)
                below = Backing(name, "qcow2", disk.size)
        return read_back

    def _template(self) -> Backing | None:
        entry = self._point.layers[-1].disk(self._point.disk.name).template
        if entry is None:
            return None
        return Backing(os.fspath(Path(self._point.template).absolute()), entry.format, entry.size)

    def _layer(self, backup: Backup, path: Path, below: Backing | None) -> int:
        """Copies a layer and proves it; returns how many bytes were read back."""
        name, deadline = self._point.disk.name, self._deadline
        hashes, cluster_size = backup.hashes(name), backup.disk(name).cluster_size
        # What shares a cluster with data is zero where nothing is below.
        content = aligned(hashes.content, cluster_size) if below is None else hashes.content
        target = Qcow2Target.create(
            path, content, backing=below, cluster_size=cluster_size, compression=self._compression
        )
        try:
            with RestoreSource([open_layer(backup, name, deadline)], printable(os.fspath(backup.path))) as source:
                copied = copy(source, target, content, self._options, deadline)
            target.finish()
            prove_layer(path, hashes, deadline, read_data=True)
        except BaseException:
            target.discard()
            raise
        return copied.data_bytes
