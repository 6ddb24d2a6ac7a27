"""A share of `tests.fuzz_nbd` in every run; another one each day would be chance, so the seed is fixed."""

from __future__ import annotations

import pytest

from tests import fuzz_nbd

pytestmark = pytest.mark.usefixtures("memory_budget")


@pytest.mark.parametrize("part", range(4))
def test_servers_made_of_chance(part: int) -> None:
    ends = fuzz_nbd.run(5500, seed=1, first=part * 5500)
    assert sum(ends.values()) == 5500
    for expected in ("NbdProtocolError", "NbdDisconnectedError", "maps", "read", "export"):
        assert any(expected in end for end in ends), f"no attack ended with {expected}"
