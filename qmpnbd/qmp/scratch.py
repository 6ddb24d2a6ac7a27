"""Scratch images on disk: made, locked while their run lives, limited, removed.

A scratch image lies in a folder of the caller's choice (or in the run's private directory) under the name of its
node: ``qmpnbd-3f9a01c7-s0.qcow2``. It is locked (flock) by the run; a killed run's is not, and is removed by the next
run that uses the folder. QEMU locks images in another way (OFD locks), so the two do not meet. An overlay of a snapshot
(``…-o0.qcow2``) holds what the guest writes.

Before they are made, images are noted in the run's directory, so that `recover` finds also those that QEMU has never
heard of. An overlay that holds anything is removed only if it has been committed, which is noted there, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from qmpnbd.errors import LeftBehindError, ScratchError
from qmpnbd.qmp.leftovers import is_own_image
from qmpnbd.qmp.naming import PREFIX, Role, name_of, number_of, role_of, run_of
from qmpnbd.qmp.plan import ImageFile
from qmpnbd.qmp.process import Peer
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.scratch_image import HEAD_BYTES, empty_qcow2, holds_nothing
from qmpnbd.qmp.undo import RemoveFile

LEAST_BYTES = 16 << 20
"""Less than this for a disk is no scratch space: QEMU's tables and the first few copies would fill it."""

_SHARE_OF_FREE_SPACE = 0.8
_RESERVE_BYTES = 256 << 20
_NOTE = "images"
_COMMITTED = "committed"
_FLOCK = struct.Struct("hhqqi0q")  # struct flock
_LONGEST_NOTE = 1 << 20
_REMEDY = "Choose another folder for the scratch space."


def limit_of(folder: str, disks: int, wanted: int | None) -> int:
    """Returns how large each scratch file may become, in bytes.

    Args:
        folder: where they lie.
        disks: how many there are.
        wanted: bytes for all of them; None for most of what is free in the folder.

    Raises:
        ScratchError: there is not enough room, or the folder cannot be asked.
    """
    try:
        status = os.statvfs(folder)
    except OSError as error:
        raise ScratchError(f"cannot be used: {error.strerror}", where=folder, remedy=_REMEDY) from error
    free = status.f_bavail * status.f_frsize
    limit = (int(free * _SHARE_OF_FREE_SPACE) if wanted is None else wanted) // disks
    if limit < LEAST_BYTES or limit * disks > free:
        raise ScratchError(
            f"{limit} bytes of scratch space for each of {disks} disks: at least {LEAST_BYTES} are needed, and "
            f"{free} bytes are free for all",
            where=folder,
            remedy="Make room, or choose another folder or limit for the scratch space.",
        )
    return limit


def threshold_of(limit: int) -> int:
    """Returns from which size on QEMU shall give notice, so that there is time left to end the point in time."""
    return limit - min(limit // 4, _RESERVE_BYTES)


def note_images(directory: RunDirectory, files: Sequence[ImageFile]) -> None:
    """Writes down which images a run is about to make; none of them is committed, whatever was said of former ones.

    Raises:
        ScratchError: it cannot be written down.
    """
    try:
        (directory.path / _COMMITTED).unlink(missing_ok=True)
        (directory.path / _NOTE).write_bytes(b"".join(os.fsencode(file.path) + b"\0" for file in files))
    except OSError as error:
        raise ScratchError(f"cannot be noted: {error.strerror}", where=str(directory.path), remedy=_REMEDY) from error


def note_committed(directory: RunDirectory, path: str) -> None:
    """Writes down that an overlay's data is in the image below, so that its file may go.

    Raises:
        ScratchError: it cannot be written down.
    """
    try:
        with (directory.path / _COMMITTED).open("ab") as note:
            note.write(os.fsencode(path) + b"\0")
    except OSError as error:
        raise ScratchError(f"cannot be noted: {error.strerror}", where=str(directory.path), remedy=_REMEDY) from error


def is_committed(directory: RunDirectory, path: str) -> bool:
    """Returns whether that was written down of an overlay."""
    return path in _read_note(directory, _COMMITTED)


def noted_images(directory: RunDirectory) -> list[RemoveFile]:
    """Returns how to remove the images that a run noted and that are still there, if their names are its own."""
    found = []
    for path in map(Path, _read_note(directory, _NOTE)):
        role = role_of(path.stem)
        if is_own_image(str(path)) and role is not None and run_of(path.stem) == directory.run and path.exists():
            below = Role.OVERLAY_FILE if role is Role.OVERLAY else Role.SCRATCH_FILE
            found.append(RemoveFile(str(path), name_of(directory.run, below, number_of(path.stem))))
    return found


def remove_image(path: Path, directory: RunDirectory | None) -> None:
    """Removes an image of ours that no node stands on any more; one that is gone is gone.

    Args:
        path: the image.
        directory: of the run that made it; None if it is not here.

    Raises:
        LeftBehindError: somebody has it open, or it is an overlay that holds what the guest wrote last.
    """
    try:
        with path.open("rb") as file:
            if _is_locked(file.fileno()):
                raise LeftBehindError("a QEMU has it open", where=str(path))
            if role_of(path.stem) is Role.OVERLAY:
                committed = directory is not None and is_committed(directory, str(path))
                if not committed and not holds_nothing(file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size):
                    raise LeftBehindError("it holds what the guest wrote last, not committed", where=str(path))
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise LeftBehindError(f"cannot be removed: {error.strerror}", where=str(path)) from error


def _read_note(directory: RunDirectory, name: str) -> list[str]:
    try:
        with (directory.path / name).open("rb") as note:
            return [os.fsdecode(each) for each in note.read(_LONGEST_NOTE).split(b"\0") if each]
    except OSError:
        return []


def _is_locked(descriptor: int) -> bool:
    """Returns whether somebody has locked a file as QEMU does (OFD locks)."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind: int = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))[0]
    return kind != fcntl.F_UNLCK


@contextlib.contextmanager
def image_files(files: Sequence[ImageFile], directory: RunDirectory, peer: Peer | None) -> Iterator[None]:
    """Makes images, each locked as long as the context lasts. Removing them is the plan's, once QEMU has let them go.

    Args:
        files: what to make.
        directory: the run's.
        peer: QEMU's process; as root we give the files to its user.

    Raises:
        ScratchError: a file cannot be made.
    """
    note_images(directory, files)
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(_image_file(file, peer))
        yield


@contextlib.contextmanager
def _image_file(file: ImageFile, peer: Peer | None) -> Iterator[None]:
    path = Path(file.path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ScratchError(f"cannot be made: {error.strerror}", where=file.path, remedy=_REMEDY) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.geteuid() == 0 and peer is not None and (owner := peer.user()) is not None:
            os.fchown(descriptor, *owner)
        for offset, piece in empty_qcow2(file.size, file.cluster_size, file.backing):
            os.pwrite(descriptor, piece, offset)
        if file.backing is not None:
            os.fsync(descriptor)  # the guest's data will be in it
    except (OSError, ValueError) as error:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise ScratchError(f"cannot be made: {error}", where=file.path, remedy=_REMEDY) from error
    try:
        yield
    finally:
        os.close(descriptor)


def remove_stale(folder: str) -> list[str]:
    """Removes scratch images whose runs were killed. A QEMU that has one open still goes on, on a nameless file.

    Returns:
        What was removed.
    """
    removed = []
    for path in sorted(Path(folder).glob(f"{PREFIX}-*.qcow2")):
        if role_of(path.stem) is Role.SCRATCH and _is_stale(path):
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(str(path))
    return removed


def _is_stale(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
