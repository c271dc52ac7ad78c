"""What is logged of reward training and of its evaluations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segkernels import segment_bradley_terry

from ..data.batch import PairBatch
from ..runtime.metrics import Metrics


def record(metrics: Metrics, result: Any, ends: Tensor, cu_seqlens: Tensor, pairs: int) -> None:
    """Adds a micro-batch of so many pairs; of 0, where its pairs only fill up a batch."""
    scores = result.scores.detach().double()
    segments, tokens = _segments(ends, cu_seqlens)
    if not pairs:  # pairs that only fill up a batch do not count
        scores, segments, tokens = scores[:0], segments[:0], tokens[:0]
    chosen, rejected = scores.view(2, -1)
    metrics.mean("accuracy", result.accuracy.detach() * pairs, pairs)
    metrics.mean("margin", (chosen - rejected).sum(), pairs)
    metrics.mean("mean_reward", scores.sum(), 2 * pairs)
    metrics.minimum("min_reward", scores.min() if pairs else scores.new_full((), torch.inf))
    metrics.maximum("max_reward", scores.max() if pairs else scores.new_full((), -torch.inf))
    n_segments = segments.sum()
    metrics.mean("segments/per_response", n_segments, 2 * pairs)
    metrics.mean("segments/tokens_per_segment", tokens.sum(), n_segments)


def evaluation_table(result: Any, ends: Tensor, pairs: PairBatch) -> Tensor:
    """fp64 [B, 6]: what ``evaluation_metrics`` reads of each pair."""
    chosen, rejected = result.scores.double().view(2, -1)
    lengths = pairs.batch.cu_seqlens.diff().view(2, -1)
    longer = (lengths[0] > lengths[1]) + 0.5 * (lengths[0] == lengths[1])
    segments, tokens = _segments(ends, pairs.batch.cu_seqlens)
    columns = (
        chosen,
        rejected,
        torch.zeros_like(chosen) if pairs.margin is None else pairs.margin,
        segments.view(2, -1).sum(0),
        tokens.view(2, -1).sum(0),
        longer,
    )
    return torch.stack([column.double() for column in columns], dim=1)


def evaluation_metrics(
    table: Tensor, label_smoothing: float, center_coef: float
) -> dict[str, float]:
    """Of all pairs of an evaluation, by their rows of ``evaluation_table``."""
    chosen, rejected, margin, segments, tokens, longer = table.unbind(1)
    scores = torch.cat([chosen, rejected])
    # One segment of one token per response: the loss of the whole set in one call.
    result = segment_bradley_terry(
        scores[:, None],
        torch.ones(len(scores), 1, dtype=torch.bool),
        margin=margin,
        label_smoothing=label_smoothing,
        center_coef=center_coef,
    )
    return {
        "loss": float(result.loss),
        "accuracy": float(result.accuracy),
        "longer_wins": float(longer.mean()),
        "margin": float((chosen - rejected).mean()),
        "mean_reward": float(scores.mean()),
        "min_reward": float(scores.min()),
        "max_reward": float(scores.max()),
        "segments/per_response": float(segments.mean() / 2),
        "segments/tokens_per_segment": float(tokens.sum() / segments.sum()),
    }


def _segments(ends: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [responses] each: segments, and the tokens that lie in one, of a flat stream; without
    waiting for the device."""
    rows = torch.arange(len(cu_seqlens) - 1, device=ends.device)
    rows = rows.repeat_interleave(cu_seqlens.diff(), output_size=len(ends))
    upto = ends.cumsum(0)
    at_stop = upto.index_select(0, (cu_seqlens[1:].long() - 1).clamp(min=0))
    inside = at_stop.index_select(0, rows) > upto - ends.long()  # an end is at it or follows
    none = upto.new_zeros(len(cu_seqlens) - 1)
    return none.index_add(0, rows, ends.long()), none.index_add(0, rows, inside.long())
