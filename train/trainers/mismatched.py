"""KTO's rows: every answer with another prompt's answer beside it, from which the reference point is estimated."""

from collections.abc import Sequence

from datasets import Dataset

from equipoise.train.answers import EncodedAnswers


def with_mismatched(
    rows: Dataset, encoded: EncodedAnswers, num_examples: int, max_length: int
) -> tuple[Dataset, list[str]]:
    """Draws of single answers as rows that `PairCollator` takes, and the examples' ids behind `pair`.

    chosen_ids is the answer itself, rejected_ids that of another draw of the same `num_examples` (a forward pass of
    all ranks), cut off at max_length together with the prompt. As in TRL the answers of a forward pass are passed on
    by one place, so that the answers beside the prompts are the same ones as those that are trained on; by more where
    that leaves fewer prompts with an answer of their own. `pair` numbers what is unique in prompt, answer and other
    answer: what the reference's log-probabilities are computed of.
    """
    prompts, answers, examples = (list(rows[name]) for name in ("prompt_ids", "answer_ids", "example"))
    others: list[int] = []
    for start in range(0, len(rows), num_examples):
        block = list(range(start, min(start + num_examples, len(rows))))
        others += passed_on(block, prompts)
    number: dict[tuple[int, int], int] = {}
    pair = [number.setdefault((examples[i], examples[k]), len(number)) for i, k in enumerate(others)]
    mismatched = [answers[k][: max_length - len(prompts[i])] for i, k in enumerate(others)]
    rows = rows.rename_column("answer_ids", "chosen_ids").add_column("rejected_ids", mismatched)
    return rows.add_column("pair", pair), [encoded.ids[example] for example, _ in number]


def passed_on(block: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
    """Whose answer each row of the block gets: a rotation, by the fewest places of those with least equal prompts."""
    if len(block) == 1:
        return list(block)

    def num_equal(places: int) -> int:
        return sum(prompts[i] == prompts[block[n - places]] for n, i in enumerate(block))

    # Almost always one place will do.
    places = 1 if not num_equal(1) else min(range(1, len(block)), key=num_equal)
    return [block[n - places] for n in range(len(block))]
