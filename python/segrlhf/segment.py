"""Builds the entropy cache and shows what each threshold would cut: ``segrlhf segment``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from segkernels import segment_ends, segment_offsets

from .configs import THRESHOLD, DataConfig, ModelConfig, PairConfig, flag
from .data.batch import SIDES
from .data.tokenize import tokenize_splits
from .entropy_cache import EntropyCache, build_entropy_cache
from .models.loading import load_tokenizer
from .models.packing import PackingConfig
from .runtime.distributed import say

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class SegmentConfig(PackingConfig, PairConfig):
    """Arguments of ``segrlhf segment``."""

    thresholds: list[float] = flag(
        [0.5, 1.0, 1.5, 1.75, 2.0, 2.5, 3.0],
        "Entropy thresholds to compare, in nats.",
        limits=THRESHOLD,
    )
    entropy_cache_dir: str | None = flag(
        None,
        "Where entropies are kept; default ~/.cache/segrlhf/entropy.",
        writes="directory",
    )


@dataclass(frozen=True)
class ThresholdRow:
    """What one threshold cuts: arrays over responses and over segments."""

    threshold: float
    segments: np.ndarray  # [responses] segments of each
    tokens: np.ndarray  # [segments] tokens of each


def cut(cache: EntropyCache, pairs: Dataset, threshold: float) -> ThresholdRow:
    """Segments of every response of a complete cache at ``threshold`` nats."""
    terminated = np.stack([np.asarray(pairs[f"{s}_terminated"][:]) for s in SIDES], 1).reshape(-1)
    segments, tokens = [], []
    for start in range(0, len(terminated), 4096):
        entropy, cu_seqlens = cache.stream(start, min(start + 4096, len(terminated)))
        mask = torch.ones(len(entropy), dtype=torch.bool)
        ends = segment_ends(
            entropy,
            mask,
            threshold,
            cu_seqlens=cu_seqlens,
            entropy_of="current",
            exclude_last=torch.from_numpy(terminated[start : start + 4096]),
        )
        of_segment, of_row = segment_offsets(ends, mask, cu_seqlens=cu_seqlens)
        segments.append(of_row.diff().numpy())
        tokens.append(of_segment.diff().numpy())
    return ThresholdRow(threshold, np.concatenate(segments), np.concatenate(tokens))


def threshold_table(rows: Sequence[ThresholdRow]) -> str:
    """The comparison that ``segrlhf segment`` prints."""
    marks = (10, 50, 90)
    heads = "".join(f"{f'p{q}':>7}" for q in marks)
    lines = [
        f"{'':>9}  {'segments per response':^29}  {'tokens per segment':^29}",
        f"{'threshold':>9}  {'mean':>8}{heads}  {'mean':>8}{heads}",
    ]
    for row in rows:
        line = f"{row.threshold:9.2f}"
        for values in (row.segments, row.tokens):
            quantiles = "".join(f"{v:7.0f}" for v in np.percentile(values, marks))
            line += f"  {values.mean():8.1f}{quantiles}"
        lines.append(line)
    return "\n".join(lines)


def example(cache: EntropyCache, pairs: Dataset, tokenizer: Any, threshold: float) -> str:
    """The beginning of the first chosen response with its segments at ``threshold`` divided."""
    ids, entropy = pairs[0]["chosen_ids"][:60], cache.response(0)[:60]
    starts = [0, *[i for i in range(1, len(ids)) if entropy[i] > threshold], len(ids)]
    pieces = [tokenizer.decode(ids[i:j]) for i, j in itertools.pairwise(starts)]
    return " | ".join(piece.replace("\n", "\\n") for piece in pieces)


def run(model: ModelConfig, data: DataConfig, config: SegmentConfig) -> dict[str, Any]:
    """``segrlhf segment``: builds the cache of training and test rows and compares thresholds.

    Returns ``{"cache": directory, "thresholds": [{threshold, segments_per_response,
    tokens_per_segment}]}`` with means over the training rows.
    """
    tokenizer = load_tokenizer(model)
    splits = tokenize_splits(data, tokenizer, **config.tokenization)
    caches = {
        split: build_entropy_cache(
            model.model_name_or_path,
            tokenizer,
            rows,
            cache_dir=config.entropy_cache_dir,
            options=config,
            revision=model.model_revision,
            trust_remote_code=model.trust_remote_code,
        )
        for split, rows in splits.items()
    }
    pairs, cache = splits["train"], caches["train"]
    table = [cut(cache, pairs, threshold) for threshold in config.thresholds]
    middle = config.thresholds[len(config.thresholds) // 2]
    say(f"entropies: {cache.directory}\n\n{threshold_table(table)}\n")
    say(f"example at {middle}: {example(cache, pairs, tokenizer, middle)}\n")
    say(
        "Choose a threshold whose segments are phrases: several tokens each, and several segments "
        "in a typical response.\nA higher one cuts less. Published runs used 1.75 (Phi-3-mini) and "
        "2.0 (Llama 3). Then: segrlhf reward --granularity segment --entropy_threshold ..."
    )
    return {
        "cache": str(cache.directory),
        "thresholds": [
            {
                "threshold": row.threshold,
                "segments_per_response": float(row.segments.mean()),
                "tokens_per_segment": float(row.tokens.mean()),
            }
            for row in table
        ],
    }
