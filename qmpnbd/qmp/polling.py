"""Events for those who get none: what changed between two looks at the same thing; pure.

A look cannot see what comes and goes between two of them: a job that was made and is gone again never was. So whoever
waits for the end of a job makes it with ``auto-dismiss: false``, and everybody waits with a deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from qmpnbd.qmp.models import BlockDeviceInfo, BlockExportInfo, JobInfo, StatusInfo, parse_reply

Data = Mapping[str, object]
State = Mapping[str, object]
"""Name of a thing -> what is watched of it."""


@dataclass(frozen=True, slots=True)
class Polled:
    """An event that can be found out by asking.

    Attributes:
        command: the query.
        arguments: its arguments.
        state: reads the reply; its second argument is the monitor, for messages.
        changes: yields the data of an event for each change from one state to the next.
    """

    command: str
    arguments: Mapping[str, object] | None
    state: Callable[[object, str], State]
    changes: Callable[[State, State], Iterator[Data]]


def _exports(reply: object, where: str) -> State:
    exports = parse_reply(list[BlockExportInfo], reply, command="query-block-exports", where=where)
    return {export.id: True for export in exports}


def _deleted(before: State, after: State) -> Iterator[Data]:
    yield from ({"id": name} for name in before if name not in after)


def _jobs(reply: object, where: str) -> State:
    return {job.id: job.status for job in parse_reply(list[JobInfo], reply, command="query-jobs", where=where)}


def _job_changes(before: State, after: State) -> Iterator[Data]:
    yield from ({"id": name, "status": status} for name, status in after.items() if before.get(name) != status)
    yield from ({"id": name, "status": "null"} for name in before if name not in after)


def _thresholds(reply: object, where: str) -> State:
    nodes = parse_reply(list[BlockDeviceInfo], reply, command="query-named-block-nodes", where=where)
    return {node.node_name: node.write_threshold for node in nodes if node.node_name}


def _crossed(before: State, after: State) -> Iterator[Data]:
    """Yields nodes whose threshold is gone: QEMU takes it away when it is crossed, and never tells by how much."""
    for name, threshold in before.items():
        if threshold and after.get(name) == 0:
            yield {"node-name": name, "amount-exceeded": 0, "write-threshold": threshold}


def _running(reply: object, where: str) -> State:
    return {"running": parse_reply(StatusInfo, reply, command="query-status", where=where).running}


def _becomes(running: bool) -> Callable[[State, State], Iterator[Data]]:
    def changes(before: State, after: State) -> Iterator[Data]:
        if before != after and after["running"] is running:
            yield {}

    return changes


POLLED: Mapping[str, Polled] = {
    "BLOCK_EXPORT_DELETED": Polled("query-block-exports", None, _exports, _deleted),
    "JOB_STATUS_CHANGE": Polled("query-jobs", None, _jobs, _job_changes),
    "BLOCK_WRITE_THRESHOLD": Polled("query-named-block-nodes", {"flat": True}, _thresholds, _crossed),
    "STOP": Polled("query-status", None, _running, _becomes(running=False)),
    "RESUME": Polled("query-status", None, _running, _becomes(running=True)),
}
"""Every event that is waited for here."""
