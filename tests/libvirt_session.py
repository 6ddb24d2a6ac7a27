"""A real libvirt of one's own for a while: a session daemon with its folders in a temporary place.

libvirtd serves sessions to plain users only; root starts it as nobody.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pwd
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers import listening, process, qemu_img, short_folder, tool, wait_until

_MODULES = ("libvirt.py", "libvirt_qemu.py", "libvirtmod*.so")


@dataclass(frozen=True)
class Session:
    """A running libvirtd.

    Attributes:
        uri: its connection URI.
        folder: that it may use.
        user: whom it runs as, user and group; None for the one who runs the tests.
        libvirt: the Python module.
    """

    uri: str
    folder: Path
    user: tuple[int, int] | None
    libvirt: Any

    def image(self, name: str, *arguments: str) -> Path:
        """Makes a qcow2 file that the domain can use."""
        path = self.folder / name
        qemu_img("create", "-q", "-f", "qcow2", *arguments, path, "16M")
        if self.user:
            os.chown(path, *self.user)
        return path

    @contextlib.contextmanager
    def domain(self, name: str, disk: Path) -> Iterator[Any]:
        """Runs a domain, paused before its first instruction, with a virtio disk vda."""
        xml = f"""
            <domain type='qemu'>
              <name>{name}</name>
              <memory unit='MiB'>32</memory>
              <os><type arch='x86_64' machine='pc'>hvm</type></os>
              <devices>
                <emulator>{tool("qemu-system-x86_64")}</emulator>
                <disk type='file' device='disk'>
                  <driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
                </disk>
                <memballoon model='none'/>
              </devices>
            </domain>"""
        connection = self.libvirt.open(self.uri)
        domain = connection.createXML(xml, self.libvirt.VIR_DOMAIN_START_PAUSED)
        try:
            yield domain
        finally:
            with contextlib.suppress(self.libvirt.libvirtError):
                domain.destroy()
            connection.close()


def _modules(into: Path) -> None:
    """Makes the system's Python module for libvirt, and no other, importable from a folder."""
    for system in (Path("/usr/lib/python3/dist-packages"), *map(Path, sys.path)):
        for pattern in _MODULES:
            for path in system.glob(pattern):
                if not (into / path.name).exists():
                    (into / path.name).symlink_to(path)


@contextlib.contextmanager
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """Runs libvirtd; skips where there is none, or none that this Python can talk to."""
    daemon = shutil.which("libvirtd", path=f"{os.environ['PATH']}:/usr/sbin")
    if daemon is None:
        pytest.skip("no libvirtd here (libvirt-daemon, libvirt-daemon-driver-qemu)")
    with short_folder() as folder:
        (folder / "modules").mkdir()
        _modules(folder / "modules")
        monkeypatch.syspath_prepend(folder / "modules")
        try:
            libvirt = importlib.import_module("libvirt")
        except ImportError as error:
            pytest.skip(f"no libvirt for this Python (python3-libvirt): {error}")
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        settings = folder / "libvirt"
        settings.mkdir()
        # Otherwise it would start a virtlogd, which goes on for two minutes after it.
        (settings / "qemu.conf").write_text('stdio_handler = "file"\n')
        user, become = None, ["env"]
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            user = nobody.pw_uid, nobody.pw_gid
            for path in (folder, settings):
                os.chown(path, *user)
            become = ["setpriv", "--reuid", str(user[0]), "--regid", str(user[1]), "--clear-groups", "env"]
        places = [f"{name}={folder}" for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")]
        socket = folder / "libvirt/libvirt-sock"
        with process([*become, *places, daemon], folder.with_suffix(".log")) as child:
            try:
                wait_until(lambda: child.poll() is not None or listening(socket), "libvirtd")
                assert child.poll() is None, folder.with_suffix(".log").read_text()
                yield Session(f"qemu+unix:///session?socket={socket}", folder, user, libvirt)
            finally:
                folder.with_suffix(".log").unlink()
