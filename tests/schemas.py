"""The committed JSON schemas; run as a module to write them anew."""

from __future__ import annotations

import json
from pathlib import Path

from qmpnbd.report.model import DOCUMENTS

FOLDER = Path(__file__).parent.parent / "docs" / "schema"


def schemas() -> dict[str, str]:
    """File name -> content, generated from the models."""
    found = {}
    for document in DOCUMENTS:
        name = document.model_fields["schema_"].default.replace("/", "-")
        schema = document.model_json_schema(by_alias=True, mode="serialization")
        found[f"{name}.json"] = json.dumps(schema, indent=2) + "\n"
    return found


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in schemas().items():
        (FOLDER / name).write_text(content)


if __name__ == "__main__":
    main()
