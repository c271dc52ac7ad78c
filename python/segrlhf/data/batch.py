"""Rows of different lengths as one padded batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        longest = max(len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row, side in sides)
        width = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(sides), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        action_mask = torch.zeros(shape, dtype=torch.bool)
        has_entropy = "chosen_entropy" in rows[0]
        entropy = torch.zeros(shape) if has_entropy else None
        for n, (row, side) in enumerate(sides):
            start = len(row["prompt_ids"])
            end = start + len(row[f"{side}_ids"])
            input_ids[n, :start] = torch.as_tensor(row["prompt_ids"])
            input_ids[n, start:end] = torch.as_tensor(row[f"{side}_ids"])
            attention_mask[n, :end] = 1
            action_mask[n, start:end] = True
            if entropy is not None:
                entropy[n, start:end] = torch.tensor(row[f"{side}_entropy"])
        batch: dict[str, Tensor | None] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "action_mask": action_mask,
            "terminated": torch.tensor([bool(row[f"{side}_terminated"]) for row, side in sides]),
            "margin": torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
            if "margin" in rows[0]
            else None,
        }
        if entropy is not None:
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
    prompts: Sequence[list[int]], responses: Sequence[list[int]], device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, action_mask) [rows, longest], padded on the right."""
    ids = [torch.tensor([*p, *r]) for p, r in zip(prompts, responses, strict=True)]
    action = [
        torch.arange(len(p) + len(r)) >= len(p) for p, r in zip(prompts, responses, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    attention = pad([torch.ones_like(x) for x in ids], batch_first=True)
    input_ids, action_mask = pad(ids, batch_first=True), pad(action, batch_first=True)
    return input_ids.to(device), attention.to(device), action_mask.to(device)
