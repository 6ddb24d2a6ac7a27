"""Runs of ``qmpnbd backup`` ended after each of their steps and at any moment, of a guest that never rests.

After each cut the guest writes on, the next run succeeds without anybody's help, and what stock tools read of it is
exactly what was on the disks at its instant. As a program (`scripts/backup-cuts`) it goes through every step with both
signals, and through as many moments as it is told to, on each QEMU that is here.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.backup_commands import backup_words
from tests.backup_dying import MortalBackup, mortal_backup
from tests.backup_rounds import Round, a_round, killed, told_to_end
from tests.qemu_versions import INSTALLED, OTHERS, binaries_of

WHOLE = 1 << 30
"""A step that no run has."""


@contextmanager
def dying_after_steps(round_: Round, number: signal.Signals) -> Iterator[MortalBackup]:
    """Runs the program that runs backups of a round's guest and ends them."""
    words = backup_words(round_.guest.server.qmp, round_.repository, "--nbd", round_.share)[1:]
    with mortal_backup(number, *map(str, words)) as mortal:
        yield mortal


def cut_after(round_: Round, mortal: MortalBackup, number: signal.Signals, step: int) -> bool:
    """Cuts a run short after a step, and has the next one succeed; returns whether there was such a step."""
    round_.guest.go_on()
    code = mortal.ends_after(step)
    assert code in (0, 128 + number, -number), f"step {step}: ended with {code}"
    round_.guest.go_on()
    if number is not signal.SIGKILL:
        round_.unharmed()
    round_.compare_new()
    if code == 0:
        return False
    assert mortal.ends_after(WHOLE) == 0, f"after step {step} and {number.name} no backup can be made"
    round_.unharmed()
    before = len(round_.expected)
    round_.compare_new()
    assert len(round_.expected) == before + 1
    return True


def cut_after_steps(round_: Round, number: signal.Signals, first: int, stride: int) -> int:
    """Cuts runs short after every `stride`-th step; returns how many."""
    with dying_after_steps(round_, number) as mortal:
        for count, step in enumerate(itertools.count(first, stride)):
            if not cut_after(round_, mortal, number, step):
                return count
    raise AssertionError("a run without end")


def cut_at_any_moment(round_: Round, times: int) -> int:
    """Cuts runs short at moments that chance decides, by turns with both signals; returns how many."""
    for each in range(times):
        (killed, told_to_end)[each % 2](round_)
        round_.guest.go_on()
        round_.backup()
        round_.unharmed()
    return times


def main() -> int:
    """Makes the cuts; ends with a traceback at the first one that was not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moments", nargs="?", type=int, default=60, help="beside every step (default: 60)")
    parser.add_argument("--stride", type=int, default=1, help="cut after every so manyth step only (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--qemu", action="append", metavar="RELEASE", help="5.2, 7.2, ... (default: all that are here)")
    arguments = parser.parse_args()
    for release in arguments.qemu or (INSTALLED, *OTHERS):
        with a_round(binaries_of(release), arguments.seed, 0.01) as round_:
            round_.backup()
            steps = [cut_after_steps(round_, each, 1, arguments.stride) for each in (signal.SIGKILL, signal.SIGTERM)]
            moments = cut_at_any_moment(round_, arguments.moments)
            cuts, points = sum(steps) + moments, len(round_.expected)
        sys.stdout.write(f"QEMU {release}: {cuts} cuts ({steps} after steps), {points} points, 0 bytes lost\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
