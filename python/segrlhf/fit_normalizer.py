"""Fits mean and std of a reward model's segment rewards over position: ``segrlhf fit-normalizer``.

Source: arXiv 2501.02790, section 3 (location-aware normalisers).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from segkernels import LocationFit, Normalizer, ScalarNormalizer, fit_location

from .charts import normalizer_chart
from .configs import SEED, DataConfig, Range, flag
from .data.batch import SIDES
from .data.load import load_split
from .data.tokenize import tokenize_pairs
from .entropy_cache import build_entropy_cache, describe, find_entropy_cache
from .errors import UserError
from .models.packing import PackingConfig
from .models.reward_model import SegmentRewardModel
from .outputs import check_writable
from .runtime import files
from .runtime.distributed import processes, say
from .score import (
    Response,
    RewardModelConfig,
    entropy_model_name,
    load_reward_model,
    reward_tokenizer,
    score_responses,
    tokenization,
)

FIT_FILE, PLOT_FILE = "normalizer.json", "normalizer.svg"


@dataclass
class FitConfig(RewardModelConfig):
    """Arguments of ``segrlhf fit-normalizer``."""

    kind: Literal["auto", "line", "table", "scalar"] = flag(
        "auto",
        "Form of the normaliser; auto: scalar for a bandit model, else the log line, "
        "or the table where the line explains less than half of the mean's variation.",
    )
    max_pairs: int = flag(
        60_000, "Pairs drawn from the data; all, if it has fewer.", limits=Range(min=1)
    )
    seed: int = flag(0, "Of the draw.", limits=SEED)
    entropy_cache_dir: str | None = flag(
        None,
        "Where entropies are kept; default ~/.cache/segrlhf/entropy.",
        writes="directory",
    )


def choose(kind: str, granularity: str, fit: LocationFit, scalar: ScalarNormalizer) -> Normalizer:
    """The normaliser that ``kind`` asks for."""
    if kind == "auto":
        return scalar if granularity == "bandit" else fit.best
    return {"line": fit.line, "table": fit.table, "scalar": scalar}[kind]


def fit_responses(
    model: SegmentRewardModel,
    responses: list[Response],
    kind: str = "auto",
    options: PackingConfig | None = None,
) -> tuple[Normalizer, dict[str, Any]]:
    """The normaliser that ``kind`` names, fitted to all segments of ``responses``; both forms and
    the curves behind them as ``run`` describes, without ``n_pairs``."""
    scored = score_responses(model, responses, options)
    positions = torch.from_numpy(np.concatenate([s.positions for s in scored]))
    rewards = torch.from_numpy(np.concatenate([s.rewards for s in scored])).double()
    fit = fit_location(positions, rewards)
    scalar = ScalarNormalizer(rewards.mean().item(), rewards.std(correction=0).item())
    chosen = choose(kind, model.granularity, fit, scalar)
    return chosen, {
        "kind": chosen.type,
        "normalizer": chosen.to_dict(),
        "r2_mean": fit.r2_mean,
        "r2_std": fit.r2_std,
        "n_segments": len(rewards),
        "scalar": scalar.to_dict(),
        "line": fit.line.to_dict(),
        "table": fit.table.to_dict(),
        "positions": fit.positions.tolist(),
        "means": fit.means.tolist(),
        "stds": fit.stds.tolist(),
        "counts": fit.counts.tolist(),
    }


def run(data: DataConfig, config: FitConfig) -> dict[str, Any]:
    """Writes the normaliser into the reward model's config.json, and normalizer.json and .svg.

    All segment rewards of a sample of the training pairs, chosen and rejected together, are fitted
    by ``segkernels.fit_location``. Entropies come from the cache of ``segrlhf reward`` where the
    data is the same; else those of the sample are computed. Returns what normalizer.json holds:
    kind, normalizer, r2_mean, r2_std, n_pairs, n_segments, scalar, line, table, and per distinct
    position positions, means, stds, counts.

    Raises UserError for a reward model that is no directory; NonFiniteError naming the row of a
    non-finite reward.
    """
    directory = Path(config.reward_model)
    if not (directory / "config.json").is_file():
        raise UserError(
            f"reward_model: expected a directory with config.json, where the normaliser is "
            f"written, got {directory}; bring a hub model there with 'hf download NAME --local-dir'"
        )
    check_writable("reward_model", directory, "directory")
    model = load_reward_model(config)
    tokenizer = reward_tokenizer(config, model)
    pairs, data_report = tokenize_pairs(
        load_split(data, "train"), tokenizer, **tokenization(config)
    )
    say(data_report.summary())
    sample = range(len(pairs))
    if len(pairs) > config.max_pairs:
        draw = np.random.default_rng(config.seed).permutation(len(pairs))
        sample = np.sort(draw[: config.max_pairs]).tolist()
    rows = _responses(model, tokenizer, pairs, sample, config)
    chosen, result = fit_responses(model, rows, config.kind, config)
    result["n_pairs"] = len(sample)
    if processes().is_main_process:
        write(directory, model, chosen, result)
    line, scalar = result["line"], result["scalar"]
    say(
        f"{result['n_segments']:,} segment rewards of {len(sample):,} pairs at "
        f"{len(result['positions']):,} positions; mean {scalar['mean']:.4f}, "
        f"std {scalar['std']:.4f}\n"
        f"mean(p) = {line['mean_slope']:.4f} ln p + {line['mean_intercept']:.4f}, "
        f"R^2 {result['r2_mean']:.3f}\n"
        f"std(p)  = {line['std_slope']:.4f} ln p + {line['std_intercept']:.4f}, "
        f"R^2 {result['r2_std']:.3f}\n"
        f"normaliser: {chosen.type}, written into {directory / 'config.json'} (curves: {FIT_FILE}, "
        f"{PLOT_FILE})"
    )
    return result


def _responses(
    model: SegmentRewardModel, tokenizer: Any, pairs: Any, sample: Any, config: FitConfig
) -> list[Response]:
    cache, index = None, {row: row for row in sample}
    if model.granularity == "segment":
        name = entropy_model_name(model, config)
        cache_dir = config.entropy_cache_dir
        cache = find_entropy_cache(name, tokenizer, pairs, cache_dir=cache_dir)
        if cache is None:
            cache = build_entropy_cache(
                name,
                tokenizer,
                pairs.select(sample),
                cache_dir=cache_dir,
                options=config,
            )
            index = {row: k for k, row in enumerate(sample)}
    out = []
    for row in sample:
        pair = pairs[row]
        for k, side in enumerate(SIDES):
            out.append(
                Response(
                    describe(2 * row + k),
                    pair["prompt_ids"],
                    pair[f"{side}_ids"],
                    pair[f"{side}_terminated"],
                    None if cache is None else cache[index[row]][k],
                )
            )
    return out


def write(
    directory: Path,
    model: SegmentRewardModel,
    normalizer: Normalizer,
    result: dict[str, Any],
) -> None:
    """Puts the normaliser into the reward model's config.json, ``result`` and its plot beside."""
    files.write_json(directory / FIT_FILE, result)
    files.write_text(directory / PLOT_FILE, normalizer_chart(result))
    # Last: a config that names a normaliser has its curves beside it.
    model.normalizer = normalizer
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["segment_reward"] = model.config.segment_reward
    files.write_json(path, config)
