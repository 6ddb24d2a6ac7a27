"""Checks of qcow2 files: each rule by hand, and every number against ``qemu-img check`` on sound and damaged images."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, ImageCorruptError, ImageError, ImageUnsupportedError
from qmpnbd.images import check_file
from qmpnbd.images.check import MAX_EXAMPLES, Findings, Ledger, Rule, Use
from qmpnbd.images.check_file import CheckResult, check_image
from qmpnbd.images.check_tables import compressed_places
from qmpnbd.images.files import open_chain
from qmpnbd.images.refcounts import block_entries, pack_refcounts, refcount_limit, unpack_refcounts
from tests.chains import SECRET, encrypted_options, make_encrypted, run
from tests.damage import VICTIMS, Victim, damage, make, number, places

COPIED = 1 << 63
Numbers = dict[str, int]


def ours(found: CheckResult) -> Numbers:
    return {
        "corruptions": found.corruptions,
        "leaks": found.leaks,
        "check-errors": found.errors,
        "image-end-offset": found.image_end_offset,
        "total-clusters": found.total_clusters,
        "allocated-clusters": found.allocated_clusters,
        "fragmented-clusters": found.fragmented_clusters,
        "compressed-clusters": found.compressed_clusters,
    }


def theirs(path: Path, *options: str) -> Numbers | None:
    """What qemu-img counts; None if it does not check the image at all. Options name the image in another way."""
    tool = shutil.which("qemu-img")
    assert tool, "qemu-img is not installed"
    command = [tool, "check", "--output=json", *(options or ("-f", "qcow2", str(path)))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if not done.stdout:
        return None
    found = json.loads(done.stdout)
    return {name: found.get(name, 0) for name in ours_names()}


def ours_names() -> list[str]:
    return list(ours(CheckResult("", 512, 0, 0, 0, 0, 0, 0, False, False, Findings())))


@pytest.mark.parametrize("order", range(7))
@given(data=st.data())
def test_refcounts_of_every_width(order: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, refcount_limit(order)), min_size=8, max_size=8))
    packed = pack_refcounts(counts, order)
    assert len(packed) == 8 << order >> 3
    assert unpack_refcounts(np.frombuffer(packed, dtype=np.uint8), order).tolist() == counts


def test_the_first_refcount_is_in_the_lowest_bits() -> None:
    byte = np.array([0b11100100], dtype=np.uint8)
    assert unpack_refcounts(byte, 0).tolist() == [0, 0, 1, 0, 0, 1, 1, 1]
    assert unpack_refcounts(byte, 1).tolist() == [0, 1, 2, 3]
    assert block_entries(65536, 4) == 32768


def ledger(
    findings: Findings, first: int = 0, count: int = 16, order: int = 4, size: int = 16 * 512, *, is_last: bool = True
) -> Ledger:
    return Ledger(first, count, findings, is_last=is_last, cluster_bits=9, order=order, file_size=size)


def test_a_range_counts_every_cluster_it_touches() -> None:
    findings = Findings()
    counted = ledger(findings)
    counted.add_range(Use.L1_TABLE, 0x3FF, 2, findings)
    counted.add_range(Use.DATA, 0x600, 0, findings)
    counted.add_many(Use.COMPRESSED_DATA, np.array([0x7FF, 0x800]), np.array([1026, 512]), findings)
    assert counted.references[:8].tolist() == [0, 1, 1, 1, 2, 1, 1, 0]
    assert findings.counts == {}


def test_only_clusters_of_the_window_are_counted() -> None:
    findings = Findings()
    counted = ledger(findings, first=4, count=4)
    counted.add_range(Use.HEADER, 0, 16 * 512, findings)
    counted.add_many(Use.DATA, np.arange(0, 16) * 512, 512, findings)
    assert counted.references.tolist() == [2, 2, 2, 2]


def test_references_beyond_the_end_are_findings() -> None:
    findings = Findings()
    counted = ledger(findings, size=0x500)
    counted.add_range(Use.L2_TABLE, 0x400, 512, findings)  # the last cluster may be cut
    counted.add_range(Use.L2_TABLE, 0x600, 512, findings)
    counted.add_many(Use.DATA, np.array([0x400, 0x600, 1 << 55]), 512, findings)
    assert findings.counts == {Rule.BEYOND_END: 3}
    assert findings.examples[Rule.BEYOND_END][2].text == (
        "data of 0x200 bytes at 0x80000000000000, but the file ends at 0x500"
    )


def test_more_references_than_fit() -> None:
    findings = Findings()
    counted = ledger(findings, order=1)
    for _ in range(2):
        counted.add_many(Use.DATA, np.zeros(5, dtype=np.int64), 512, findings)
    assert findings.counts == {Rule.REFCOUNT_FULL: 7}
    assert counted.references[0] == 3


def test_leaks_corruptions_and_overlaps() -> None:
    findings = Findings()
    counted = ledger(findings)
    counted.set_refcounts(0, np.array([1, 1, 2, 0, 3, 1], dtype=np.uint16))
    counted.add_range(Use.HEADER, 0, 512, findings)
    counted.add_range(Use.L2_TABLE, 512, 512, findings)
    counted.add_many(Use.DATA, np.array([1, 2, 2, 3]) * 512, 512, findings)
    assert counted.compare(16) == 5
    assert findings.counts == {Rule.REFCOUNT_LOW: 2, Rule.LEAK: 2, Rule.OVERLAP: 1}
    assert findings.examples[Rule.REFCOUNT_LOW][0].text == "refcount 1, 2 references (L2 table and data)"


def test_only_the_first_places_are_kept() -> None:
    findings = Findings()
    findings.add_many(Rule.LEAK, np.ones(1000, dtype=bool), lambda index: (index, "x"))
    findings.add(Rule.LEAK, 1000, "y")
    assert findings.counts == {Rule.LEAK: 1001}
    assert len(findings.examples[Rule.LEAK]) == MAX_EXAMPLES


def test_where_compressed_data_lies() -> None:
    entries = np.array([1 << 62 | 0x1234, 1 << 62 | 3 << 54 | 0x1200], dtype=np.uint64)
    offsets, sizes = compressed_places(entries, 16)
    assert (offsets.tolist(), sizes.tolist()) == ([0x1234, 0x1200], [512 - 0x34, 4 * 512])


@pytest.mark.real
@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_encrypted_images(kind: str, here: Path) -> None:
    """qemu-img needs the key to open them, we do not; sound, and damaged."""
    make_encrypted("a.qcow2", kind, "cluster_size=4k", "8M")
    options = encrypted_options("a.qcow2", kind)
    commands = ("write -q 0 50k", "write -q 3M 9k", "write -q -z 1M 64k", "discard -q 8k 4k")
    run("qemu-io", *SECRET, *(part for command in commands for part in ("-c", command)), "--image-opts", options)
    run("qemu-img", "snapshot", "-q", *SECRET, "-c", "s", "--image-opts", options)
    whole = Path("a.qcow2").read_bytes()
    compared = 0
    for seed in range(40):
        image = bytearray(whole)
        if seed:
            damage(image, random.Random(f"{kind} {seed}"))
        Path("a.qcow2").write_bytes(image)
        wanted = theirs(Path("a.qcow2"), *SECRET, "--image-opts", options)
        if wanted is not None:
            assert ours(check_image("a.qcow2")) == wanted, seed
            compared += 1
        if not seed:
            assert wanted is not None
            assert (wanted["corruptions"], wanted["leaks"]) == (0, 0)
    assert compared > 25


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("victims")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for victim in VICTIMS:
            make(victim, folder)
    return folder


@pytest.fixture
def beside(victims: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(victims)
    return victims


@pytest.mark.real
@pytest.mark.parametrize("victim", VICTIMS, ids=lambda victim: victim.name)
def test_damaged_images(victim: Victim, beside: Path) -> None:
    """Where QEMU checks, every number is the same; where it refuses, it is not called clean, or refused too."""
    whole = (beside / f"{victim.name}.qcow2").read_bytes()
    path = beside / f"{victim.name}.damaged"
    compared = 0
    for seed in range(40):
        image = bytearray(whole)
        damage(image, random.Random(f"{victim.name} {seed}"))
        path.write_bytes(image)
        wanted = theirs(path)
        try:
            found = check_image(str(path), image_format="qcow2")
        except ImageError:
            assert wanted is None, seed
            continue
        assert wanted is None or ours(found) == wanted, seed
        compared += wanted is not None
    assert compared > 25


@pytest.mark.real
@pytest.mark.parametrize("victim", VICTIMS, ids=lambda victim: victim.name)
def test_refcounts_off_by_one(victim: Victim, beside: Path) -> None:
    """Every refcount that is in use, one up and one down, alone."""
    path = beside / f"{victim.name}.damaged"
    image = bytearray((beside / f"{victim.name}.qcow2").read_bytes())
    order = int.from_bytes(image[96:100], "big") if victim.name != "old" else 4
    block = places(image)["refcount block"][0]
    length = (1 << int.from_bytes(image[20:24], "big")) if victim.name != "smallest" else 512
    counts = unpack_refcounts(np.frombuffer(bytes(image[block : block + length]), dtype=np.uint8), order).astype(int)
    for cluster in np.flatnonzero(counts)[::5].tolist():
        for step in (1, -1):
            changed = counts.copy()
            changed[cluster] += step
            if changed[cluster] > refcount_limit(order):
                continue
            path.write_bytes(image[:block] + pack_refcounts(changed, order) + image[block + length :])
            found = check_image(str(path))
            assert ours(found) == theirs(path)
            assert (found.leaks, found.corruptions > 0) in ((1, False), (0, True), (1, True))


@pytest.mark.real
def test_windows_give_the_same_as_one(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = beside / "windows"
    # Narrow refcounts make thousands of windows.
    for name, seeds in (
        ("order4", 12),
        ("order0", 2),
        ("order1", 2),
        ("smallest", 12),
        ("bitmaps", 12),
        ("extended", 12),
    ):
        for seed in range(seeds):
            image = bytearray((beside / f"{name}.qcow2").read_bytes())
            if seed:
                damage(image, random.Random(seed))
            path.write_bytes(image)
            with monkeypatch.context() as patch:
                try:
                    whole = check_image(str(path), image_format="qcow2")
                except ImageError:
                    continue
                patch.setattr(check_file, "WINDOW", 16)
                patch.setattr(check_file, "_L1_SLICE", 3)
                patch.setattr(check_file, "_BATCH", 1)
                parts = check_image(str(path), image_format="qcow2")
            assert ours(parts) == ours(whole)
            assert parts.findings.counts == whole.findings.counts


@pytest.mark.real
def test_an_overlap_that_refcounts_do_not_show(beside: Path) -> None:
    """A data cluster that is an L2 table too, with a refcount of 2: QEMU calls it clean."""
    path = beside / "overlap"
    image = bytearray((beside / "order4.qcow2").read_bytes())
    known = places(image)
    table = number(image, known["l1"][0]) & ~COPIED
    image[known["l1"][0] : known["l1"][0] + 8] = table.to_bytes(8, "big")
    image[table + 8 * 400 : table + 8 * 401] = table.to_bytes(8, "big")
    at = known["refcount block"][0] + 2 * (table >> 12)
    image[at : at + 2] = (2).to_bytes(2, "big")
    path.write_bytes(image)
    found = check_image(str(path))
    assert ours(found) == theirs(path)
    assert (found.corruptions, found.leaks, found.overlaps) == (0, 0, 1)
    assert "L2 table and data" in found.findings.examples[Rule.OVERLAP][0].text


def test_what_cannot_be_checked(tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(512))
    with pytest.raises(ImageUnsupportedError, match="raw has no refcounts"):
        check_image(str(raw))


@pytest.mark.real
def test_what_qemu_does_not_open_either(beside: Path) -> None:
    whole = (beside / "order4.qcow2").read_bytes()
    path = beside / "refused"
    for at, value in ((96, 7), (56, 1 << 20), (48, 1)):
        image = bytearray(whole)
        width = 8 if at == 48 else 4
        image[at : at + width] = value.to_bytes(width, "big")
        path.write_bytes(image)
        assert theirs(path) is None
        with pytest.raises(ImageCorruptError, match="header field refcount_"):
            check_image(str(path))


@pytest.mark.real
def test_any_byte_may_be_wrong(beside: Path) -> None:
    """Check and content of files with random bytes in header and tables: a result, or a documented error."""
    path = beside / "bytes"
    wholes = {victim.name: (beside / f"{victim.name}.qcow2").read_bytes() for victim in VICTIMS}
    ended = 0
    for seed in range(600):
        dice = random.Random(seed)
        image = bytearray(wholes[dice.choice(sorted(wholes))])
        for _ in range(dice.randrange(1, 4)):
            image[dice.randrange(dice.choice([200, len(image)]))] = dice.choice([0, 255, dice.randrange(256)])
        path.write_bytes(image)
        with contextlib.suppress(ImageError):
            check_image(str(path), image_format="qcow2", deadline=Deadline(20))
            ended += 1
        with contextlib.suppress(ImageError), open_chain(str(path), format="qcow2", deadline=Deadline(20)) as chain:
            chain.read(0, min(chain.size, 1 << 22))
            chain.read(max(chain.size - 5000, 0), min(chain.size, 5000))
    assert 200 < ended < 600


@pytest.mark.real
def test_a_check_that_runs_out_of_time(beside: Path) -> None:
    deadline = Deadline(None)
    deadline.stop()
    with pytest.raises(DeadlineError):
        check_image("order4.qcow2", deadline=deadline)
