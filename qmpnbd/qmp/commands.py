"""The QMP commands that change something, and what tells afterwards whether one was carried out.

A connection can end after a command was sent and before its reply came. Then nobody knows, and repeating it blindly
could do it twice, or undo what somebody else did meanwhile. What tells is a query.
"""

from __future__ import annotations

_JOBS = ("query-jobs", "query-named-block-nodes")
_NODES = ("query-named-block-nodes",)
_EXPORTS = ("query-block-exports",)

TOLD_BY = {
    "add-fd": ("query-fdsets",),
    "block-commit": _JOBS,
    "block-dirty-bitmap-add": _NODES,
    "block-dirty-bitmap-clear": _NODES,
    "block-dirty-bitmap-disable": _NODES,
    "block-dirty-bitmap-enable": _NODES,
    "block-dirty-bitmap-merge": _NODES,
    "block-dirty-bitmap-remove": _NODES,
    "block-export-add": _EXPORTS,
    "block-export-del": _EXPORTS,
    "block-job-cancel": _JOBS,
    "block-stream": _JOBS,
    "block-set-write-threshold": _NODES,
    "blockdev-add": _NODES,
    "blockdev-backup": _JOBS,
    "blockdev-del": _NODES,
    "blockdev-reopen": ("x-debug-query-block-graph",),
    "blockdev-snapshot": ("query-block", "x-debug-query-block-graph"),
    "cont": ("query-status",),
    "job-cancel": _JOBS,
    "job-complete": _JOBS,
    "job-dismiss": _JOBS,
    "nbd-server-start": ("nbd-server-start on a descriptor of no name: it fails, and says if one runs",),
    "nbd-server-stop": _EXPORTS,
    "object-add": ("qom-list",),
    "object-del": ("qom-list",),
    "qom-set": ("qom-get",),
    "remove-fd": ("query-fdsets",),
    "stop": ("query-status",),
    "transaction": ("query-named-block-nodes", "query-jobs"),
}
"""Command -> what to ask."""


def what_tells(command: str) -> tuple[str, ...]:
    """Returns what to ask to learn whether a command was carried out; empty for one that leaves nothing behind.

    Descriptors given with ``getfd`` are closed by QEMU with the monitor that they came through.
    """
    if command.startswith(("query-", "x-debug-query-", "qom-get", "qom-list", "getfd", "closefd")):
        return ()
    return TOLD_BY.get(command, ("what it should have changed",))
