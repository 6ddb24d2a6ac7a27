"""A backup that is killed or told to end, anywhere: the guest writes on, and the next run loses nothing."""

from __future__ import annotations

import signal

import pytest

from tests.backup_cuts import cut_after_steps, cut_at_any_moment
from tests.backup_rounds import a_round
from tests.qemu_versions import QemuBinaries, each_qemu, installed

pytestmark = pytest.mark.real

STRIDE = 5
"""Of about fifty steps; `scripts/backup-cuts` takes them all."""

SECONDS_EACH = 0.01


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_the_next_backup_is_whole_wherever_one_was_ended(number: signal.Signals) -> None:
    """The two begin at different steps, so that together they come to more of them."""
    with a_round(installed(), seed=int(number), seconds_each=SECONDS_EACH) as round_:
        round_.backup()
        assert cut_after_steps(round_, number, 1 + number % STRIDE, STRIDE) >= 8


@pytest.mark.timeout(400)
@each_qemu
def test_the_next_backup_is_whole_whenever_one_was_ended(binaries: QemuBinaries) -> None:
    with a_round(binaries, seed=4, seconds_each=SECONDS_EACH) as round_:
        round_.backup()
        cut_at_any_moment(round_, 2)
