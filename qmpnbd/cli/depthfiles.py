"""Files that tell the allocation depth which disks had at an instant, for the tools that read the disks.

They are there before the tools begin, and hold if the point in time holds to its end: if that is an error, they are
removed again.
"""

from __future__ import annotations

import asyncio
import os
import re
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from qmpnbd.cli.reportfile import ReportFile
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ReportFileError
from qmpnbd.export.session import Export, Session
from qmpnbd.nbd.constants import ALLOCATION_DEPTH
from qmpnbd.report.jsontext import map_json
from qmpnbd.report.model import MapDocument

PRESUMED = "presumed"
"""The second map of a file: where the first one stands on a bitmap's word alone (`qmpnbd.qmp.depth_at`)."""

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]")


class DepthFiles:
    """The files of a run; a context manager, to be entered before the point in time.

    Args:
        folder: where they belong; None to have none.

    Raises:
        ReportFileError: nothing can be written there.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._written: list[Path] = []
        if self._folder is not None and not (self._folder.is_dir() and os.access(self._folder, os.W_OK | os.X_OK)):
            raise ReportFileError(
                "not a folder that can be written to", where=str(folder), remedy="Make it, or choose another one."
            )

    async def write(self, session: Session, deadline: Deadline) -> dict[str, str]:
        """Writes a file for each export.

        Args:
            session: the exports.
            deadline: for reading the depths.

        Returns:
            The id of each export, and its file; empty if there are to be none.

        Raises:
            ReportFileError: a file cannot be written.
            QmpnbdError: a depth cannot be read; see `Session.allocation_depth`.
        """
        found: dict[str, str] = {}
        if self._folder is None:
            return found
        for export in session.exports:
            path = self._free_path(export)
            told = await session.allocation_depth(export, deadline)
            head = MapDocument(uri=str(export.uri), size=export.size, maps=())
            with ReportFile.open(str(path)) as file:
                self._written.append(path)
                pieces = map_json(head, {ALLOCATION_DEPTH: told.depth, PRESUMED: told.presumed})
                await asyncio.to_thread(file.finish, pieces)
            found[export.id] = str(path)
        return found

    def _free_path(self, export: Export) -> Path:
        """Returns the file of a disk; two disks may differ only in what a file name cannot hold."""
        name = _NOT_IN_A_NAME.sub("_", export.disk.name).lstrip(".") or "disk"
        paths = (Path(self._folder or "", f"{name}{f'-{more}' if more else ''}.json") for more in count())
        return next(path for path in paths if path not in self._written)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):  # a signal, which is how an export is ended, is none
            for path in self._written:
                path.unlink(missing_ok=True)
