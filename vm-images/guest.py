#!/usr/bin/env python3
"""The tiny Linux guest: a distribution's kernel, busybox, and one script, made into something QEMU boots at once.

::

    unpacked packages                    what is made
    boot/vmlinuz-V ───── decompressed ──> vmlinux     (ELF; QEMU starts it through its PVH note)
    lib/modules/V ─┐
    bin/busybox ───┼──── newc cpio ─────> initramfs   (uncompressed)
    usr/sbin/qemu-ga and its libraries, if wanted ┘

Nothing needs root: a cpio archive is only bytes, device nodes included. The same inputs give the same bytes.
Under TCG every instruction of the guest is expensive, so whatever the host can do is done by the host: the kernel is
decompressed here, the archive is not compressed at all, and the modules are ordered by their dependencies here.

What the guest does: it finds ``/dev/vda``, writes a few numbered records to it past every cache (O_DIRECT), says
``qmpnbd-guest: ready`` on the serial console, and idles. A record is 4096 bytes: ``qmpnbd record N at OFFSET``, padded
with blanks, a newline at the end. Every record is reported on the console once the disk has acknowledged it.

Words on the kernel command line:

``qmpnbd.places=OFFSET,OFFSET,...``
    Where the first records go, in bytes, multiples of 4096 (see ``PLACES`` for what is used otherwise).
``qmpnbd.write=steady``
    After ``ready``, go on writing records one after the other, at places that jump about all over the disk.
``qmpnbd.agent=yes``
    Before ``ready``, make a filesystem on ``/dev/vdb`` and mount it, start the guest agent on the first port of
    virtio-serial, and write a counter to a file all the time, reported as ``qmpnbd-guest: file N`` once it is synced.
``qmpnbd.write=pairs``
    After ``ready``, go on writing records, each first to ``/dev/vda`` and then to ``/dev/vdb``, at the same place (see
    ``pair_place``). They are not reported: at any moment the second disk has as many as the first one, or one less.
``qmpnbd.write=stamped``
    After ``ready``, go on writing records to all disks by turns, with the seconds since the guest's start in each, and
    say ``qmpnbd-guest: wrote N`` through the kernel's log, which stamps it to the microsecond (``printk.devkmsg=on``).
``qmpnbd.write=hard``
    After ``ready``, go on writing as fast as the disk takes it: 8 MiB in a row, records, and discards of 4 MiB, by
    turns and at places that jump about.
``qmpnbd.write=files``
    After ``ready``, make a filesystem on ``/dev/vda`` and mount it; then go on writing files, removing others, and
    trimming what became free (fstrim), reported as ``qmpnbd-guest: trim N`` and with the bytes that were trimmed.
"""

from __future__ import annotations

import ctypes
import hashlib
import lzma
import re
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

READY = "qmpnbd-guest: ready"
RECORD = 4096
MIB = 1 << 20

# Chosen for the chain of chain.py: the first four lie in clusters that its layers hold, the rest in holes.
PLACES = (1 * MIB, 9 * MIB + 3 * RECORD, 34 * MIB, 50 * MIB, 70 * MIB, 100 * MIB + RECORD, 121 * MIB)

# Time to `ready` under TCG (QEMU 7.2, an idle machine): 2.4 s for a bzImage, a gzipped archive and the console alone,
# 1.8 s with all that is done here; a slow host shows more of it. `acpi=off` would save 0.4 s, and cost hot plugging.
APPEND = "console=ttyS0 quiet nokaslr mitigations=off cryptomgr.notests tsc=reliable no_timer_check panic=-1"

STRIDE = 1103515245  # odd, so that it meets every block of a disk whose size is a power of two

MODULES = ("virtio_pci", "virtio_blk")
APPLETS = ("sh", "mount", "insmod", "dd", "sleep", "mkdir", "mke2fs", "sync", "blkdiscard", "fstrim", "rm")

AGENT = "usr/sbin/qemu-ga"
AGENT_MODULES = ("virtio_console",)

