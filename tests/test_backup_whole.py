"""Backups of a guest that never rests, over all that goes wrong: what was on its disks at the instant is there."""

from __future__ import annotations

import random

import pytest

from tests.backup_rounds import FAULTS, a_round, whole
from tests.qemu_versions import INSTALLED, OTHERS, binaries_of

pytestmark = pytest.mark.real

SECONDS_EACH = 0.005
"""Between two operations of the guest: what it writes has to be replayed, too."""

ROUNDS = [(release, seed) for seed, release in enumerate([INSTALLED, INSTALLED, *OTHERS, INSTALLED])]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("release", "seed"), ROUNDS)
def test_no_byte_is_lost_in_a_round(release: str, seed: int) -> None:
    """Ten increments, each after another fault; between them, the five rounds have each fault four times."""
    faults = [FAULTS[(seed * 5 + number) % len(FAULTS)] for number in range(10)]
    random.Random(seed).shuffle(faults)
    with a_round(binaries_of(release), seed, SECONDS_EACH) as round_:
        whole(round_, faults, 1)
