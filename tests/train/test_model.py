from typing import Any

import pytest

from equipoise.train import model
from equipoise.train.recipe import ModelConfig


@pytest.mark.parametrize("folder", [None, "somebody/model"])
def test_a_hub_model_is_loaded_at_its_revision_whoever_names_it(
    folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load_model(model_id: str, **options: Any) -> tuple[None, None]:
        asked.update(model_id=model_id, **options)
        return None, None

    monkeypatch.setattr(model, "load_model", load_model)
    model.load_policy(ModelConfig(id="somebody/model", revision="v1.0"), folder)
    assert (asked["model_id"], asked["revision"]) == ("somebody/model", "v1.0")
