"""The forms of a validation report for machines and for browsers, read back by parsers that are not ours."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as Xml
from html.parser import HTMLParser
from pathlib import Path

import junitparser
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from qmpnbd.errors import DeadlineError
from qmpnbd.extents import ExtentMap
from qmpnbd.report.html import MAX_RUNS, validation_html
from qmpnbd.report.jsontext import document_json
from qmpnbd.report.junit import validation_junit
from qmpnbd.report.model import DiskLine, ErrorEntry, SummaryLine, ValidationReport
from qmpnbd.report.ndjson import disk_line, summary_line
from qmpnbd.report.picture import picture_of, reduced
from qmpnbd.report.prometheus import validation_metrics
from qmpnbd.report.strip import PICTURE_RUNS, bounded, bounded_marks
from qmpnbd.report.svg import maps_svg
from qmpnbd.report.text import validation_text
from tests.reports import HOSTILE, MIB, disk, layers, report, sample, waiting

STOPPED = ErrorEntry.of(DeadlineError("timed out", where="vd7"))
maps = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=30).map(ExtentMap.of_extents)


def page(of: ValidationReport) -> str:
    return "".join(validation_html(of))


@given(maps, st.integers(1, 12))
def test_a_bounded_map_is_the_map_or_says_what_most_bytes_of_each_part_are(extents: ExtentMap, runs: int) -> None:
    small = bounded(extents, runs)
    assert small.size == extents.size
    assert len(small) <= max(runs, 1)
    if len(extents) <= runs:
        assert small == extents


@given(maps, st.integers(1, 12))
def test_no_mark_is_lost_however_coarse_the_picture(extents: ExtentMap, runs: int) -> None:
    marks = bounded_marks(extents, runs)
    assert len(marks) <= runs
    assert all(marks.at(offset) for offset in range(extents.size) if extents.at(offset))
    if len(extents.mapped(lambda values: values != 0)) <= runs:
        assert marks == extents.mapped(lambda values: values != 0)


def test_a_million_statuses_take_no_more_memory_than_a_few(memory_budget: None) -> None:
    ends = np.arange(1, 1_000_001, dtype=np.uint64)
    picture = picture_of(ExtentMap(ends, ends), ExtentMap(ends, ends % np.uint64(2)), ExtentMap.uniform(10**6, 0))
    assert len(picture.ends) <= PICTURE_RUNS
    assert picture.part == -(-(10**6) // PICTURE_RUNS)
    assert picture.discrepancies == ((0, 10**6),)


def test_a_picture_can_be_made_smaller_and_keeps_its_marks() -> None:
    served = ExtentMap.of_extents([(MIB, each % 3) for each in range(64)])
    found = ExtentMap.of_extents([(10 * MIB, 0), (1, 1), (54 * MIB - 1, 0)])
    whole = picture_of(served, found, ExtentMap.uniform(served.size, 0))
    assert (whole.part, len(whole.ends), whole.discrepancies) == (0, 64, ((10 * MIB, 10 * MIB + 1),))
    small = reduced(whole, 8)
    assert (small.part, len(small.ends) <= 8) == (8 * MIB, True)
    assert (small.discrepancies, small.set_aside) == (((10 * MIB, 10 * MIB + 1),), ())


class TestJunit:
    def test_each_disk_is_a_case_and_only_what_is_proven_is_green(self) -> None:
        (suite,) = junitparser.JUnitXml.fromstring(validation_junit(sample()).encode())
        cases = {case.name: [type(each).__name__ for each in case.result] for case in suite}
        assert cases == {"vd0": [], "vd1": ["Failure"], "vd2": ["Error"], "vd3": ["Error"], "vd4": ["Error"]}
        assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (5, 1, 3, 0)
        assert suite.timestamp == "2025-03-04T05:06:07"

    def test_a_run_that_was_stopped_is_not_green(self) -> None:
        whole = report(sample().disks[0], stopped=STOPPED)
        (suite,) = junitparser.JUnitXml.fromstring(validation_junit(whole).encode())
        assert [(case.name, len(case.result)) for case in suite] == [("vd0", 0), ("all disks were validated", 1)]
        assert (suite.tests, suite.errors) == (2, 1)

    @pytest.mark.parametrize("hostile", ["", HOSTILE], ids=["plain", "hostile"])
    def test_the_schema_of_build_servers_accepts_it(self, hostile: str, tmp_path: Path) -> None:
        xmllint = shutil.which("xmllint")
        if xmllint is None:
            pytest.skip("no xmllint here (libxml2-utils)")
        whole = sample(hostile=hostile)
        stopped = report(whole.disks[0], stopped=STOPPED)
        for name, each in (("whole", whole), ("stopped", stopped)):
            (tmp_path / name).write_text(validation_junit(each))
            command = [xmllint, "--noout", "--schema", str(Path(__file__).parent / "junit.xsd"), str(tmp_path / name)]
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr


class TestPrometheus:
    def test_every_value_comes_back(self) -> None:
        families = {
            family.name: family for family in text_string_to_metric_families("".join(validation_metrics(sample())))
        }
        assert all(family.documentation and family.type == "gauge" for family in families.values())
        verdicts = {
            sample.labels["disk"]: sample.labels["verdict"]
            for sample in families["qmpnbd_validate_verdict"].samples
            if sample.value
        }
        expected = ("agreed", "discrepancy", "incomplete", "error", "not-judged")
        assert verdicts == {f"vd{number}": verdict for number, verdict in enumerate(expected)}
        found = {each.labels["disk"]: each.value for each in families["qmpnbd_validate_disk_discrepancy_bytes"].samples}
        assert found == {"vd0": 0, "vd1": 2 * MIB, "vd2": 0}
        seen = [each for each in families["qmpnbd_validate_layer_seen_bytes"].samples if each.labels["disk"] == "vd0"]
        assert [(each.labels["file"], each.value) for each in seen] == [
            ("/images/top", 8 * MIB),
            ("/images/middle", 16 * MIB),
            ("/images//base", 32 * MIB),
        ]

    def test_a_hostile_name_stays_in_its_label(self) -> None:
        text = "".join(validation_metrics(report(disk(f'a"b\\c\n{HOSTILE}', ExtentMap.uniform(MIB, 1), layers("x")))))
        (size,) = next(
            f for f in text_string_to_metric_families(text) if f.name == "qmpnbd_validate_disk_size_bytes"
        ).samples
        assert size.value == MIB
        assert size.labels["disk"].startswith('a"b\\c\\n</script>')

    def test_a_run_that_was_stopped_says_so(self) -> None:
        assert 'qmpnbd_validate_complete{monitor="/run/vm.qmp"} 0\n' in "".join(
            validation_metrics(report(stopped=STOPPED))
        )


class TestNdjson:
    def test_each_line_is_a_document_of_its_schema(self) -> None:
        whole = sample(hostile=HOSTILE)
        lines = [disk_line(each) for each in whole.disks] + [summary_line(whole)]
        assert [line.count("\n") for line in lines] == [1] * 6
        assert [DiskLine.model_validate_json(line).disk.name for line in lines[:5]] == [
            each.name for each in whole.disks
        ]
        summary = SummaryLine.model_validate_json(lines[-1])
        assert summary.disks == {"agreed": 1, "discrepancy": 1, "incomplete": 1, "error": 1, "not-judged": 1}
        assert [json.loads(line)["schema"] for line in lines[4:]] == [
            "qmpnbd.validate-disk/1",
            "qmpnbd.validate-summary/1",
        ]


class Elements(HTMLParser):
    """Every element with its attributes, and what is text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


