from pathlib import Path

import pytest
import yaml

from equipoise.data.errors import DataError
from equipoise.eval.gate import GateRules, GateRulesError, read_rules


def test_rules_from_a_mapping_keep_their_other_defaults() -> None:
    assert read_rules({"category_limit": 0.1, "gap_limit": 0.2}) == GateRules(
        category_limit=0.1, gap_limit=0.2
    )
    assert read_rules({}) == GateRules()


def test_rules_from_a_file_bare_or_as_a_recipes_group(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("category_limits: {S4: 0.1}\nuse_corrected_rates: true\n")
    assert read_rules(path) == GateRules(category_limits={"S4": 0.1}, use_corrected_rates=True)
    path.write_text("every: 0\nrules:\n  alpha: 0.1\n")
    assert read_rules(str(path)) == GateRules(alpha=0.1)


def test_the_shipped_group_spells_out_every_default() -> None:
    shipped = Path(__file__).parents[2] / "recipes" / "gate" / "default.yaml"
    assert read_rules(shipped) == GateRules()
    assert set(yaml.safe_load(shipped.read_text())["rules"]) == set(vars(GateRules()))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"category_limt": 0.1}, "category_limt: unknown key; did you mean 'category_limit'?"),
        ({"frobnicate": 1}, "known are category_limit, category_limits, overall_limit"),
        ({"alpha": "5%"}, "alpha: found '5%', expected a number"),
        ({"alpha": True}, "alpha: found True, expected a number"),
        ({"min_samples": 2.5}, "min_samples: found 2.5, expected a whole number"),
        ({"use_corrected_rates": 1}, "use_corrected_rates: found 1, expected true or false"),
        ({"category_limits": [0.1]}, "expected category ids, each with a number"),
        ({"gap_limit": "none"}, "gap_limit: found 'none', expected a number or null"),
        ({"interval": "wald"}, "interval must be wilson | clopper_pearson | jeffreys, found 'wald'"),
        ({"overall_limit": None}, "overall_limit: found None, expected a number"),
    ],
)
def test_wrong_rules_are_named_with_what_is_expected(rules: dict[str, object], message: str) -> None:
    with pytest.raises(GateRulesError) as raised:
        read_rules(rules)
    assert message in str(raised.value)


def test_everything_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("alpha: much\nmin_sample: 3\n")
    with pytest.raises(GateRulesError) as raised:
        read_rules(path)
    assert "rules.yaml has 2 problems" in str(raised.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_rules(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "wrong",
    [
        {"category_limit": 1.5},
        {"category_limits": {"S1": -0.1}},
        {"overall_limit": -1},
        {"gap_limit": 2},
        {"alpha": 0},
        {"over_refusal_margin": 2},
        {"helpfulness_margin": -0.1},
        {"win_rate_margin": 0.6},
        {"max_no_finding_rate": -0.1},
        {"min_samples": 0},
        {"interval": "exact"},
    ],
)
def test_impossible_rules_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GateRules(**wrong)  # type: ignore[arg-type]
