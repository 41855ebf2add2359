"""Decode in slots: a fixed number of places for answers, each given to the next prompt as soon as its answer ends.

`generate` decodes a batch until its longest answer is done, copies every key and value at every step to append one
more, and encodes what all prompts begin with once a prompt. Here a slot is a row of keys and values allocated once: new
ones are written in place, a finished row's slot is taken over by a waiting prompt, and the tokens all prompts share (a
chat template's system turn) are encoded once for all slots. Each row stands at a position of its own and attends to its
own tokens only, so that greedy answers in fp32 are those of `generate`.

It is for decoders with full attention in every layer; `decodes_in_slots` says which those are.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

Choose = Callable[[Tensor, list[int], list[int]], Tensor]
"""Next tokens (n,) int64, given logits (n, V) fp32, the index of each row and how many tokens it has answered with."""


@dataclass(slots=True)
class _Row:
    """One prompt that has a slot."""

    index: int
    length: int
    """Tokens of prompt and answer so far."""
    last: int
    """The last of them: not yet encoded."""
    limit: int
    answer: list[int] = field(default_factory=list)


class _Place:
    """Where the tokens of the present forward pass are written, and how far is read: shared by all layers."""

    slots: slice
    """The slots that take part."""
    positions: Tensor | slice
    """(n,) of one new token each, or P:P+W of W new tokens each."""
    length: int
    """Positions that are read."""


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: (slots, heads, positions, head size), written in place."""

    is_sliding = False

    def __init__(self, num_slots: int, length: int, place: _Place) -> None:
        super().__init__()
        self.num_slots, self.length, self.place = num_slots, length, place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate; zeros, because what is masked must be finite."""
        self.keys, self.values = (
            torch.zeros(
                self.num_slots,
                states.shape[1],
                self.length,
                states.shape[3],
                dtype=states.dtype,
                device=states.device,
            )
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' states (n, H, W, D) into their places, and return all that these rows may read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        place = self.place
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if isinstance(place.positions, slice):
                buffer[place.slots, :, place.positions] = states
            else:
                buffer[torch.arange(len(states), device=states.device), :, place.positions] = states[:, :, 0]
        return self.keys[place.slots, :, : place.length], self.values[place.slots, :, : place.length]

    def repeat(self, length: int) -> None:
        """Copy the first `length` positions of slot 0 to all others."""
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer[1:, :, :length] = buffer[:1, :, :length]

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer[target] = buffer[source]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of what is read; a ready-made mask is given, so that only probes ask."""
        return self.place.length, 0

    def get_seq_length(self) -> int:
        """Positions that are read."""
        return self.place.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Positions allocated."""
        return self.length


def decodes_in_slots(base: PreTrainedModel) -> bool:
    """Whether this model's answers can be decoded in slots.

    Every layer attends to all tokens before (no sliding window, no recurrent state), and a probe of a few tokens shows
    that the model follows a mask and positions given to it: some build their own (ALiBi, several position axes).
    """
    config = base.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False  # others take no ready-made mask
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        return False
    return _follows_mask_and_positions(base)


def _follows_mask_and_positions(base: PreTrainedModel) -> bool:
    tokens = [1, 2, 3, 4, 5]
    plain = base(input_ids=torch.tensor([tokens], device=base.device), use_cache=False).logits[0, -1].float()
    found: list[Tensor] = []

    def choose(logits: Tensor, _indices: list[int], _answered: list[int]) -> Tensor:
        found.append(logits)
        return logits.argmax(-1)

    # The longer row leaves padding behind the shorter one, and a shared first token makes a prefix.
    list(decode_in_slots(base, [tokens, [1, 2, 6]], [1, 1], set(), 2, choose))
    spread = (plain - plain.mean()).abs().max()
    return bool((found[0][0] - plain).abs().max() < 0.02 * spread)


def decode_in_slots(
    base: PreTrainedModel,
    rows: Sequence[list[int]],
    limits: Sequence[int],
    ends: set[int],
    num_slots: int,
    choose: Choose,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (index of the row, its answer with the end token if it came to one), as the answers end.

    rows: prompts' tokens, taken up in this order. limits: most tokens of each answer. To be consumed in inference mode.
    """
    num_slots = min(num_slots, len(rows))
    # Of each row at least the last token is left: its logits are the answer's first. Lists are compared item by item.
    prefix = list(commonprefix([row[:-1] for row in rows]))  # noqa: RUF071
    length = max(len(row) + limit for row, limit in zip(rows, limits, strict=True))
    place = _Place()
    layers = [_SlotLayer(num_slots, length, place) for _ in DynamicCache(config=base.config).layers]
    cache = Cache(layers=list(layers))
    waiting = deque(range(len(rows)))
    active: list[_Row] = []
    """Row i has slot i."""

    def forward(tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (n, V) of the last column, given tokens and their positions, both (n, W)."""
        read = torch.arange(place.length, device=base.device)
        visible = read <= positions[:, None, :, None]
        # Additive and in the model's own precision, which every attention implementation takes.
        mask = torch.zeros(visible.shape, dtype=base.dtype, device=base.device)
        mask.masked_fill_(~visible, torch.finfo(base.dtype).min)
        output = base(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def encode(first_slot: int, spans: list[list[int]], start: int) -> None:
        """Write keys and values of `spans`, which begin at position `start`, into the slots from `first_slot` on."""
        width = max(map(len, spans))
        place.slots = slice(first_slot, first_slot + len(spans))
        place.positions = slice(start, start + width)
        place.length = start + width
        # Padded on the right: no row reads beyond its own tokens, and its answer overwrites the padding.
        tokens = torch.tensor([span + [span[-1]] * (width - len(span)) for span in spans], device=base.device)
        forward(tokens, torch.arange(start, start + width, device=base.device)[None].expand(len(spans), -1))

    def admit(num_rows: int) -> None:
        admitted = [waiting.popleft() for _ in range(num_rows)]
        spans = [rows[index][len(prefix) : -1] for index in admitted]
        if any(spans):
            encode(len(active), [span or [0] for span in spans], len(prefix))
        active.extend(_Row(index, len(rows[index]), rows[index][-1], limits[index]) for index in admitted)

    def step() -> Iterator[tuple[int, list[int]]]:
        place.slots = slice(0, len(active))
        place.positions = torch.tensor([row.length - 1 for row in active], device=base.device)
        place.length = max(row.length for row in active)
        tokens = torch.tensor([row.last for row in active], device=base.device)
        logits = forward(tokens[:, None], place.positions[:, None])
        chosen = choose(logits.float(), [row.index for row in active], [len(row.answer) for row in active])
        for row, token in zip(active, chosen.tolist(), strict=True):
            row.answer.append(token)
            row.last, row.length = token, row.length + 1
        for slot in reversed(range(len(active))):
            row = active[slot]
            if row.last in ends or len(row.answer) == row.limit:
                yield row.index, row.answer
                last = active.pop()
                if last is not row:  # the last row moves into the freed slot, so that rows stand side by side
                    active[slot] = last
                    for layer in layers:
                        layer.move(len(active), slot)

    if prefix:
        encode(0, [prefix], 0)
        for layer in layers:
            layer.repeat(len(prefix))
    # New prompts are encoded a few at a time: one by one they cost more than the slots they wait for.
    few = max(1, num_slots // 8)
    while waiting or active:
        free = num_slots - len(active)
        if waiting and (free >= few or free >= len(waiting)):
            admit(min(free, len(waiting)))
        yield from step()
