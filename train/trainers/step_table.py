"""The examples of one optimizer step, exactly: all ranks, each draw once, in the order of one process.

Averages of batch means are not averages, and accelerate repeats draws to fill the last batch: metrics a category are
taken from this table instead.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor


class StepTable:
    """Collects values of every example, microbatch by microbatch, until the step is logged."""

    def __init__(self, columns: Sequence[str]) -> None:
        """columns: the names of what is kept; the first is `slot`, the example's place in the order of draws."""
        assert columns[0] == "slot"
        self.columns = tuple(columns)
        self._rows: list[Tensor] = []
        self.last: dict[str, Tensor] = {}
        """What was gathered last."""

    def __len__(self) -> int:
        """Microbatches kept."""
        return len(self._rows)

    def keep(self, *values: Tensor) -> None:
        """One (B,) tensor a column, in the columns' order; detached, kept in fp64."""
        assert len(values) == len(self.columns)
        self._rows.append(torch.stack([value.detach().double() for value in values], dim=1))

    def gather(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """Every example of the step by column, (n,) fp64 on CPU, the same on all ranks; empties the table.

        A rank may have kept fewer examples than another, but not none. Collective: every rank has to call it.
        """
        local = torch.cat(self._rows)
        self._rows.clear()
        if accelerator.num_processes > 1:
            local = accelerator.pad_across_processes(local, dim=0, pad_index=-1)
            local = accelerator.gather(local)
        local = local.cpu()
        # Padded rows carry slot -1; draws that accelerate repeated to fill the last batch carry a slot seen before.
        slots, first = set(), []
        for i, slot in enumerate(local[:, 0].tolist()):
            if slot >= 0 and slot not in slots:
                slots.add(slot)
                first.append(i)
        first.sort(key=lambda i: local[i, 0].item())  # the order of one process, whatever the ranks
        self.last = dict(zip(self.columns, local[first].unbind(1), strict=True))
        return self.last


def mean_by_category(
    name: str, values: Tensor, category: Tensor, category_names: Sequence[str]
) -> dict[str, float]:
    """`<name>/<category>` -> mean of `values` (n,) over the step's examples of that category; absent ones are left out.

    category (n,): index into `category_names`.
    """
    means = {}
    for i, category_name in enumerate(category_names):
        of = category == i
        if bool(of.any()):
            means[f"{name}/{category_name}"] = float(values[of].mean())
    return means
