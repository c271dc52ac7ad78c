"""Rows of different lengths as one batch of token ids: padded, or packed so that a prompt is read
once and little or nothing is padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

Ids = Sequence[int] | np.ndarray

# How examples become rows of a batch, see Batch.
Packing = Literal["flex", "mask", "varlen", "none"]
PACKINGS: tuple[Packing, ...] = ("flex", "mask", "varlen", "none")


class Example(NamedTuple):
    """A prompt and the responses to it that are read together, a pair's chosen one first."""

    prompt: Ids
    responses: Sequence[Ids]


@dataclass(frozen=True)
class Batch:
    """Examples as ``R`` rows of ``T`` token slots.

    ======== ================================================= ====================================
    packing  a row                                             its tokens attend
    ======== ================================================= ====================================
    none     one prompt and one response, then padding         by ``attention_mask``
    mask     one prompt and all its responses, then padding    by ``attends``, a dense 4-D mask
    varlen   the only one: prompt and response after another   where positions do not restart
    flex     the only one: whole examples after each other     by ``attends``, a block mask
    ======== ================================================= ====================================

    Responses are numbered by their place in the example first: of pairs, all chosen ones come
    before all rejected ones. What belongs to their tokens is a flat stream of ``N`` numbers with
    ``cu_seqlens``, the layout that every op of segkernels takes.
    """

    input_ids: Tensor  # int64 [R, T]
    position_ids: Tensor  # int64 [R, T], from 0 in each prompt, on from its end in each response
    example: Tensor  # int32 [R, T]: whose token; -1 on padding
    branch: Tensor  # int32 [R, T]: 0 in the prompt, 1 + the place of the response in its example
    tokens: Tensor  # int64 [N]: where the response tokens stand in the flattened rows
    before: Tensor  # int64 [N]: where the token stands that comes before each; -1: nowhere
    cu_seqlens: Tensor  # int32 [responses + 1]

    @property
    def attention_mask(self) -> Tensor:
        """int64 [R, T]: 1 on tokens, 0 on padding."""
        return (self.example >= 0).long()

    @property
    def mask(self) -> Tensor:
        """bool [N]: every token of the stream is a response's."""
        return torch.ones_like(self.tokens, dtype=torch.bool)

    def attends(self) -> Tensor:
        """bool [R, 1, T, T]: whether the token of the third dimension reads that of the last, an
        earlier one or itself, of the same prompt or the same response."""
        order = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        same = self.example[:, :, None] == self.example[:, None, :]
        branch = (self.branch[:, None, :] == 0) | (
            self.branch[:, :, None] == self.branch[:, None, :]
        )
        return (same & branch & (order[:, None] >= order))[:, None]

    def to(self, device: torch.device | str) -> Batch:
        """On that device; copies to a GPU are queued, not waited for."""
        return Batch(**{name: to_device(x, device) for name, x in vars(self).items()})


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device``; a copy to a GPU is queued, not waited for."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def make_batch(
    examples: Sequence[Example],
    packing: Packing = "none",
    *,
    pad_token_id: int = 0,
    pad_to_multiple_of: int = 1,
) -> Batch:
    """The examples in that packing, on the CPU; T is rounded up to ``pad_to_multiple_of``."""
    parts: list[list[tuple[int, int, Ids, int]]] = []  # of each row: example, branch, ids, position
    for index, (prompt, responses) in enumerate(examples):
        alone = [
            [(index, 0, prompt, 0), (index, place, response, len(prompt))]
            for place, response in enumerate(responses, 1)
        ]
        shared = [(index, 0, prompt, 0), *(part for _, part in alone)]
        rows = alone if packing in ("none", "varlen") else [shared]
        if packing in ("varlen", "flex") and parts:
            parts[0] += [part for row in rows for part in row]
        elif packing == "varlen":
            parts.append([part for row in rows for part in row])
        else:
            parts += rows
    longest = max(sum(len(ids) for _, _, ids, _ in row) for row in parts)
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    shape = len(parts), width
    input_ids = np.full(shape, pad_token_id, np.int64)
    position_ids = np.zeros(shape, np.int64)
    example, branch = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    # Of (place, example): where the response starts and stops, and the prompt's last token.
    found: dict[tuple[int, int], tuple[int, int, int]] = {}
    for row, of_row in enumerate(parts):
        column, last = 0, -1  # last token of the prompt
        for index, place, ids, position in of_row:
            stop = column + len(ids)
            input_ids[row, column:stop] = ids
            position_ids[row, column:stop] = np.arange(position, position + len(ids))
            example[row, column:stop] = index
            branch[row, column:stop] = place
            if place == 0:
                last = row * width + stop - 1 if len(ids) else -1
            else:
                found[place, index] = row * width + column, row * width + stop, last
            column = stop
    starts = [found[key] for key in sorted(found)]
    tokens = [np.arange(start, stop) for start, stop, _ in starts]
    before = [np.arange(start - 1, stop - 1) for start, stop, _ in starts]
    for of_response, (_, _, last) in zip(before, starts, strict=True):
        of_response[:1] = last
    lengths = [len(of_response) for of_response in tokens]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        example=torch.from_numpy(example),
        branch=torch.from_numpy(branch),
        tokens=torch.from_numpy(np.concatenate(tokens)),
        before=torch.from_numpy(np.concatenate(before)),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
    )


