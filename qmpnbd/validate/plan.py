"""A plan: a TOML file that says what is to be validated, and how.

::

    compare = ["depth", "base", "bitmaps"]      # the same words as --compare; likewise content and seed
    content = "sample"

    [[vm]]
    qmp = "/run/vm1.qmp"
    disks = ["vd0", "vd1"]                      # all disks of the guest if left out
    nbd = "nbd+unix:///?socket=/run/vm1.nbd"    # the server it runs already, if it does

    [[export]]
    uri = "nbd://host/disk"
    image = "disk.qcow2"

    [[image]]
    path = "template.qcow2"
    format = "qcow2"                            # guessed if left out; likewise for an export

    [[folder]]
    path = "images"

Relative names are looked for beside the plan. A mistake is told with the line and the field; Python's reader of TOML
keeps no line numbers, so the line is found again by the table's header and the key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qmpnbd.errors import UsageError
from qmpnbd.validate.choice import ContentMode
from qmpnbd.validate.folders import absolute, images_in
from qmpnbd.validate.target import ImageTarget, MonitorTarget, ServedTarget, Target

MAX_PLAN = 16 << 20  # bytes; a hundred thousand images
_REMEDY = "Correct the plan; docs/validation.md describes it."
_KEYED = {"vm", "export", "image", "folder"}


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Vm(_Table):
    qmp: str = Field(min_length=1)
    disks: list[str] = []
    nbd: str | None = None


class _Export(_Table):
    uri: str = Field(min_length=1)
    image: str = Field(min_length=1)
    format: str | None = None


class _Image(_Table):
    path: str = Field(min_length=1)
    format: str | None = None


class _Folder(_Table):
    path: str = Field(min_length=1)


class _Document(_Table):
    compare: list[Literal["depth", "base", "bitmaps"]] | None = None
    content: ContentMode | None = None
    seed: int | None = Field(default=None, ge=0)
    vm: list[_Vm] = []
    export: list[_Export] = []
    image: list[_Image] = []
    folder: list[_Folder] = []


@dataclass(frozen=True, slots=True)
class Plan:
    """What a plan says.

    Attributes:
        targets: in the order of running QEMUs, exports, images, folders.
        compare: names of `qmpnbd.validate.choice.MAPS`; None if it does not say.
        content: likewise.
        seed: likewise.
    """

    targets: tuple[Target, ...]
    compare: tuple[str, ...] | None
    content: ContentMode | None
    seed: int | None


def load_plan(path: str) -> Plan:
    """Reads a plan.

    Raises:
        UsageError: it cannot be read, or has a mistake; the message names line and field.
        ImageUnreadableError: a folder in it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_PLAN + 1)
    except OSError as error:
        raise UsageError(f"the plan cannot be read: {error.strerror}", where=path, remedy="Check the name.") from error
    if len(content) > MAX_PLAN:
        raise UsageError(f"a plan has at most {MAX_PLAN >> 20} MiB", where=path, remedy=_REMEDY)
    try:
        text = content.decode()
        document = _Document.model_validate(tomllib.loads(text))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError("it is no UTF-8 text", where=f"{path}, line {line}", remedy=_REMEDY) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"it is no TOML: {error}", where=path, remedy=_REMEDY) from error
    except ValidationError as error:
        raise _mistake(path, text, error) from error
    targets = tuple(_targets(document, Path(path).parent))
    if not targets:
        raise UsageError("it names nothing to validate", where=path, remedy=_REMEDY)
    compare = None if document.compare is None else tuple(document.compare)
    return Plan(targets, compare, document.content, document.seed)


def _targets(document: _Document, beside: Path) -> Iterator[Target]:
    def file(name: str) -> str:
        return absolute(str(beside / name))

    for vm in document.vm:
        monitor = vm.qmp if re.match(r"[^/]*:", vm.qmp) else file(vm.qmp)
        yield MonitorTarget(monitor, tuple(vm.disks), vm.nbd)
    for export in document.export:
        yield ServedTarget(export.uri, file(export.image), export.format, export.image)
    for image in document.image:
        yield ImageTarget(file(image.path), image.format, image.path)
    for folder in document.folder:
        yield from images_in(file(folder.path))


def _mistake(path: str, text: str, error: ValidationError) -> UsageError:
    # A field that nobody knows comes before the one that is missing, most likely for its sake.
    first, *others = sorted(error.errors(), key=lambda each: each["type"] == "missing")
    place = first["loc"]
    field = ".".join(f"[{part + 1}]" if isinstance(part, int) else part for part in place).replace(".[", "[")
    more = f" (and {len(others)} more)" if others else ""
    kind = {"extra_forbidden": "there is no such field", "missing": "it is missing"}.get(first["type"], first["msg"])
    return UsageError(f"{field}: {kind}{more}", where=f"{path}, line {line_of(text, place)}", remedy=_REMEDY)


def line_of(text: str, place: Sequence[int | str]) -> int:
    """Finds the line of a field in a plan: that of its key, else that of its table, else the first.

    Args:
        text: the plan.
        place: a key of the plan; or the name of an array of tables, which of them from 0 on, and a key in it.
    """
    lines = text.splitlines()
    headers = [number for number, line in enumerate(lines) if re.match(r"\s*\[", line)]
    name, first, last, keys = str(place[0]), 0, next(iter(headers), len(lines)), place
    own = [number for number in headers if re.match(rf"\s*\[+\s*{re.escape(name)}\s*\]", lines[number])]
    found = own[0] if own else 0
    which = place[1] if len(place) > 1 else None
    if name in _KEYED and isinstance(which, int) and which < len(own):
        first = found = own[which]
        last = next((number for number in headers if number > first), len(lines))
        keys = place[2:]
    pattern = rf"\s*[\"']?{re.escape(str(keys[0]))}[\"']?\s*[=.]" if keys else r"(?!)"
    return next((number for number in range(first, last) if re.match(pattern, lines[number])), found) + 1
