"""Compression with zstd, as far as this Python has it: a module of 3.14, and of a package before."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from qmpnbd.errors import UsageError

Compress: TypeAlias = Callable[[memoryview], bytes]
"""Makes one whole frame of bytes; for one thread at a time."""

LEVEL: Final = 3
"""zstd's own default: 0.75 GB/s, where the next levels halve that for a few percent."""

_MODULES: Final = ("compression.zstd", "backports.zstd")  # one interface


def compressor(where: str) -> Callable[[], Compress]:
    """Returns what makes compressors, one for each thread.

    Raises:
        UsageError: this Python has no zstd; `where` is what was to be compressed.
    """
    module = _module()
    if module is None:
        remedy = "Install it with: pip install 'qmpnbd[zstd]'."
        raise UsageError("this Python has no zstd to compress with", where=where, remedy=remedy)

    def make() -> Compress:
        context = module.ZstdCompressor(level=LEVEL)

        def compress(data: memoryview) -> bytes:
            frame: bytes = context.compress(data, context.FLUSH_FRAME)
            return frame

        return compress

    return make


def _module() -> Any:
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None