def responses_of(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """(Example, place in it) of each response of a batch, in its order."""
    places = [(k, index) for index, each in enumerate(examples) for k in range(len(each.responses))]
    return [(index, place) for place, index in sorted(places)]


@dataclass(frozen=True)
class Sizes:
    """Lengths of many examples: what a plan of batches needs to know of them."""

    prompts: np.ndarray  # int [examples]
    responses: np.ndarray  # int [examples, most responses of one]; 0 where an example has fewer

    @staticmethod
    def of(examples: Sequence[Example]) -> Sizes:
        most = max((len(example.responses) for example in examples), default=0)
        responses = np.zeros((len(examples), most), np.int64)
        for lengths, example in zip(responses, examples, strict=True):
            lengths[: len(example.responses)] = [len(ids) for ids in example.responses]
        return Sizes(np.array([len(example.prompt) for example in examples], np.int64), responses)

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, packing: Packing) -> np.ndarray:
        """int [examples]: rows that each needs."""
        if packing == "none":
            return (self.responses > 0).sum(1)
        return np.ones(len(self), np.int64)

    def widths(self, packing: Packing) -> np.ndarray:
        """int [examples]: tokens in the longest row of each."""
        if packing == "none":
            return self.prompts + self.responses.max(1)
        prompts = (self.responses > 0).sum(1) if packing == "varlen" else 1
        return prompts * self.prompts + self.responses.sum(1)

    def tokens(self, packing: Packing) -> np.ndarray:
        """int [examples]: slots that each fills when it is alone in a batch."""
        return self.rows(packing) * self.widths(packing)


def plan_batches(sizes: Sizes, packing: Packing, max_tokens: int) -> list[np.ndarray]:
    """The examples of each batch, int [count], longest first: examples of like length together, at
    most ``max_tokens`` slots with padding. One that is longer on its own is a batch of its own.
    """
    rows, widths = sizes.rows(packing), sizes.widths(packing)
    in_one_row = packing in ("varlen", "flex")
    order = np.argsort(-widths, kind="stable")
    batches: list[list[int]] = []
    used = 0
    for index in order.tolist():
        size = int(widths[index]) if in_one_row else int(rows[index])
        longest = 1 if in_one_row or not batches else int(widths[batches[-1][0]])
        if batches and (used + size) * longest <= max_tokens:
            batches[-1].append(index)
            used += size
        else:
            batches.append([index])
            used = size
    return [np.array(batch) for batch in batches]


def token_budget(max_tokens: int | None, sizes: Sizes, packing: Packing) -> int:
    """``max_tokens``, which must hold the largest example; by default ``DEFAULT_TOKENS``, or the
    largest example if that is longer."""
    largest = int(sizes.tokens(packing).max(initial=1))
    if max_tokens is None:
        return max(DEFAULT_TOKENS, largest)
    if max_tokens < largest:
        rows = int(sizes.rows(packing).max())
        padded = f" ({rows} padded rows)" if rows > 1 else ""
        raise UserError(
            f"max_tokens_per_batch: expected at least {largest}, the tokens of the largest example"
            f"{padded}, got {max_tokens}; raise it, or lower --max_length"
        )
    return max_tokens


DEFAULT_TOKENS = 4096


@dataclass(frozen=True)
class PairBatch:
    """``B`` preference pairs as one batch, all chosen responses before all rejected ones."""

    batch: Batch
    rows: Tensor  # int64 [B]: the numbers of the pairs in their dataset
    terminated: Tensor  # bool [2B]: whether the response ends with EOS
    margin: Tensor | None  # fp32 [B]
    entropy: Tensor | None  # fp32 [N], nats, of the distribution which produced each token

    def to(self, device: torch.device | str) -> PairBatch:
        """On that device, as ``Batch.to``."""
        moved: dict[str, Any] = {
            name: to_device(x, device) if isinstance(x, Tensor) else x and x.to(device)
            for name, x in vars(self).items()
        }
        return PairBatch(**moved)


SIDES = ("chosen", "rejected")


def pair_example(row: Mapping[str, Any]) -> Example:
    """A row of ``tokenize_pairs``."""
    return Example(row["prompt_ids"], [row[f"{side}_ids"] for side in SIDES])


def make_pair_batch(rows: Sequence[Mapping[str, Any]], batch: Batch) -> PairBatch:
    """``batch`` is made of these rows of ``entropy_cache.Pairs``; a margin and entropies are taken
    where they carry them."""
    of = [(row, side) for side in SIDES for row in rows]
    entropy, margin = None, None
    if "chosen_entropy" in rows[0]:
        numbers = np.concatenate([row[f"{side}_entropy"] for row, side in of])
        entropy = torch.from_numpy(numbers).float()
    if "margin" in rows[0]:
        margin = torch.from_numpy(np.array([row["margin"] for row in rows], np.float32))
    return PairBatch(
        batch=batch,
        rows=torch.from_numpy(np.array([row["row"] for row in rows], np.int64)),
        terminated=torch.from_numpy(
            np.array([row[f"{side}_terminated"] for row, side in of], bool)
        ),
        margin=margin,
        entropy=entropy,
    )


def pad_responses(
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    device: torch.device | str = "cpu",
    *,
    pad_token_id: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each response behind its prompt, padding last.

    Returns (input_ids int64, attention_mask int64, action_mask bool) ``[rows, longest]``; the
    action mask marks the response.
    """
    examples = [Example(p, [r]) for p, r in zip(prompts, responses, strict=True)]
    batch = make_batch(examples, pad_token_id=pad_token_id)
    out = batch.input_ids, batch.attention_mask, batch.branch > 0
    return tuple(x.to(device) for x in out)  # type: ignore[return-value]


def pad_left(
    rows: Sequence[Sequence[int]], device: torch.device | str, *, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) int64 ``[rows, longest]``, padding first: for generation."""
    lengths = torch.tensor([len(ids) for ids in rows])[:, None]
    width = int(lengths.max())
    attention = torch.arange(width) >= width - lengths
    input_ids = torch.full(attention.shape, pad_token_id)
    input_ids[attention] = torch.tensor([i for ids in rows for i in ids], dtype=torch.int64)
    return input_ids.to(device), attention.long().to(device)
