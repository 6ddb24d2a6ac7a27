"""Plans: what they say, and that every mistake is told with its line and its field."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpnbd.errors import UsageError
from qmpnbd.validate.plan import MAX_PLAN, load_plan
from qmpnbd.validate.target import ImageTarget, MonitorTarget, ServedTarget

WHOLE = """\
compare = ["depth"]
content = "whole"
seed = 7

[[vm]]
qmp = "/run/one.qmp"
disks = ["vd0", "vd1"]
nbd = "nbd+unix:///?socket=/run/one.nbd"

[[vm]]
qmp = "localhost:4444"

[[export]]
uri = "nbd://host/disk"
image = "disk.qcow2"

[[image]]
path = "/images/template"
format = "raw"

[[folder]]
path = "more"
"""


def test_a_plan_says_what_and_how(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.raw").write_bytes(bytes(512))
    (tmp_path / "plan.toml").write_text(WHOLE)
    plan = load_plan(str(tmp_path / "plan.toml"))
    assert plan.targets == (
        MonitorTarget("/run/one.qmp", ("vd0", "vd1"), "nbd+unix:///?socket=/run/one.nbd"),
        MonitorTarget("localhost:4444"),
        ServedTarget("nbd://host/disk", str(tmp_path / "disk.qcow2"), None, "disk.qcow2"),
        ImageTarget("/images/template", "raw"),
        ImageTarget(str(tmp_path / "more" / "a.raw"), "raw"),
    )
    assert (plan.compare, plan.content, plan.seed) == (("depth",), "whole", 7)


MISTAKES = {
    "an unknown field": (WHOLE.replace("disks =", "disk ="), 7, "vm[1].disk: there is no such field"),
    "an unknown table": (WHOLE.replace("[[folder]]", "[[directory]]"), 21, "directory: there is no such field"),
    "a missing field": (WHOLE.replace('image = "disk.qcow2"\n', ""), 13, "export[1].image: it is missing"),
    "a wrong type": (WHOLE.replace('"localhost:4444"', "4444"), 11, "vm[2].qmp"),
    "a wrong word": (WHOLE.replace('"whole"', '"all"'), 2, "content"),
    "a wrong list": (WHOLE.replace('["depth"]', '["depth", "width"]'), 1, "compare[2]"),
    "an empty name": (WHOLE.replace('"more"', '""'), 22, "folder[1].path"),
    "a table that should be a list": (WHOLE.replace("[[image]]", "[image]"), 17, "image"),
    "a misspelt field": (WHOLE.replace("uri =", "url ="), 14, "export[1].url: there is no such field (and 1 more)"),
    "two mistakes": (WHOLE.replace("seed = 7", "seed = -1").replace("uri", "url"), 3, "seed"),
}


@pytest.mark.parametrize(("text", "line", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_with_line_and_field(tmp_path: Path, text: str, line: int, words: str) -> None:
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_plan(str(tmp_path / "plan.toml"))
    assert caught.value.where == f"{tmp_path}/plan.toml, line {line}"
    assert caught.value.what.startswith(words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[[vm]\n", "line 1"),
        (b'a = "\xff"\n', "UTF-8"),
        (b"", "nothing to validate"),
        (b"#" * (MAX_PLAN + 1), "at most"),
    ],
)
def test_what_is_no_plan(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "plan.toml").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        load_plan(str(tmp_path / "plan.toml"))


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_plan(str(tmp_path / "plan.toml"))
