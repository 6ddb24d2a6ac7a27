"""The releases that other tests run on are what they say, and start."""

from __future__ import annotations

import pytest

from tests.qemu_versions import QemuBinaries, each_qemu


@pytest.mark.real
@each_qemu
def test_a_release_starts_and_is_what_it_says(binaries: QemuBinaries) -> None:
    for run in (binaries.qemu, binaries.daemon):
        with run() as server:
            told = server.side("query-version")["qemu"]
            assert (told["major"], told["minor"], told["micro"]) == binaries.version
