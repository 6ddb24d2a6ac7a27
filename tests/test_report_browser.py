"""The HTML report in a real browser: it draws, zooms, follows light and dark, and fetches and obeys nothing foreign."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpnbd.report.html import validation_html
from qmpnbd.report.model import ValidationReport
from qmpnbd.report.svg import palette
from tests.browser import Browser, browser
from tests.reports import HOSTILE, MIB, sample

pytestmark = pytest.mark.real

PIXEL = """(() => {{
    const canvas = document.querySelector("#picture-{disk} canvas");
    const dot = canvas.getContext("2d").getImageData({x} * canvas.width, {y}, 1, 1).data;
    return "#" + [dot[0], dot[1], dot[2]].map(part => part.toString(16).padStart(2, "0")).join("");
}})()"""
LIGHT, DARK = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in palette().split("@media"))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def shown(report: ValidationReport, chromium: Browser, folder: Path, *, dark: bool = False) -> None:
    page = folder / "report.html"
    page.write_text("".join(validation_html(report)), "utf-8")
    chromium.complaints.clear()
    chromium.open(page, dark=dark)


def pixel(chromium: Browser, share: float, *, disk: int = 0, y: int = 40) -> str:
    found = chromium.value(PIXEL.format(disk=disk, x=share, y=y))
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_each_layer_is_drawn_where_it_is_in_the_colour_of_the_legend(
    chromium: Browser, tmp_path: Path, dark: bool
) -> None:
    shown(sample(), chromium, tmp_path, dark=dark)
    colours = DARK if dark else LIGHT
    assert [pixel(chromium, at / 64) for at in (4, 16, 28, 48)] == [colours[name] for name in ("d1", "d2", "d0", "d3")]
    # The first row of the legend is the active layer.
    swatch = "getComputedStyle(document.querySelector('#disk-0 .swatch rect')).fill"
    red, green, blue = (int(colours["d1"][at : at + 2], 16) for at in (1, 3, 5))
    assert chromium.value(swatch) == f"rgb({red}, {green}, {blue})"
    assert chromium.complaints == []


def test_discrepancies_and_what_was_set_aside_are_marked(chromium: Browser, tmp_path: Path) -> None:
    shown(sample(), chromium, tmp_path)
    assert pixel(chromium, 4.5 / 64, disk=1, y=3) == LIGHT["bad"]
    assert pixel(chromium, 20 / 64, disk=1, y=3) != LIGHT["bad"]
    height = chromium.value("document.querySelector('#picture-2 canvas').height")
    assert pixel(chromium, 44 / 64, disk=2, y=height - 20) == LIGHT["open"]


def test_dragging_zooms_in_and_a_double_click_shows_the_whole_disk_again(chromium: Browser, tmp_path: Path) -> None:
    shown(sample(), chromium, tmp_path)
    chromium.value("document.querySelector('#picture-0 canvas').scrollIntoView()")
    box = chromium.value(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('#picture-0 canvas').getBoundingClientRect())"
    )
    x, y, width = box[0], box[1] + box[3] / 2, box[2]
    chromium.mouse("mouseMoved", x + width * 28 / 64, y)
    words = "document.querySelector('#picture-0 .words').textContent"
    assert chromium.value(words) == f"28 MiB  in no layer, 8 MiB  [{24 * MIB}, {32 * MIB})"
    chromium.mouse("mousePressed", x + width * 26 / 64, y)
    chromium.mouse("mouseMoved", x + width * 30 / 64, y, buttons=1)
    chromium.mouse("mouseReleased", x + width * 30 / 64, y)
    assert {pixel(chromium, share) for share in (0.01, 0.5, 0.99)} == {LIGHT["d0"]}
    overview = "getComputedStyle(document.querySelector('#picture-0 .whole')).display"
    assert chromium.value(overview) == "block"
    chromium.value("document.querySelector('#picture-0 canvas').dispatchEvent(new MouseEvent('dblclick'))")
    assert (chromium.value(overview), pixel(chromium, 4 / 64)) == ("none", LIGHT["d1"])


def test_a_discrepancy_in_the_list_leads_to_its_place(chromium: Browser, tmp_path: Path) -> None:
    shown(sample(), chromium, tmp_path)
    chromium.value("document.querySelector('#disk-1 button.go').click()")
    # 1 MiB of 9 that are shown now, 4 MiB before it: cut by the beginning of the disk it would be elsewhere.
    assert [pixel(chromium, share, disk=1, y=3) == LIGHT["bad"] for share in (0.2, 0.5, 0.8)] == [False, True, False]


def test_keys_zoom_and_move(chromium: Browser, tmp_path: Path) -> None:
    shown(sample(), chromium, tmp_path)
    press = "document.querySelector('#picture-0 canvas').dispatchEvent(new KeyboardEvent('keydown', {{key: '{}'}}))"
    for key in ("+", "+", *["ArrowRight"] * 20):
        chromium.value(press.format(key))
    assert pixel(chromium, 0.01) == pixel(chromium, 0.99) == LIGHT["d3"]
    chromium.value(press.format("Home"))
    assert pixel(chromium, 0.01) == LIGHT["d1"]


def test_a_hostile_name_is_only_shown(chromium: Browser, tmp_path: Path) -> None:
    shown(sample(hostile=HOSTILE), chromium, tmp_path)
    assert chromium.value("document.title").startswith("Discrepancy: validation of /run/</script>")
    assert chromium.value("document.querySelectorAll('img').length") == 0
    assert chromium.value("document.querySelectorAll('canvas').length") == 3
    assert "</script><script>" in chromium.value("document.querySelector('#disk-0 h2').textContent")
    assert chromium.complaints == []


def test_the_page_forbids_itself_what_is_not_its_own(chromium: Browser, tmp_path: Path) -> None:
    shown(sample(), chromium, tmp_path)
    put = "document.body.append(Object.assign(document.createElement('{}'), {}))"
    chromium.value(put.format("script", "{textContent: 'document.title = 1'}"))
    assert chromium.value("document.title") != "1"
    chromium.value(put.format("img", "{src: 'https://example.invalid/x.png'}"))
    assert len([each for each in chromium.complaints if "Content Security Policy" in each]) == 2


def test_on_a_narrow_screen_only_tables_are_wider_than_it(chromium: Browser, tmp_path: Path) -> None:
    shown(sample(), chromium, tmp_path)
    chromium.open(tmp_path / "report.html", width=390)
    assert chromium.value("document.documentElement.scrollWidth") == 390
