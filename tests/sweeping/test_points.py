from pathlib import Path
from typing import Any

import pytest

from equipoise.train.locks import FolderInUseError


def test_a_grid_in_hydras_grammar(sweeping: Any, tmp_path: Path) -> None:
    sweep = sweeping("points").plan(["recipe=tsdi", "beta=0.05,0.1", "lam=choice(1,4)", "seed=range(1,3)"])
    assert [str(point) for point in sweep.points] == [
        f"beta-{beta}_lam-{lam}/seed{seed}" for beta in (0.05, 0.1) for lam in (1, 4) for seed in (1, 2)
    ]
    point = sweep.points[-1]
    assert (point.recipe.beta, point.recipe.lam, point.recipe.seed) == (0.1, 4.0, 2)
    assert point.folder == tmp_path / "outputs" / "tsdi" / "points" / "beta-0.1_lam-4" / "seed2"
    assert sweep.folder == tmp_path / "outputs" / "tsdi"
    assert (sweep.swept, sweep.seeds, sweep.fixed) == (("beta", "lam"), (1, 2), ("recipe=tsdi",))


def test_the_arguments_of_a_point_make_its_folder(sweeping: Any, tmp_path: Path) -> None:
    """train.py, given them, writes where the sweep looks."""
    from equipoise.train.cli import compose

    where = tmp_path / "a folder, with = and '"
    sweep = sweeping("points").plan(
        ["recipe=tsdi", "lam=1,4", "name=mine", f'output_dir="{where}"', "seed=3"]
    )
    cfg = compose(sweep.points[1].arguments)
    assert cfg is not None
    assert Path(cfg.output_dir) / cfg.name / f"seed{cfg.seed}" == sweep.points[1].folder
    assert sweep.folder == where / "mine"


@pytest.mark.parametrize(("given", "expected"), [([], "tsdi"), (["+tracking.group=mine"], "mine")])
def test_dashboards_show_the_points_together(sweeping: Any, given: list[str], expected: str) -> None:
    from equipoise.train.cli import compose
    from equipoise.train.recipe.loading import load_recipe

    sweep = sweeping("points").plan(["recipe=tsdi", "lam=1,4", "tracking=wandb", *given])
    for point in sweep.points:
        cfg = compose(point.arguments)
        assert cfg is not None
        assert load_recipe(cfg).tracking.group == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=tsdi", "beta=interval(0,1)"], "search it with --optuna"),
        (["recipe=tsdi", "beta=0.1,-1"], r"beta=-1: The recipe has 1 problem"),
        (["recipe=tsdi", "beta=a("], "Hydra cannot read"),
        (["recipe=tsdi", "hydra.launcher=joblib"], "see --launcher"),
        (["recipe=tsdi", "name=a,b"], "name: belongs to the whole sweep"),
        (["recipe=tsdi", "evaluation.baseline=false"], "held against the starting model"),
        (["recipe=sft", "stages.sft.evaluate=false"], "no stage of this recipe is judged"),
    ],
)
def test_what_cannot_be_swept(sweeping: Any, overrides: list[str], message: str, tmp_path: Path) -> None:
    points = sweeping("points")
    with pytest.raises(points.SweepError, match=message):
        points.plan(overrides)
    assert list(tmp_path.iterdir()) == []


def test_names_of_settings_are_folders_and_never_shared(sweeping: Any) -> None:
    name = sweeping("points").setting_name
    assert name({"stages.safe.learning_rate": "1e-4", "+loss.mix.ipo": "0.5"}) == (
        "stages.safe.learning_rate-1e-4_loss.mix.ipo-0.5"
    )
    names = {name({"key": value}) for value in ("[a,b]", "[a b]", "a" * 200, "a" * 201, "-a-b-", "../x")}
    assert len(names) == 6
    assert all("/" not in each and len(each) <= 120 for each in names)


def test_more_values_are_welcome_and_another_recipe_is_not(sweeping: Any) -> None:
    points = sweeping("points")
    for overrides in (["lam=1,4", "seed=1"], ["lam=1,4,10", "seed=1,2"]):
        with points.plan(["recipe=tsdi", *overrides]).claimed():
            pass
    with (
        pytest.raises(points.SweepError, match=r"holds another sweep: fixed was .*name=\.\.\."),
        points.plan(["recipe=tsdi", "lam=1,4", "beta=0.5"]).claimed(),
    ):
        pass


def test_one_sweep_at_a_time_runs_points_in_a_folder(sweeping: Any, folder_in_use: Any) -> None:
    sweep = sweeping("points").plan(["recipe=tsdi", "lam=1,4", "seed=1"])
    with (
        folder_in_use(sweep.folder),
        pytest.raises(FolderInUseError, match=r"in use by process 17 on there.*--report-only"),
        sweep.claimed(),
    ):
        pass
    with sweep.claimed():
        pass
    with folder_in_use(sweep.folder), sweep.claimed(to_run=False):
        assert (sweep.folder / "sweep.json").exists()


def test_a_report_of_no_sweep_makes_none(sweeping: Any) -> None:
    sweep = sweeping("points").plan(["recipe=tsdi", "lam=1,4", "name=mistyped"])
    with (
        pytest.raises(sweeping("points").SweepError, match="mistyped holds no sweep"),
        sweep.claimed(to_run=False),
    ):
        pass
    assert not sweep.folder.exists()
