import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from equipoise.eval.report.tables import Table
from equipoise.train.recipe import TrackingConfig
from equipoise.train.tracking.dashboard import EVALUATIONS, Run
from equipoise.train.tracking.weights_and_biases import WeightsAndBiases


class FakeArtifact:
    def __init__(self, name: str, type: str, metadata: dict[str, Any] | None = None) -> None:
        self.name, self.type, self.metadata = name, type, metadata
        self.added: list[tuple[str, str]] = []

    def add_reference(self, uri: str) -> None:
        self.added.append(("reference", uri))

    def add_dir(self, path: str) -> None:
        self.added.append(("directory", path))

    def add_file(self, path: str) -> None:
        self.added.append(("file", Path(path).name))


class FakeRun:
    url, dir = "https://wandb.example/run", "wandb/run-1/files"

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.artifacts: list[tuple[FakeArtifact, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.preempting = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def log_artifact(self, artifact: FakeArtifact, aliases: Any) -> None:
        self.artifacts.append((artifact, aliases))

    def mark_preempting(self) -> None:
        self.preempting = True

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the module wandb: `run` is what `init` returns, `started` what it was given."""
    module = SimpleNamespace(run=FakeRun(), started=[], torn_down=0, fails=False)

    def init(**arguments: Any) -> FakeRun:
        module.started.append(arguments)
        if module.fails and arguments["mode"] == "online":
            raise TimeoutError("no network for key-0123456789")
        return module.run

    def teardown() -> None:
        module.torn_down += 1

    module.Settings = lambda **settings: settings
    module.Table = lambda columns, data: (columns, data)
    module.Html = lambda page, inject: (page, inject)
    module.Artifact = FakeArtifact
    module.init, module.teardown = init, teardown
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def run(tmp_path: Path, **config: Any) -> Run:
    return Run(
        tmp_path / "tsdi" / "seed0", "id1", TrackingConfig(trackers=["wandb"], **config), {"beta": 0.1}
    )


def test_a_run_has_name_id_group_and_recipe(tmp_path: Path, fake: SimpleNamespace) -> None:
    WeightsAndBiases(run(tmp_path, project="p", group="g", tags=["a"], init_timeout=7, finish_timeout=8))
    (start,) = fake.started
    assert (start["name"], start["id"], start["resume"]) == ("tsdi/seed0", "id1", "allow")
    assert (start["project"], start["group"], start["tags"]) == ("p", "g", ["a"])
    assert (start["mode"], start["config"]) == ("offline", {"beta": 0.1})
    assert (start["settings"]["init_timeout"], start["settings"]["finish_timeout"]) == (7, 8)


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "0123456789"}, "online"),
        ("auto", {"WANDB_API_KEY": "0123456789", "WANDB_MODE": "offline"}, "offline"),
        ("offline", {"WANDB_API_KEY": "0123456789"}, "offline"),
        ("online", {}, "online"),
    ],
)
def test_it_is_online_where_there_is_a_key(
    mode: str,
    environment: dict[str, str],
    expected: str,
    tmp_path: Path,
    fake: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    WeightsAndBiases(run(tmp_path, mode=mode))
    assert [start["mode"] for start in fake.started] == [expected]


def test_a_key_that_wandb_login_has_stored_counts(
    tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    (tmp_path / "netrc").chmod(0o600)
    WeightsAndBiases(run(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    WeightsAndBiases(run(tmp_path))
    assert [start["mode"] for start in fake.started] == ["online", "offline"]


def test_without_a_server_the_run_is_recorded_offline(
    tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key-0123456789")
    fake.fails = True
    with pytest.warns(UserWarning, match="`wandb sync") as caught:
        WeightsAndBiases(run(tmp_path))
    assert "key-0123456789" not in str(caught[0].message)
    assert [(start["mode"], start["id"]) for start in fake.started] == [("online", "id1"), ("offline", "id1")]
    assert fake.torn_down == 1  # or the id is still in use


def test_every_group_has_the_axis_of_its_stage(tmp_path: Path, fake: SimpleNamespace) -> None:
    dashboard = WeightsAndBiases(run(tmp_path))
    dashboard.log({"safe_train/loss": 1.0}, 1, "safe")
    dashboard.log({"safe_train/loss": 0.5, "safe_train_loss/S1": 2.0}, 2, "safe")
    dashboard.log({"eval/unsafe_rate": 0.1}, 4, EVALUATIONS)
    assert fake.run.metrics == [
        ("safe_train/*", "safe/step"),
        ("safe_train_loss/*", "safe/step"),
        ("eval/*", "eval/number"),
    ]
    assert fake.run.logged[1] == {"safe/step": 2, "safe_train/loss": 0.5, "safe_train_loss/S1": 2.0}
    assert fake.run.logged[2] == {"eval/number": 4, "eval/unsafe_rate": 0.1}


def test_an_evaluation_is_a_table_and_a_page(tmp_path: Path, fake: SimpleNamespace) -> None:
    table = Table(("category", "rate"), (("S1", 0.2), ("S2", None)))
    WeightsAndBiases(run(tmp_path)).log_evaluation(table, "<p>", 3)
    assert fake.run.logged == [
        {
            "eval/number": 3,
            "eval_categories/table": (["category", "rate"], [["S1", 0.2], ["S2", None]]),
            "eval_categories/plots": ("<p>", False),
        }
    ]


@pytest.mark.parametrize("log_model", ["reference", "upload", "none"])
def test_a_promoted_model_is_an_artifact(log_model: str, tmp_path: Path, fake: SimpleNamespace) -> None:
    folder = tmp_path / "a folder"
    WeightsAndBiases(run(tmp_path, log_model=log_model)).log_promoted(
        folder, ("promoted", "tsdi"), {"verdict": "PASS"}
    )
    if log_model == "none":
        assert fake.run.artifacts == []
        return
    ((artifact, aliases),) = fake.run.artifacts
    assert (artifact.name, artifact.type, aliases) == ("model-id1", "model", ["promoted", "tsdi"])
    assert artifact.metadata == {"verdict": "PASS", "folder": str(folder)}
    expected = ("reference", folder.as_uri()) if log_model == "reference" else ("directory", str(folder))
    assert artifact.added == [expected]


def test_the_end_keeps_verdicts_and_recipe(tmp_path: Path, fake: SimpleNamespace) -> None:
    folder = tmp_path / "tsdi" / "seed0"
    folder.mkdir(parents=True)
    for name in ("summary.json", "recipe.yaml", "report.html"):
        (folder / name).write_text("")
    WeightsAndBiases(run(tmp_path)).finish(3, {"verdict": "FAIL"})
    ((artifact, aliases),) = fake.run.artifacts
    assert (artifact.type, aliases) == ("evaluation", ["fail"])
    assert artifact.added == [
        ("file", "recipe.yaml"),
        ("file", "summary.json"),
    ]  # the report has prompts and answers
    assert (fake.run.summary, fake.run.exit_code) == ({"verdict": "FAIL"}, 3)


@pytest.mark.parametrize("exit_code", [0, 1, 75])
def test_a_preempted_run_is_no_failed_one(exit_code: int, tmp_path: Path, fake: SimpleNamespace) -> None:
    WeightsAndBiases(run(tmp_path)).finish(exit_code, {})
    assert fake.run.preempting == (exit_code == 75)


def test_a_run_that_crashed_keeps_no_verdict(tmp_path: Path, fake: SimpleNamespace) -> None:
    (tmp_path / "tsdi" / "seed0").mkdir(parents=True)
    (tmp_path / "tsdi" / "seed0" / "recipe.yaml").write_text("")
    WeightsAndBiases(run(tmp_path)).finish(1, {})
    assert (fake.run.artifacts, fake.run.exit_code) == ([], 1)


def test_a_server_that_does_not_take_everything_in_time(tmp_path: Path, fake: SimpleNamespace) -> None:
    def finish(exit_code: int) -> None:
        raise TimeoutError("Timed out finishing run.")

    fake.run.finish = finish
    with pytest.raises(
        TimeoutError, match="9 s were not enough to send all; `wandb sync wandb/run-1` sends the rest"
    ):
        WeightsAndBiases(run(tmp_path, finish_timeout=9)).finish(0, {})
