from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from equipoise.train.trainers.step_table import StepTable


def gathered(of_this_rank: list[list[float]], of_another: list[list[float]]) -> dict[str, Tensor]:
    """What the first of two ranks gathers; a row is slot, category, loss."""
    columns = ("slot", "category", "loss")
    num = max(len(of_this_rank), len(of_another))

    def padded(rows: Tensor) -> Tensor:
        return torch.cat([rows, torch.full((num - len(rows), len(columns)), -1.0, dtype=torch.float64)])

    table = StepTable(columns)
    for row in of_this_rank:  # several microbatches
        table.keep(*(torch.tensor([value]) for value in row))
    another = padded(torch.tensor(of_another, dtype=torch.float64))
    accelerator: Any = SimpleNamespace(
        num_processes=2,
        pad_across_processes=lambda rows, dim, pad_index: padded(rows),
        gather=lambda rows: torch.cat([rows, another]),
    )
    found = table.gather(accelerator)
    assert len(table) == 0
    return found


def test_gathered_pairs_stand_in_the_order_of_one_process() -> None:
    found = gathered([[0, 2, 0.5], [1, 0, 0.25], [4, 1, 0.125]], [[2, 0, 1.0], [3, 1, 2.0], [5, 2, 4.0]])
    assert found["slot"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["category"].tolist() == [2, 0, 0, 1, 1, 2]
    assert found["loss"].tolist() == [0.5, 0.25, 1.0, 2.0, 0.125, 4.0]


def test_draws_that_fill_up_the_last_batch_are_counted_once() -> None:
    # Seven draws on two ranks of four: accelerate repeats the first one for the second rank.
    found = gathered(
        [[8, 0, 1.0], [9, 0, 2.0], [10, 0, 3.0], [11, 0, 4.0]],
        [[12, 0, 5.0], [13, 0, 6.0], [14, 0, 7.0], [8, 0, 1.0]],
    )
    assert found["slot"].tolist() == [8, 9, 10, 11, 12, 13, 14]
    assert float(found["loss"].sum()) == 28


def test_ranks_with_fewer_pairs_add_nothing_but_their_own() -> None:
    found = gathered([[0, 0, 1.0], [1, 0, 2.0]], [[2, 0, 4.0]])
    assert found["slot"].tolist() == [0, 1, 2]
    assert found["loss"].tolist() == [1.0, 2.0, 4.0]
