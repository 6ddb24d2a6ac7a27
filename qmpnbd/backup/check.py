"""What is wrong in a repository: complete, in order, nothing foreign, nothing cut, nothing rotten.

A check reads every name, manifest and file of hashes, and the tables of every image; with `content` also every byte of
data. Without it, data that rotted inside an image goes unnoticed, and everything else is found.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.chain_order import Found
from qmpnbd.backup.check_disk import DiskCheck
from qmpnbd.backup.check_rules import Finding, Rule
from qmpnbd.backup.fingerprint import sha256_of
from qmpnbd.backup.layout import LOCK, MANIFEST, MARKER, READERS, backup_of, is_unfinished
from qmpnbd.backup.repository import Repository
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageError, NoSuchBackupError, QmpnbdError, RepositoryDamagedError
from qmpnbd.printable import printable

_NOT_OF_A_LAYER = frozenset({Rule.MANIFEST, Rule.ORDER, Rule.FOREIGN, Rule.UNFINISHED})


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found.

    Attributes:
        findings: all that is wrong.
        found: the backups that were looked at, by chain.
        broken: chain, id and disk of each layer that cannot be restored and proved, be it for its own sake or for that
            of what it stands on.
    """

    findings: tuple[Finding, ...]
    found: Mapping[str, tuple[Found, ...]]
    broken: Collection[tuple[str, str, str]]


def check(repository: Repository, chain: str | None, *, content: bool, deadline: Deadline) -> Checked:
    """Checks a repository.

    Args:
        repository: it is only read.
        chain: the chain; None for all of them.
        content: whether to read all data and hold it against its hashes.
        deadline: how long it may take.

    Raises:
        RepositoryBusyError: backups are just being removed.
        RepositoryDamagedError: it cannot be read at all, or is to be recovered first.
        NoSuchBackupError: there is no such chain.
        DeadlineError: the time ran out.
    """
    with repository.reading():
        chains = repository.chains()
        if chain is not None and chain not in chains:
            where, remedy = printable(str(repository.path)), f"There are: {', '.join(chains) or 'none'}."
            raise NoSuchBackupError(f"there is no chain {printable(chain)!r}", where=where, remedy=remedy)
        findings = list(_foreign(repository)) if chain is None else []
        findings += _unfinished(repository, chains if chain is None else [chain])
        found = {name: repository.inspect(name) for name in (chains if chain is None else [chain])}
        for name, backups in found.items():
            findings += _chain(repository.path / name, backups, content=content, deadline=deadline)
    return Checked(tuple(findings), found, _broken(found, findings))


def _foreign(repository: Repository) -> Iterator[Finding]:
    """Finds what does not belong to the repository's own folder."""
    for path in sorted(repository.path.iterdir()):
        if path.name not in (MARKER, LOCK, READERS) and path.name not in repository.chains():
            yield _told(Rule.FOREIGN, "", "", path, "it is no chain and nothing of ours")


def _unfinished(repository: Repository, chains: Sequence[str]) -> Iterator[Finding]:
    """Finds what killed runs left; while a run holds the repository, what is unfinished is taken for its own."""
    if repository.is_held():
        return
    for chain in chains:
        for path in sorted((repository.path / chain).iterdir()):
            if is_unfinished(path.name):
                yield _told(Rule.UNFINISHED, chain, "", path, "a run was killed while it was writing this")


def _chain(folder: Path, found: Sequence[Found], *, content: bool, deadline: Deadline) -> Iterator[Finding]:
    for path in sorted(folder.iterdir()):
        if backup_of(path.name) is None and not is_unfinished(path.name):
            yield _told(Rule.FOREIGN, folder.name, "", path, "it is no backup")
    ids = [each.name.id for each in found]
    for each in found:
        if each.fault is not None:
            yield _finding(Rule.MANIFEST if each.backup is None else Rule.ORDER, folder.name, each.name.id, each.fault)
        if ids.count(each.name.id) > 1:
            yield _told(Rule.FOREIGN, folder.name, each.name.id, each.path, "another backup has the same id")
        if each.backup is not None:
            yield from _files(each.backup, deadline)
            for disk in each.backup.manifest.disks:
                yield from DiskCheck(each.backup, disk, content=content, deadline=deadline).findings()


def _files(backup: Backup, deadline: Deadline) -> Iterator[Finding]:
    """Finds files that are not the backup's, and those kept beside the disks that are not what they were."""
    manifest = backup.manifest
    for path in sorted(backup.path.iterdir()):
        if path.name not in {MANIFEST, *manifest.files}:
            yield _told(Rule.FOREIGN, manifest.chain, manifest.id, path, "the manifest does not name it")
    for extra in manifest.extras:
        try:
            path = backup.extra_file(extra.name)
            if sha256_of(str(path), deadline) != extra.sha256:
                yield _told(Rule.FILE, manifest.chain, manifest.id, path, "it is rotten: its hash is another one")
        except (RepositoryDamagedError, ImageError) as error:
            yield _finding(Rule.FILE, manifest.chain, manifest.id, error)


def _broken(found: Mapping[str, Sequence[Found]], findings: Sequence[Finding]) -> Collection[tuple[str, str, str]]:
    broken = {
        (each.chain, each.backup, each.disk) for each in findings if each.disk and each.rule not in _NOT_OF_A_LAYER
    }
    for chain, backups in found.items():
        for backup in (each.backup for each in backups if each.backup is not None):
            for disk in backup.manifest.disks:
                if disk.base is not None and (chain, disk.base, disk.name) in broken:
                    broken.add((chain, backup.manifest.id, disk.name))
    return broken


def _finding(rule: Rule, chain: str, backup: str, error: QmpnbdError) -> Finding:
    return Finding(rule, chain, backup, "", error.where, error.what)


def _told(rule: Rule, chain: str, backup: str, path: Path, what: str) -> Finding:
    return Finding(rule, chain, backup, "", printable(str(path)), what)
