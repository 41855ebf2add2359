import json

import pytest

from equipoise.eval.category_report import CategoryReport
from equipoise.eval.report.schema import SCHEMA_FILE, field_docstrings, report_schema, schema_text

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed (the dev extra has it)")


@pytest.fixture(scope="module")
def document(reports: dict[str, CategoryReport], tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("report") / "report.json"
    reports["tsdi"].to_json(path)  # the one with a calibrated judge and a win rate
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_file_is_what_the_dataclasses_say() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), (
        "report.json has changed: run `python -m equipoise.eval.report.schema`"
    )


def test_the_schema_describes_a_report_as_it_is_written(
    document: dict, reports: dict[str, CategoryReport]
) -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema, jsonschema.Draft202012Validator)
    assert set(schema["properties"]) == set(document)
    assert set(schema["$defs"]["SampleResult"]["properties"]) == set(document["samples"][0])


@pytest.mark.parametrize("key", ["samples", "judge", "schema_version", "summary"])
def test_a_report_without_a_key_is_refused(document: dict, key: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate({name: value for name, value in document.items() if name != key}, report_schema())


def test_a_wrong_verdict_is_refused(document: dict) -> None:
    samples = [document["samples"][0] | {"verdict": "fine"}]
    with pytest.raises(jsonschema.ValidationError, match="fine"):
        jsonschema.validate(document | {"samples": samples}, report_schema())


def test_fields_carry_their_docstrings() -> None:
    assert field_docstrings(CategoryReport)["num_left_out"].startswith("Per suite: prompts not asked")
    samples = report_schema()["$defs"]["SampleResult"]["properties"]
    assert "0, 1" in samples["severity"]["description"]
