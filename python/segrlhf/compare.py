"""PPO runs of several variants under the same budget, side by side.

A variant is a reward model and a way of paying its rewards. All variants of a comparison share the
language model, the prompts, the settings and, seed by seed, the random numbers. Each run gives a
curve of evaluations on held-out prompts; ``result_table`` and ``learning_curves`` set them side by
side, at the end and where all of them reached the same gold reward or the same KL.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from segkernels import segment_ends

from .charts import Line, line_chart
from .configs import ModelConfig
from .data.batch import pad_responses
from .models.lm_head import token_stats
from .models.loading import load_causal_lm, load_tokenizer
from .models.reward_model import SegmentRewardModel
from .ppo.config import PPOConfig
from .ppo.trainer import PPOTrainer
from .tables import Table, number

START = "before PPO"

# One evaluation: update, gold, kl (nats), segments, distinct_bigrams, length (tokens) and score.
Point = dict[str, float]
# One PPO run, as json keeps it: seed, seconds, curve (a list of points) and responses (before and
# after, one text a held-out prompt).
Run = dict[str, Any]
Runs = Mapping[str, Sequence[Run]]  # by variant


@dataclass(frozen=True)
class Variant:
    """One of the things compared: whose rewards, and how they are paid."""

    name: str
    reward_model: str
    options: Mapping[str, Any] = field(default_factory=dict)  # fields of PPOConfig


@dataclass(frozen=True)
class Comparison:
    """What all variants share. Sent to worker processes by pickle."""

    output_dir: Path
    model: str  # policy, reference, and the LM whose entropy cuts responses
    train_prompts: Sequence[Mapping[str, Any]]  # rows as PPOTrainer reads them
    eval_prompts: Sequence[Mapping[str, Any]]
    gold: Callable[[str], float]  # of a response; evaluations read it, training never does
    threshold: float  # nats, by which evaluations count segments
    settings: Mapping[str, Any]  # fields of PPOConfig


class Judge:
    """Gold rewards of responses, and how many segments the frozen LM would cut them into.

    The count is the same measure for every variant: tokens of more entropy than the threshold,
    whatever the variant's own reward model cuts by.
    """

    def __init__(self, comparison: Comparison, lm: Any, tokenizer: Any) -> None:
        self.gold, self.threshold = comparison.gold, comparison.threshold
        self.lm, self.tokenizer = lm, tokenizer
        self.segments: list[float] = []  # per response, mean of each evaluation
        self.texts: list[list[str]] = []

    @torch.inference_mode()
    def __call__(self, responses: list[str], prompts: list[str]) -> list[float]:
        said = [(p, r) for p, r in zip(prompts, responses, strict=True) if r]
        starts = self.tokenizer([p for p, _ in said])["input_ids"]
        texts = self.tokenizer([r for _, r in said], add_special_tokens=False)["input_ids"]
        ids, attention, action = pad_responses(starts, texts, self.lm.device)
        _, entropy = token_stats(self.lm, ids, attention, action)
        ends = segment_ends(
            entropy, action, self.threshold, entropy_of="current", exclude_last=False
        )
        self.segments.append(int(ends.sum()) / len(responses))
        self.texts.append(responses)
        return [self.gold(text) for text in responses]


def train(comparison: Comparison, variant: Variant, seed: int) -> Run:
    """One PPO run with its evaluations."""
    print(f"{variant.name}, seed {seed}", flush=True)
    model = ModelConfig(comparison.model, dtype="float32")
    tokenizer = load_tokenizer(model)
    reference = load_causal_lm(model)
    judge = Judge(comparison, reference, tokenizer)
    trainer = PPOTrainer(
        load_causal_lm(model),
        SegmentRewardModel.from_pretrained(variant.reward_model, dtype=torch.float32),
        tokenizer,
        comparison.train_prompts,
        PPOConfig(
            output_dir=str(comparison.output_dir / f"{variant.name.replace(' ', '-')}-{seed}"),
            reward_model=variant.reward_model,
            seed=seed,
            **comparison.settings,
            **variant.options,
        ),
        eval_prompts=comparison.eval_prompts,
        eval_fn=judge,
        ref_policy=reference,
    )
    started = time.perf_counter()
    history = trainer.train()
    evaluated = [point for point in history if "eval/gold" in point]
    return {
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "curve": [
            {
                "update": point["update"],
                "gold": point["eval/gold"],
                "kl": point["eval/kl"],
                "segments": segments,
                "distinct_bigrams": point["eval/distinct_bigrams"],
                "length": point["eval/response_length"],
                "score": point["eval/scores"],
            }
            for point, segments in zip(evaluated, judge.segments, strict=True)
        ],
        "responses": {"before": judge.texts[0], "after": judge.texts[-1]},
    }


def train_all(
    comparison: Comparison, variants: Sequence[Variant], seeds: Sequence[int], executor: Executor
) -> dict[str, list[Run]]:
    """Every variant with every seed; says where each run ended."""
    futures = [
        (variant.name, executor.submit(train, comparison, variant, seed))
        for seed in seeds
        for variant in variants
    ]
    runs: dict[str, list[Run]] = {variant.name: [] for variant in variants}
    for name, future in futures:
        run = future.result()
        end = run["curve"][-1]
        print(
            f"{name}, seed {run['seed']}: gold {number(end['gold'])}, KL {number(end['kl'])} nats "
            f"after {end['update']} updates, {run['seconds']:.0f} s",
            flush=True,
        )
        runs[name].append(run)
    return runs


# ---- side by side --------------------------------------------------------------------------------


def at_level(curve: Sequence[Point], key: str, level: float, wanted: str) -> float:
    """``wanted`` where ``key`` first reaches ``level``, on a straight line between evaluations.

    NaN where it never does.
    """
    before = curve[0]
    if before[key] >= level:
        return before[wanted]
    for after in curve[1:]:
        if after[key] >= level:
            share = (level - before[key]) / (after[key] - before[key])
            return before[wanted] + share * (after[wanted] - before[wanted])
        before = after
    return math.nan


def common_levels(runs: Runs) -> dict[str, float]:
    """The highest gold reward and the highest KL that every run of every variant reaches."""
    curves = [run["curve"] for variant in runs.values() for run in variant]
    return {key: min(max(p[key] for p in curve) for curve in curves) for key in ("gold", "kl")}


def _over_seeds(values: Sequence[float], digits: int = 3) -> str:
    text = number(statistics.fmean(values), digits)
    if len(values) > 1:
        text += f" ± {number(statistics.stdev(values), 2)}"
    return text


def result_table(
    runs: Runs, accuracy: Mapping[str, float], baselines: Mapping[str, float]
) -> Table:
    """Held-out accuracy, segments, gold, updates, KL, diversity and seconds of every variant.

    ``accuracy`` is of each variant's reward model; ``baselines`` are accuracies of what is no
    reward model, in rows of their own.
    """
    levels = common_levels(runs)
    columns = [
        "",
        "held-out accuracy",
        "segments",
        "gold",
        "best gold",
        f"updates to gold {number(levels['gold'])}",
        "KL (nats)",
        f"gold at KL {number(levels['kl'])}",
        "distinct bigrams",
        "seconds",
    ]
    blank = ["-"] * (len(columns) - 2)
    rows = [[name, f"{100 * share:.1f} %", *blank] for name, share in baselines.items()]
    starts = [run["curve"][0] for variant in runs.values() for run in variant]

    def start(key: str) -> str:
        return number(statistics.fmean(point[key] for point in starts))

    rows.append(
        [START, "-", start("segments"), start("gold"), "-", "-", "0", "-",
         start("distinct_bigrams"), "-"]
    )  # fmt: skip
    for name, variant in runs.items():
        curves = [run["curve"] for run in variant]

        def end(key: str, curves: list[Any] = curves) -> str:
            return _over_seeds([curve[-1][key] for curve in curves])

        rows.append(
            [
                name,
                f"{100 * accuracy[name]:.1f} %",
                end("segments"),
                end("gold"),
                _over_seeds([max(p["gold"] for p in curve) for curve in curves]),
                _over_seeds([at_level(c, "gold", levels["gold"], "update") for c in curves]),
                end("kl"),
                _over_seeds([at_level(c, "kl", levels["kl"], "gold") for c in curves]),
                end("distinct_bigrams"),
                _over_seeds([run["seconds"] for run in variant], 2),
            ]
        )
    return Table(columns, rows)


def _mean_line(name: str, runs: Sequence[Run], x: str, y: str) -> Line:
    """Mean over seeds at each evaluation; a band of one deviation, or the runs where x varies."""
    points, band = [], []
    for at in zip(*(run["curve"] for run in runs), strict=True):
        xs, ys = [p[x] for p in at], [p[y] for p in at]
        mean = statistics.fmean(ys)
        points.append((statistics.fmean(xs), mean))
        if len(ys) > 1:
            spread = statistics.stdev(ys)
            band.append((xs[0], mean - spread, mean + spread))
    if x == "update":
        return Line(name, points, band=band)
    single = [[(p[x], p[y]) for p in run["curve"]] for run in runs]
    return Line(name, points, thin=single if len(runs) > 1 else ())


def learning_curves(runs: Runs) -> dict[str, str]:
    """Charts of all variants, SVG by name: gold against updates and against KL; segments, KL,
    diversity and length against updates."""

    def chart(x: str, y: str, title: str, x_label: str, y_label: str, **options: Any) -> str:
        lines = [_mean_line(name, variant, x, y) for name, variant in runs.items()]
        return line_chart(lines, title=title, x_label=x_label, y_label=y_label, **options)

    level = (common_levels(runs)["gold"], "reached by all")
    return {
        "gold_updates": chart(
            "update", "gold", "Gold reward against updates", "PPO update", "gold", level=level
        ),
        "gold_kl": chart("kl", "gold", "Gold reward against KL", "KL to the start (nats)", "gold"),
        "segments": chart(
            "update", "segments", "Segments per response", "PPO update", "segments per response"
        ),
        "kl": chart("update", "kl", "KL against updates", "PPO update", "KL (nats)"),
        "bigrams": chart(
            "update", "distinct_bigrams", "Diversity", "PPO update", "distinct bigrams (share)"
        ),
        "length": chart("update", "length", "Response length", "PPO update", "tokens per response"),
    }