INIT = """\
#!/bin/sh
# The guest's first and only process.
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in @MODULES@; do insmod "/lib/$module.ko"; done

places=@PLACES@
write=once
agent=no
read -r line < /proc/cmdline
for word in $line; do
    case $word in
        qmpnbd.places=*) places=${word#*=} ;;
        qmpnbd.write=*) write=${word#*=} ;;
        qmpnbd.agent=*) agent=${word#*=} ;;
    esac
done

tries=0
while ! [ -b /dev/vda ]; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || { echo 'qmpnbd-guest: no disk'; break; }
    sleep 0.1
done

number=0
put() {
    printf '%-4095s\\n' "qmpnbd record $number at $1" |
        dd of="/dev/$2" bs=4096 seek="$1" oflag=seek_bytes,direct conv=notrunc 2> /dev/null
}
record() {
    number=$((number + 1))
    if put "$1" vda
    then echo "qmpnbd-guest: record $number at $1"
    else echo "qmpnbd-guest: record $number at $1 failed"
    fi
}

IFS=,
for place in $places; do record "$place"; done
unset IFS

if [ "$agent" = yes ]; then
    mkdir -p /mnt /run
    mke2fs -F /dev/vdb > /dev/null && mount -t ext4 /dev/vdb /mnt || echo 'qmpnbd-guest: no filesystem'
    qemu-ga -m virtio-serial -p /dev/vport*p1 -t /run &
    while :; do
        count=$((count + 1))
        echo "$count" > /mnt/count
        sync /mnt/count
        echo "qmpnbd-guest: file $count"
    done &
fi
echo '@READY@'

[ "$write" = once ] || read -r sectors < /sys/class/block/vda/size
seed=1
if [ "$write" = steady ]; then
    blocks=$((sectors / 8))
    while :; do
        seed=$(((seed * 1103515245 + 12345) & 0x7fffffff))
        record $(((seed >> 3) % blocks * 4096))
    done
fi
if [ "$write" = pairs ]; then
    read -r sectors < /sys/class/block/vdb/size
    blocks=$((sectors / 8))
    number=0
    while :; do
        number=$((number + 1))
        place=$(((number * @STRIDE@ + 12345) % blocks * 4096))
        put $place vda && put $place vdb || echo "qmpnbd-guest: pair $number at $place failed"
    done
fi
if [ "$write" = stamped ]; then
    blocks=$((sectors / 8))
    while :; do
        for disk in /dev/vd?; do
            number=$((number + 1))
            read -r up idle < /proc/uptime
            place=$(((number * @STRIDE@ + 12345) % blocks * 4096))
            printf '%-4095s\\n' "qmpnbd record $number at $place after $up" |
                dd of=$disk bs=4096 seek=$place oflag=seek_bytes,direct conv=notrunc 2> /dev/null &&
                echo "<2>qmpnbd-guest: wrote $number" > /dev/kmsg
        done
    done
fi
if [ "$write" = hard ]; then
    places=$((sectors / 2048 - 8))
    while :; do
        seed=$(((seed * 1103515245 + 12345) & 0x7fffffff))
        at=$(((seed >> 8) % places))
        case $(((seed >> 5) % 8)) in
            0) record $((at * 1048576)) ;;
            1) blkdiscard -o $((at * 1048576)) -l 4194304 /dev/vda ;;
            *) dd if=/dev/zero of=/dev/vda bs=1M count=8 seek=$at oflag=direct conv=notrunc 2> /dev/null ;;
        esac
    done
fi
if [ "$write" = files ]; then
    mkdir -p /mnt
    mke2fs -F /dev/vda > /dev/null && mount -t ext4 /dev/vda /mnt || echo 'qmpnbd-guest: no filesystem'
    while :; do
        count=$((count + 1))
        for part in 0 2 4 6; do
            dd if=/bin/busybox of="/mnt/file$((count % 3))" bs=1M seek=$part conv=notrunc 2> /dev/null
        done
        rm -f "/mnt/file$(((count + 1) % 3))"
        sync
        if fstrim -v /mnt
        then echo "qmpnbd-guest: trim $count"
        else echo "qmpnbd-guest: trim $count failed"
        fi
    done
fi
while :; do sleep 86400; done
"""


