"""TLS of QEMU's NBD server: the objects inside QEMU that hold its credentials and say who may come in.

::

    qmpnbd-3f9a01c7-t0   tls-creds-x509 | tls-creds-psk   the folder with certificates, or with keys.psk
    qmpnbd-3f9a01c7-z0   authz-list                       names in client certificates; all others are refused

Clients must prove who they are: with certificates of the same authority, or by knowing a secret. QEMU reads the files
itself, once, when the object is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, UsageError
from qmpnbd.qmp.models import ObjectPropertyInfo, parse_reply
from qmpnbd.qmp.monitor import Monitor, finish
from qmpnbd.qmp.naming import authorization_object, credentials_object
from qmpnbd.qmp.refusals import explained


@dataclass(frozen=True, slots=True)
class ServerTls:
    """How the server agrees on TLS.

    Attributes:
        folder: with ca-cert.pem, server-cert.pem and server-key.pem, or for "psk" with keys.psk; as QEMU sees it.
        kind: certificates or a shared secret.
        authorized: distinguished names (``CN=backup,O=Example``; ``*`` and ``?`` as in file names) of the clients
            that may come in; empty for all whose certificate is of the authority.

    Raises:
        UsageError: parts that do not go together.
    """

    folder: str
    kind: Literal["x509", "psk"] = "x509"
    authorized: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind == "psk" and self.authorized:
            raise UsageError("a shared secret names nobody", where="TLS", remedy="List clients with certificates only.")


async def add_credentials(monitor: Monitor, run: str, tls: ServerTls, deadline: Deadline) -> dict[str, str]:
    """Makes the objects of a run's server.

    Args:
        monitor: the QEMU.
        run: the run id.
        tls: what is wanted.
        deadline: for QEMU's replies.

    Returns:
        The arguments that ``nbd-server-start`` needs for them.

    Raises:
        ExportRefusedError: QEMU cannot use the files.
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    arguments = {"tls-creds": credentials_object(run)}
    files: dict[str, object] = {"dir": _absolute(tls.folder), "endpoint": "server", "verify-peer": True}
    await add_object(monitor, f"tls-creds-{tls.kind}", arguments["tls-creds"], files, deadline)
    if tls.authorized:
        arguments["tls-authz"] = authorization_object(run)
        rules = [{"match": name, "policy": "allow", "format": "glob"} for name in tls.authorized]
        await add_object(monitor, "authz-list", arguments["tls-authz"], {"policy": "deny", "rules": rules}, deadline)
    return arguments


def _absolute(folder: str) -> str:
    return str(Path(folder).absolute())


async def add_object(monitor: Monitor, kind: str, name: str, properties: dict[str, object], deadline: Deadline) -> None:
    """Makes an object inside QEMU.

    Raises:
        ExportRefusedError: QEMU cannot use what the properties name.
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    # Flat, as 6.0 and later want it; 5.2 takes that beside its own form.
    arguments = {"qom-type": kind, "id": name, **properties}
    try:
        await finish(monitor.execute("object-add", arguments, deadline=deadline))
    except CommandFailedError as error:
        raise explained(error) from error


async def remove_object(monitor: Monitor, name: str, deadline: Deadline) -> None:
    """Removes an object inside QEMU; one that does not exist is gone.

    Raises:
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    try:
        await finish(monitor.execute("object-del", {"id": name}, deadline=deadline))
    except CommandFailedError as error:
        if "not found" not in error.description and error.error_class != "CommandNotFound":
            raise


async def read_objects(monitor: Monitor, deadline: Deadline) -> list[str]:
    """Returns the ids of the objects that were made inside QEMU, anyone's.

    Raises:
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    try:
        reply = await monitor.execute("qom-list", {"path": "/objects"}, deadline=deadline)
    except CommandFailedError as error:
        if error.error_class in (
            "CommandNotFound",
            "DeviceNotFound",
        ):  # the storage daemon of 5.2 has no place for them
            return []
        raise
    listed = parse_reply(list[ObjectPropertyInfo], reply, command="qom-list", where=monitor.where)
    return [each.name for each in listed if each.type.startswith("child<")]
