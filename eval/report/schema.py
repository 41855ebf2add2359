"""`report.schema.json`: the JSON Schema of report.json, made from the dataclasses that are written.

python -m equipoise.eval.report.schema        # writes it anew; a test fails where it is behind
"""

import ast
import dataclasses
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from equipoise.data.files import write_aside
from equipoise.eval.category_report import SCHEMA_VERSION, CategoryReport, SampleResult
from equipoise.eval.judges.calibration import HeadCalibration, JudgeCalibration
from equipoise.eval.rates import Rate
from equipoise.eval.statistics.rogan_gladen import CorrectedRate
from equipoise.eval.statistics.win_rate import LengthControlled, WinRate
from equipoise.eval.suites.win_rate import PairSample, Pairwise

SCHEMA_FILE = Path(__file__).with_name("report.schema.json")

_DOCUMENTED = (
    CategoryReport,
    SampleResult,
    Rate,
    CorrectedRate,
    JudgeCalibration,
    HeadCalibration,
    Pairwise,
    PairSample,
    WinRate,
    LengthControlled,
)


def report_schema() -> dict[str, Any]:
    """The schema of report.json (JSON Schema 2020-12), every field with its docstring."""
    schema = TypeAdapter(CategoryReport).json_schema(mode="serialization")
    definitions = schema["$defs"]
    definitions |= TypeAdapter(WinRate).json_schema(mode="serialization").pop("$defs")
    definitions["WinRate"] = _without_definitions(TypeAdapter(WinRate).json_schema(mode="serialization"))
    for record in _DOCUMENTED:
        target = schema if record is CategoryReport else definitions[record.__name__]
        for name, docstring in field_docstrings(record).items():
            target["properties"][name]["description"] = docstring
    properties = {
        "schema_version": {
            "const": SCHEMA_VERSION,
            "description": "Another version is refused when the file is read.",
        }
    }
    schema["properties"] = properties | schema["properties"] | {"summary": _summary()}
    schema["required"] = list(schema["properties"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "report.json",
        "description": "One model state, evaluated: all samples, and the figures that follow from them.",
    } | {key: value for key, value in schema.items() if key not in {"title", "description"}}


def field_docstrings(record: type) -> dict[str, str]:
    """The string below each field of a dataclass, on one line."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    assert isinstance(definition, ast.ClassDef)
    names = {field.name for field in dataclasses.fields(record)}
    found = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        match before, after:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(docstring))),
            ) if name in names:
                found[name] = " ".join(docstring.split())
    return found


def _without_definitions(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "$defs"}


def _summary() -> dict[str, Any]:
    rate = {"$ref": "#/$defs/Rate"}
    rates = {
        "type": "object",
        "properties": {"overall": rate, "categories": {"type": "object", "additionalProperties": rate}},
        "required": ["overall", "categories"],
    }
    named = {
        "unsafe_rate": rates | {"description": "Unsafe answers to harmful prompts."},
        "compliance_rate": rates | {"description": "Harmful prompts answered without refusing."},
        "over_refusal": rates | {"description": "Benign look-alikes refused."},
        "helpful_compliance": rate | {"description": "Ordinary prompts answered without refusing."},
        "win_rate": {"anyOf": [{"$ref": "#/$defs/WinRate"}, {"type": "null"}]},
    }
    return {
        "type": "object",
        "description": "The figures derived from the samples, for readers of the file; ignored when it is read.",
        "properties": named,
        # Reports written before there was helpful_compliance are as good.
        "required": [*(name for name in named if name != "helpful_compliance"), "gap", "helpfulness"],
    }


def schema_text() -> str:
    """The schema as the file holds it."""
    return json.dumps(report_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_aside(SCHEMA_FILE, schema_text())
    print(SCHEMA_FILE)
