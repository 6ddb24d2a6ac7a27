"""What is wrong with one disk of one backup: its image, its hashes, and what it stands on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.check_rules import Finding, Rule
from qmpnbd.backup.content import aligned
from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.layer import Layer
from qmpnbd.backup.layout import backing_name
from qmpnbd.backup.manifest import ManifestDisk, TemplateEntry
from qmpnbd.backup.repository import base_of
from qmpnbd.backup.template import open_template
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageError, QmpnbdError, RepositoryDamagedError
from qmpnbd.images.check_file import check_image
from qmpnbd.printable import printable


class DiskCheck:
    """The check of a disk.

    Args:
        backup: the backup.
        disk: the disk.
        content: whether to read all data.
        deadline: how long it may take.
    """

    def __init__(self, backup: Backup, disk: ManifestDisk, *, content: bool, deadline: Deadline) -> None:
        self._backup = backup
        self._disk = disk
        self._content = content
        self._deadline = deadline

    def findings(self) -> Iterator[Finding]:
        """Yields what is wrong.

        Raises:
            DeadlineError: the time ran out.
        """
        hashes, backing = None, None
        try:
            hashes = self._backup.hashes(self._disk.name)
        except RepositoryDamagedError as error:
            yield self._finding(Rule.HASHES, error)
        try:
            backing = self._backing()
        except RepositoryDamagedError as error:
            yield self._finding(Rule.BASE, error)
        if self._disk.template is not None:
            yield from self._template(self._disk.template)
        try:
            yield from self._image(self._backup.image(self._disk.name), hashes, backing)
        except RepositoryDamagedError as error:
            yield self._finding(Rule.FILE, error)
        except ImageError as error:
            yield self._finding(Rule.IMAGE, error)

    def _backing(self) -> tuple[str, str]:
        """Returns name and format of what the image is to stand on; empty if on nothing."""
        base = base_of(self._backup, self._disk.name)
        if base is not None:
            return backing_name(base.name, base.disk(self._disk.name).file), "qcow2"
        template = self._disk.template
        return (template.path, template.format) if template is not None else ("", "")

    def _image(self, path: Path, hashes: Hashes | None, backing: tuple[str, str] | None) -> Iterator[Finding]:
        result = check_image(str(path), image_format="qcow2", deadline=self._deadline)
        # Leaks, too: nobody writes to an image of a backup, so it has none unless a refcount rotted.
        wrong = result.corruptions + result.overlaps + result.errors + result.leaks
        if wrong:
            yield self._told(Rule.IMAGE, path, f"its tables are damaged in {wrong} places")
        with Layer(path, self._deadline) as layer:
            if (layer.size, layer.cluster_size) != (self._disk.size, self._disk.cluster_size):
                what = f"its disk has {layer.size} bytes in clusters of {layer.cluster_size}, that of the backup "
                what += f"{self._disk.size} in clusters of {self._disk.cluster_size}"
                yield self._told(Rule.IMAGE, path, what)
                return
            if layer.has_snapshots:
                yield self._told(Rule.IMAGE, path, "it has internal snapshots, or its header is damaged")
            stands_on = (layer.backing_name, layer.backing_format)
            if backing is not None and stands_on != backing:
                what = f"it stands on {_words(stands_on)}, and not on {_words(backing)}"
                yield self._told(Rule.IMAGE, path, what)
            if hashes is None:
                return
            other = next(layer.content().differences(aligned(hashes.content, self._disk.cluster_size)), None)
            if other is not None:
                what, place = "it does not hold what the hashes are of", (other.offset, other.end)
                yield self._told(Rule.IMAGE, path, what, place)
            elif self._content:
                yield from self._rotten(layer, hashes, path)

    def _rotten(self, layer: Layer, hashes: Hashes, path: Path) -> Iterator[Finding]:
        for index, (offset, length, digest) in enumerate(layer.digests(hashes.content)):
            if digest != hashes.digest(index):
                what = f"the data at [{offset:#x}, {offset + length:#x}) is rotten: its hash is another one"
                yield self._told(Rule.CONTENT, path, what, (offset, offset + length))

    def _template(self, template: TemplateEntry) -> Iterator[Finding]:
        try:
            open_template(template, template.path, self._deadline, read=self._content).close()
        except RepositoryDamagedError as error:
            yield self._finding(Rule.TEMPLATE, error)

    def _finding(self, rule: Rule, error: QmpnbdError) -> Finding:
        return Finding(
            rule, self._backup.manifest.chain, self._backup.manifest.id, self._disk.name, error.where, error.what
        )

    def _told(self, rule: Rule, path: Path, what: str, extent: tuple[int, int] | None = None) -> Finding:
        manifest = self._backup.manifest
        offset, end = extent or (None, None)
        return Finding(rule, manifest.chain, manifest.id, self._disk.name, printable(str(path)), what, offset, end)


def _words(backing: tuple[str, str]) -> str:
    name, form = backing
    return f"{printable(name)} ({printable(form) or 'no format told'})" if name else "nothing"
