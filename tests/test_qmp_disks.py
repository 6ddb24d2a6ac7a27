"""Disks of real guests, on every bus and every release: what is there, how it is called, and what is left out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import NoSuchDiskError
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.disks import Disk, find_disk
from qmpnbd.qmp.inventory import Inventory, read_device_types, read_inventory
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.numbering import Report, report_of
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, qemu_img

pytestmark = [pytest.mark.real]


def look(server: Server) -> tuple[Inventory, dict[str, str]]:
    """The inventory, and the sort of each device by its QOM path."""

    async def whole() -> tuple[Inventory, dict[str, str]]:
        async with await Monitor.connect(str(server.qmp), Deadline(30)) as monitor:
            inventory = await read_inventory(monitor, Deadline(30))
            return inventory, await read_device_types(monitor, inventory.disks, Deadline(30))

    return asyncio.run(whole())


def null(*names: str) -> list[str]:
    nodes = [json.dumps({"driver": "null-co", "node-name": name, "size": 1 << 20}) for name in names]
    return [part for node in nodes for part in ("-blockdev", node)]


BUSES = {
    "vb": ("virtio-blk-pci", []),
    "sc": ("scsi-hd", ["-device", "virtio-scsi-pci,id=sc-bus"]),
    "ls": ("scsi-hd", ["-device", "lsi53c895a,id=ls-bus"]),
    "id": ("ide-hd", ["-device", "piix3-ide,id=id-bus"]),
    "sa": ("ide-hd", ["-device", "ahci,id=sa-bus"]),
    "nv": ("nvme", []),
    "us": ("usb-storage", ["-device", "qemu-xhci,id=us-bus"]),
    "fl": ("floppy", []),
}
"""Id of the disk -> its device, and the controller that it needs."""


@each_qemu
def test_a_disk_on_every_bus_is_found_by_its_id_and_its_path(binaries: QemuBinaries) -> None:
    arguments = null(*(f"{name}-node" for name in BUSES))
    for name, (device, controller) in BUSES.items():
        bus = f",bus={name}-bus.0" if controller else ""
        serial = ",serial=1" if device == "nvme" else ""
        arguments += [*controller, "-device", f"{device},id={name},drive={name}-node{bus}{serial}"]
    with binaries.qemu(*arguments) as server:
        inventory, devices = look(server)
    found = {disk.name: disk for disk in inventory.disks}
    assert {name: (disk.node_name, devices[disk.qom_path]) for name, disk in found.items()} == {
        name: (f"{name}-node", device) for name, (device, _) in BUSES.items()
    }
    for name, disk in found.items():
        for wanted in (name, f"/machine/peripheral/{name}", f"{name}-node"):
            assert find_disk(wanted, inventory.disks, inventory.graph, where="qmp") is disk
    whole = find_disk("/machine/peripheral/vb/virtio-backend", inventory.disks, inventory.graph, where="qmp")
    assert whole is found["vb"]


@each_qemu
def test_devices_without_an_id_have_their_path_as_name(binaries: QemuBinaries) -> None:
    devices = ["-device", "virtio-blk-pci,drive=a", "-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=b"]
    with binaries.qemu(*null("a", "b"), *devices) as server:
        inventory, kinds = look(server)
    assert [(disk.qdev, disk.node_name, kinds[disk.name]) for disk in inventory.disks] == [
        ("", "a", "virtio-blk-pci"),
        ("", "b", "scsi-hd"),
    ]
    assert all(disk.name.startswith("/machine/peripheral-anon/") for disk in inventory.disks)


@each_qemu
def test_legacy_drives_attached_and_not(binaries: QemuBinaries, folder: Path) -> None:
    """A drive that nobody took is no disk, also if it has the id of a device."""
    drives = []
    for name, options in {
        "virtio": "if=virtio",
        "ide": "if=ide,index=2",
        "later": "if=none",
        "loose": "if=none",
        "vd0": "if=none",
    }.items():
        qemu_img("create", "-q", "-f", "qcow2", folder / name, "1M")
        drives += ["-drive", f"{options},id={name},format=qcow2,file={folder / name}"]
    for unit in (0, 1):
        (folder / f"flash{unit}").write_bytes(bytes(256 << 10))
        drives += ["-drive", f"if=pflash,unit={unit},format=raw,file={folder}/flash{unit}"]
    with binaries.qemu(*drives, "-device", "virtio-blk-pci,id=vd0,drive=later") as server:
        inventory, devices = look(server)
    attached = {disk.drive: disk for disk in inventory.disks if disk.attached}
    assert {drive: devices[disk.qom_path] for drive, disk in attached.items()} == {
        "virtio": "virtio-blk-pci",
        "ide": "ide-hd",
        "later": "virtio-blk-pci",
        "pflash0": "cfi.pflash01",
        "pflash1": "cfi.pflash01",
    }
    assert attached["pflash1"].name == "/machine/system.flash1"
    assert {disk.drive for disk in inventory.disks if not disk.attached} == {"loose", "vd0"}
    assert find_disk("vd0", inventory.disks, inventory.graph, where="qmp") is attached["later"]
    with pytest.raises(NoSuchDiskError, match="'loose' is the id of a drive: no device uses it; the node is #block"):
        find_disk("loose", inventory.disks, inventory.graph, where="qmp")
    with pytest.raises(NoSuchDiskError, match="'ide' is the id of a drive: the disk is /machine/unattached/device"):
        find_disk("ide", inventory.disks, inventory.graph, where="qmp")


@each_qemu
def test_a_drive_without_a_medium_is_no_disk(binaries: QemuBinaries) -> None:
    with binaries.qemu("-device", "virtio-scsi-pci", "-device", "scsi-cd,id=cd0") as server:
        inventory, _ = look(server)
    assert (inventory.disks, inventory.empty) == ((), ("cd0",))


def test_the_storage_daemon_has_nodes_and_no_disks(binaries: QemuBinaries) -> None:
    with binaries.daemon(*(part.replace("-blockdev", "--blockdev") for part in null("a"))) as server:
        inventory, devices = look(server)
    assert (inventory.disks, devices) == ((Disk("a", "", "", "a"),), {})


PLACES = {"top": 64 << 10, "mid": 1 << 20, "base": 4 << 20}
"""Where only that layer of `three_layers` holds something."""


@each_qemu
def test_every_node_serves_the_numbers_that_are_told(binaries: QemuBinaries, three_layers: Path, folder: Path) -> None:
    """Through filters, under filters, from the middle, and over a node that hides what is below."""
    nodes = [
        blockdev(three_layers / "base.raw", "base", "raw", read_only=True),
        throttle("low", "base"),
        blockdev(three_layers / "mid.qcow2", "mid", backing="low", read_only=True),
        throttle("high", "mid"),
        blockdev(three_layers / "top.qcow2", "top", backing="high", read_only=True),
        throttle("t1", "top"),
        throttle("t2", "t1"),
        json.dumps({"driver": "raw", "node-name": "over", "file": "t2", "read-only": True}),
    ]
    objects = ["-object", "throttle-group,id=g"]
    with binaries.qemu(*objects, *(part for node in nodes for part in ("-blockdev", node))) as server:
        inventory, _ = look(server)
        names = ("base", "low", "mid", "high", "top", "t1", "t2", "over")
        told = {name: report_of(inventory.graph, name) for name in names}
        server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "nbd")}})
        served = {name: serve(server, name, folder / "nbd") for name in names}
    assert {name: expected(report) for name, report in told.items()} == served
    numbering = {name: report.numbering for name, report in told.items()}
    assert numbering == {
        "base": "plain",
        "low": "plain",
        "mid": "plain",
        "high": "shifted",
        "top": "shifted",
        "t1": "shifted",
        "t2": "shifted",
        "over": "hidden",
    }


def throttle(name: str, child: str) -> str:
    return json.dumps(
        {"driver": "throttle", "node-name": name, "throttle-group": "g", "file": child, "read-only": True}
    )


def serve(server: Server, name: str, path: Path) -> dict[str, int]:
    """What an export of a node says of the bytes that only one layer holds."""
    server.side("block-export-add", type="nbd", id=name, name=name, node_name=name, allocation_depth=True)
    with Client.connect(NbdUri.unix(str(path), name), contexts=["qemu:allocation-depth"]) as client:
        (served,) = client.maps().values()
        return {layer: served.at(place) for layer, place in PLACES.items()}


def expected(report: Report) -> dict[str, int]:
    """The same, as it is told; what lies in a layer that is not counted has no number."""
    numbers = dict(report.depths)
    if report.numbering == "hidden":
        return {"top": numbers["over"], "mid": 0, "base": 0}
    known = {layer: numbers[layer] for layer in PLACES if layer in numbers}
    return {layer: known.get(layer, served_below(layer, known)) for layer in PLACES}


def served_below(layer: str, known: dict[str, int]) -> int:
    """A layer above the exported one is not there: what is below answers in its place, the base at last."""
    return known["base"]
