"""Rows of different lengths as one padded batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class PairCollator:
    """Rows of ``tokenize_pairs`` as one batch: all chosen, then all rejected, right padding.

    Returns ``input_ids`` and ``attention_mask`` int64 [2B, T], ``action_mask`` bool [2B, T] (the
    response tokens), ``terminated`` bool [2B], ``margin`` fp32 [B] or None, and, where the rows
    carry ``chosen_entropy`` and ``rejected_entropy`` (nats, one per response token, of the
    distribution which produced it), ``entropy`` fp32 [2B, T], 0 elsewhere. T is the longest row,
    rounded up to ``pad_to_multiple_of``.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor | None]:
        sides = [(row, side) for side in ("chosen", "rejected") for row in rows]
        input_ids, attention_mask, action_mask = pad_responses(
            [row["prompt_ids"] for row, _ in sides],
            [row[f"{side}_ids"] for row, side in sides],
            pad_token_id=self.pad_token_id,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        batch: dict[str, Tensor | None] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "action_mask": action_mask,
            "terminated": torch.tensor([bool(row[f"{side}_terminated"]) for row, side in sides]),
            "margin": torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
            if "margin" in rows[0]
            else None,
        }
        if "chosen_entropy" in rows[0]:
            entropy = torch.zeros(action_mask.shape)
            of_actions = np.concatenate([row[f"{side}_entropy"] for row, side in sides])
            entropy[action_mask] = torch.from_numpy(of_actions).float()
            batch["entropy"] = entropy
        return batch


def first_pairs(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """The first ``count`` pairs of a batch of chosen rows, then rejected rows."""
    pairs = len(batch["input_ids"]) // 2
    out = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            out[name] = value
        elif len(value) == pairs:
            out[name] = value[:count]
        else:
            out[name] = torch.cat([value[:count], value[pairs : pairs + count]])
    return out


def pad_responses(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    *,
    pad_token_id: int = 0,
    pad_to_multiple_of: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each response behind its prompt, padding last.

    Returns (input_ids int64, attention_mask int64, action_mask bool) ``[rows, longest]``, the width
    rounded up to ``pad_to_multiple_of``; the action mask marks the response.
    """
    pairs = list(zip(prompts, responses, strict=True))
    starts = torch.tensor([len(prompt) for prompt, _ in pairs])[:, None]
    stops = torch.tensor([len(prompt) + len(response) for prompt, response in pairs])[:, None]
    width = math.ceil(int(stops.max()) / pad_to_multiple_of) * pad_to_multiple_of
    position = torch.arange(width)
    attention = position < stops
    input_ids = torch.full(attention.shape, pad_token_id)
    input_ids[attention] = torch.tensor(
        [i for pair in pairs for ids in pair for i in ids], dtype=torch.int64
    )
    action = attention & (position >= starts)
    return input_ids.to(device), attention.long().to(device), action.to(device)


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
