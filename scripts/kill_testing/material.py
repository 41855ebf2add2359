"""What the runs are made of: a tiny random model and a tiny random judge, written by the script itself."""

from pathlib import Path

from tiny_llama import make_model, make_tokenizer

from equipoise.eval.scorer import Scorer
from equipoise.eval.scorer_card import ScorerCard
from equipoise.train.model import save_policy
from equipoise.train.scorer import save_scorer

NUM_POSITIONS = 1024


def write_model(folder: Path) -> None:
    """A random Llama of 30,000 parameters whose tokens are bytes."""
    save_policy(make_model(seed=0, num_positions=NUM_POSITIONS), make_tokenizer(), folder)


def write_judge(folder: Path) -> None:
    """A random cost model, for `judge=beaver`."""
    backbone = make_model(seed=1, num_positions=NUM_POSITIONS).model
    save_scorer(Scorer(backbone), make_tokenizer(), folder, ScorerCard("cost"))