class TestHtml:
    def test_a_hostile_name_makes_no_element_and_no_attribute(self) -> None:
        plain, hostile = (Elements(page(sample(hostile=name))) for name in ("", HOSTILE))
        assert [(tag, list(attributes)) for tag, attributes in hostile.found] == [
            (tag, list(attributes)) for tag, attributes in plain.found
        ]
        assert "\u202e" not in hostile.text
        assert "\\u202e\\n\\x1b[31m" in hostile.text

    def test_nothing_is_fetched(self) -> None:
        text = page(sample())
        assert not re.search(r"""\b(?:src|href)=(?!"#)|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", text)
        (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', text)
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy

    def test_layers_name_their_files_and_say_how_much_comes_from_them(self) -> None:
        text = re.sub(r"\s+", " ", Elements(page(report(sample().disks[0]))).text)
        assert "every byte agrees" in text
        for words in (
            "top/imagesqcow2, 64 KiB8 MiB12.5 %",
            "middle/imagesqcow2, 64 KiB16 MiB25.0 %",
            "in no layer8 MiB",
        ):
            assert words in text

    def test_what_differs_is_called_by_its_name(self) -> None:
        """A bitmap's 1 is no depth, and a disk whose turn did not come has neither layers nor a size."""
        text = re.sub(r"\s+", " ", Elements(page(sample())).text)
        assert "bitmap-misses-change: qemu:dirty-bitmap:0 clean1 dirty" in text
        assert "depth1 local2 backing depth 2middle" in text
        assert text.count("Layers") == 3
        last = page(report(sample().disks[4]))
        assert "1 disk: its turn did not come" in last
        assert "0 B" not in last

    def test_the_page_is_bounded_whatever_the_disks_look_like(self) -> None:
        ends = np.arange(1, 2_000_001, dtype=np.uint64) * np.uint64(65536)
        fine = disk("fine", ExtentMap(ends, ends // np.uint64(65536) % np.uint64(4)), layers("a", "b", "c"))
        assert len(page(report(fine))) < 300_000
        assert MAX_RUNS // 400 < PICTURE_RUNS
        assert len(page(report(*[fine] * 400))) < 12_000_000

    def test_a_run_that_was_stopped_says_so(self) -> None:
        assert "ended before all disks were validated: vd7: timed out" in page(
            report(sample().disks[0], stopped=STOPPED)
        )
        assert "stopped before all disks" in validation_text(report(sample().disks[0], stopped=STOPPED))

    def test_a_run_without_a_disk_is_a_page(self) -> None:
        assert "0 disks" in page(report(stopped=STOPPED, verdict="error"))


class TestSvg:
    @given(maps, maps)
    def test_strips_are_well_formed_and_cover_the_disk(self, first: ExtentMap, second: ExtentMap) -> None:
        second = second.resized(first.size, 0)
        contexts = {
            "qemu:allocation-depth": first,
            "base:allocation": second,
            "qemu:dirty-bitmap:x": second,
            HOSTILE: first,
        }
        root = Xml.fromstring("".join(maps_svg(HOSTILE, contexts)))
        strips = [each for each in root.iter("{http://www.w3.org/2000/svg}rect") if each.get("height") == "44"]
        assert sum(float(each.attrib["width"]) for each in strips) == pytest.approx(4 * 912, abs=0.01 * len(strips))

    def test_it_is_bounded(self) -> None:
        ends = np.arange(1, 300_001, dtype=np.uint64)
        assert len("".join(maps_svg("x", {"foreign:thing": ExtentMap(ends, ends)}))) < 150_000

    def test_an_empty_disk(self) -> None:
        root = Xml.fromstring("".join(maps_svg("x", {"qemu:allocation-depth": ExtentMap([], [])})))
        assert root.tag.endswith("svg")


def test_disks_of_one_name_of_several_guests_are_told_apart() -> None:
    """A file in which a time series is there twice is refused as a whole by node_exporter."""
    guests = ("/run/a.qmp", "/run/b.qmp")
    fleet = report(*(waiting("vd0").model_copy(update={"source": each}) for each in guests), monitor="", qemu="")
    lines = "".join(validation_metrics(fleet)).splitlines()
    series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))
    cases = Xml.fromstring(validation_junit(fleet)).iter("testcase")
    assert [case.get("classname") for case in cases] == list(guests)
    assert "<code></code>" not in page(fleet)


def test_why_a_disk_was_not_judged_is_told_in_every_form() -> None:
    of = report(waiting("vd0"), waiting("vd1").model_copy(update={"not_judged_because": "fail-fast"}))
    for form in (page(of), validation_junit(of), validation_text(of)):
        assert "because of --fail-fast" in form


def test_the_json_document_has_no_picture() -> None:
    document = json.loads(document_json(sample()))
    assert "picture" not in document["disks"][0]
    assert ValidationReport.model_validate(document).disks[0].strip == sample().disks[0].strip
