"""The document on stdout where ``--json`` was asked for and the command failed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, ErrorEntry


class ErrorDocument(Document):
    """What is on stdout instead of a result when ``--json`` was asked for and the command failed."""

    schema_: Literal["qmpnbd.error/1"] = Field(default="qmpnbd.error/1", alias="schema")
    error: ErrorEntry
