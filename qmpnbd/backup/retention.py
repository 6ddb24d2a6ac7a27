"""Which backups of a chain are kept; pure.

A rule like ``daily=7`` keeps the newest backup of each of the last seven days that have one; days without a backup do
not count. Days, weeks (ISO 8601), months and years are those of UTC. What is newer is decided by the numbers of the
backups, not by the clock, which may have gone back. The newest backup is always kept: the next increment stands on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import NamedTuple

NEWEST = "newest"
"""The rule that keeps the newest backup."""

_PERIODS: Mapping[str, str] = {
    "hourly": "%Y-%m-%d %H",
    "daily": "%Y-%m-%d",
    "weekly": "%G week %V",
    "monthly": "%Y-%m",
    "yearly": "%Y",
}


@dataclass(frozen=True, slots=True)
class Policy:
    """How many backups are kept by each rule; 0 for none.

    Attributes:
        last: the newest ones.
        hourly: one for each hour.
        daily: one for each day.
        weekly: one for each week.
        monthly: one for each month.
        yearly: one for each year.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    @property
    def keeps_nothing(self) -> bool:
        """Whether no rule was given: then nothing should be removed either."""
        return not any(getattr(self, field.name) for field in fields(self))


class Moment(NamedTuple):
    """A backup, for deciding on it.

    Attributes:
        number: in its chain.
        instant: in UTC.
    """

    number: int
    instant: datetime


def kept(moments: Iterable[Moment], policy: Policy) -> dict[int, tuple[str, ...]]:
    """Returns the numbers of the backups that are kept, newest first, each with the rules that keep it."""
    newest_first = sorted(moments, key=lambda each: each.number, reverse=True)
    rules: dict[int, list[str]] = {}
    for moment in newest_first[:1]:
        rules.setdefault(moment.number, []).append(NEWEST)
    for moment in newest_first[: policy.last]:
        rules.setdefault(moment.number, []).append("last")
    for rule, form in _PERIODS.items():
        for number in _newest_of_each(newest_first, form, getattr(policy, rule)):
            rules.setdefault(number, []).append(rule)
    return {number: tuple(rules[number]) for number in sorted(rules, reverse=True)}


def _newest_of_each(newest_first: Iterable[Moment], form: str, count: int) -> list[int]:
    """Returns the newest of each of the last `count` periods that have one."""
    found: dict[str, int] = {}
    for moment in newest_first:
        period = moment.instant.strftime(form)
        if len(found) < count and period not in found:
            found[period] = moment.number
    return list(found.values())