def pair_place(number: int, size: int) -> int:
    """Where a pair goes, in bytes: all over the disk, and no place twice before every one was used.

    Args:
        number: 1 for the first pair.
        size: bytes of the second disk, a power of two.
    """
    return (number * STRIDE + 12345) % (size // RECORD) * RECORD


class GuestError(Exception):
    """The guest cannot be made from what is there."""


@dataclass(frozen=True)
class Guest:
    """What to give to QEMU: ``-kernel``, ``-initrd`` and ``-append``."""

    kernel: Path
    initramfs: Path
    append: str


@dataclass(frozen=True)
class _Parts:
    """The files a guest is made of, read and in order."""

    vmlinuz: bytes
    busybox: bytes
    modules: tuple[tuple[str, bytes], ...]
    agent: tuple[tuple[str, bytes], ...] = ()


def build(packages: Path, output: Path, agent: Path | None = None) -> Guest:
    """Make the guest, or find it made already from the same files.

    Args:
        packages: the folder that the kernel's package and busybox-static were unpacked into.
        output: the folder for what is made; created if need be.
        agent: the folder that qemu-guest-agent and its libraries were unpacked into; None for a guest without.

    Raises:
        GuestError: no kernel, no busybox, or a module or library that is needed is missing.
    """
    parts = _collect(packages, agent)
    guest = Guest(output / "vmlinux", output / "initramfs", APPEND)
    stamp = output / "made-from"
    key = _fingerprint(parts)
    if stamp.is_file() and stamp.read_text() == key and guest.kernel.is_file() and guest.initramfs.is_file():
        return guest
    output.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    _write(guest.kernel, _executable(parts.vmlinuz))
    _write(guest.initramfs, _initramfs(parts))
    _write(stamp, key.encode())
    return guest


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _fingerprint(parts: _Parts) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for content in (parts.vmlinuz, parts.busybox, *(content for _, content in (*parts.modules, *parts.agent))):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


# --- finding the parts -----------------------------------------------------------------------------------------


def _collect(packages: Path, agent: Path | None) -> _Parts:
    kernels = sorted((packages / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise GuestError(f"{packages}: no boot/vmlinuz-* in it; ./scripts/setup demo unpacks one there")
    version = kernels[-1].name.removeprefix("vmlinuz-")
    # Merged-usr releases ship below usr/, older ones do not.
    roots = [packages / "usr", packages]
    busybox = next((root / "bin/busybox" for root in roots if (root / "bin/busybox").is_file()), None)
    if busybox is None:
        raise GuestError(f"{packages}: no busybox in it; ./scripts/setup demo unpacks one there")
    trees = [root / "lib/modules" / version for root in roots]
    tree = next((tree for tree in trees if tree.is_dir()), None)
    names = MODULES if agent is None else MODULES + AGENT_MODULES
    modules = tuple(_modules(tree, names)) if tree else ()
    return _Parts(kernels[-1].read_bytes(), busybox.read_bytes(), modules, _agent(agent) if agent else ())


def _agent(packages: Path) -> tuple[tuple[str, bytes], ...]:
    """The agent, its dynamic loader and its shared libraries, each at the place where it is looked for."""
    places = [place for root in ("lib", "usr/lib") for place in (packages / root).glob("*-linux-gnu/*.so.*")]
    libraries = {place.name: place for place in places}
    if not (packages / AGENT).is_file():
        raise GuestError(f"{packages}: no {AGENT} in it; ./scripts/setup test unpacks one there")
    found = {"bin/qemu-ga": (packages / AGENT).read_bytes()}

    def add(content: bytes) -> None:
        # The names of needed libraries stand in .dynstr; one that is only mentioned does no harm.
        for name in re.findall(rb"(?<=\0)(?:lib[\w.+-]+\.so\.\d+|ld-linux-x86-64\.so\.2)(?=\0)", content):
            file = name.decode()
            place = f"lib64/{file}" if file.startswith("ld-") else f"lib/x86_64-linux-gnu/{file}"
            if place in found or file not in libraries:
                continue
            found[place] = libraries[file].read_bytes()
            add(found[place])

    add(found["bin/qemu-ga"])
    return tuple(found.items())


def _modules(tree: Path, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """The modules needed, those depended upon first; what is built into the kernel is left out."""
    files = {_module_name(path): path for path in sorted(tree.rglob("*.ko*"))}
    listing = tree / "modules.builtin"
    builtin = {_module_name(Path(line)) for line in listing.read_text().split()} if listing.is_file() else set()
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in found or name in builtin:
            return
        if name not in files:
            raise GuestError(f"{tree}: neither a module nor built in: {name}")
        content = _module(files[name])
        # `depends=` in .modinfo is what depmod reads as well; modules.dep is only written on installation.
        listed = re.search(rb"\0depends=([\w,-]*)\0", content)
        for needed in listed[1].decode().split(",") if listed else ():
            if needed:
                add(needed.replace("-", "_"))
        found[name] = content

    for name in names:
        add(name)
    return list(found.items())


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _module(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(content)
    if path.suffix == ".zst":
        return _zstd(content)
    return content


# --- the kernel ------------------------------------------------------------------------------------------------


def _executable(vmlinuz: bytes) -> bytes:
    """The ELF file inside a bzImage; the bzImage itself where that cannot be had, which boots as well, only later.

    Layout of the boot protocol's header (Documentation/arch/x86/boot.rst)::

        0x1f1  u8   setup_sects      sectors before the protected-mode code, less one; 0 means 4
        0x202  4s   "HdrS"
        0x248  u32  payload_offset   from the protected-mode code
        0x24c  u32  payload_length   the last four bytes are the size decompressed
    """
    if vmlinuz[0x202:0x206] != b"HdrS":
        raise GuestError("the kernel is not an x86 bzImage")
    start = ((vmlinuz[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", vmlinuz, 0x248)
    payload = vmlinuz[start + offset : start + offset + length]
    try:
        elf = _decompress(payload)
    except (OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        print(f"guest: the kernel is left compressed ({error})", file=sys.stderr)
        return vmlinuz
    return elf if elf[:4] == b"\x7fELF" else vmlinuz


def _decompress(payload: bytes) -> bytes:
    (size,) = struct.unpack_from("<I", payload, len(payload) - 4)
    match payload[:4]:
        case b"\x7fELF":
            return payload
        case b"\x02\x21\x4c\x18":
            return _lz4_legacy(payload, size)
        case b"\x28\xb5\x2f\xfd":
            return _zstd(payload, size)
        case b"\xfd7zX":
            return lzma.LZMADecompressor().decompress(payload)
        case magic if magic[:2] == b"\x1f\x8b":
            return zlib.decompressobj(wbits=31).decompress(payload)
    raise ValueError(f"compressed in a way not known here: {payload[:4].hex()}")


def _lz4_legacy(payload: bytes, size: int) -> bytes:
    """LZ4's old frame: a magic number, then blocks of at most 8 MiB, each after its compressed length (u32).

    Python has no LZ4, but apt needs liblz4: it is on every machine this runs on.
    """
    library = ctypes.CDLL("liblz4.so.1")
    block = ctypes.create_string_buffer(8 * MIB)
    pieces = []
    position, produced = 4, 0
    while produced < size:
        (length,) = struct.unpack_from("<I", payload, position)
        compressed = payload[position + 4 : position + 4 + length]
        count = library.LZ4_decompress_safe(compressed, block, len(compressed), len(block))
        if count <= 0:
            raise ValueError("a block of LZ4 is damaged")
        pieces.append(ctypes.string_at(block, count))
        position += 4 + length
        produced += count
    return b"".join(pieces)


def _zstd(content: bytes, size: int | None = None) -> bytes:
    """One zstd frame; Python has it from 3.14 on, apt has brought libzstd for longer."""
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_findFrameCompressedSize.restype = ctypes.c_size_t
    library.ZSTD_findFrameCompressedSize.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
    library.ZSTD_getFrameContentSize.restype = ctypes.c_ulonglong
    library.ZSTD_getFrameContentSize.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)
    known = size if size is not None else library.ZSTD_getFrameContentSize(content, len(content))
    if known > 1 << 30:  # also the two values that mean "unknown" and "not zstd"
        raise ValueError("a zstd frame without a sensible size")
    room = ctypes.create_string_buffer(known)
    count = library.ZSTD_decompress(room, known, content, library.ZSTD_findFrameCompressedSize(content, len(content)))
    if count != known:
        raise ValueError("a zstd frame is damaged")
    return room.raw


# --- the initramfs ---------------------------------------------------------------------------------------------


def _initramfs(parts: _Parts) -> bytes:
    init = (
        INIT.replace("@MODULES@", " ".join(name for name, _ in parts.modules))
        .replace("@PLACES@", ",".join(map(str, PLACES)))
        .replace("@READY@", READY)
        .replace("@STRIDE@", str(STRIDE))
    )
    archive = _Newc()
    for folder in ("bin", "dev", "lib", "lib/x86_64-linux-gnu", "lib64", "proc", "sys"):
        archive.add(folder, 0o040755)
    # The kernel opens /dev/console before anything could have made it.
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("bin/busybox", 0o100755, parts.busybox)
    for applet in APPLETS:
        archive.add(f"bin/{applet}", 0o120777, b"busybox")
    for name, content in parts.modules:
        # The suffix matters: busybox declares anything else to be compressed.
        archive.add(f"lib/{name}.ko", 0o100644, content)
    for name, content in parts.agent:
        archive.add(name, 0o100755, content)
    archive.add("init", 0o100755, init.encode())
    return archive.finish()


class _Newc:
    """A cpio archive in the format the kernel reads, "newc".

    Per member: ``070701``, thirteen fields of eight hexadecimal digits (inode, mode, uid, gid, links, mtime, size,
    device major and minor, major and minor of the node itself, length of the name with its NUL, check), the name, the
    content; name and content are each padded to a multiple of four bytes. Owner and times are all zero.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._inode = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pieces += [header, bytes(-len(header) % 4), content, bytes(-len(content) % 4)]

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._pieces)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: guest.py PACKAGES OUTPUT")
    made = build(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"-kernel {made.kernel} -initrd {made.initramfs} -append '{made.append}'")
