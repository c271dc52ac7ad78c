"""The whole method on a small model made on the spot: ``segrlhf demo``."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import torch
import transformers
from transformers.utils import logging as transformers_logging

from . import corpus, report, score
from .configs import ModelConfig
from .data.batch import pad_responses
from .entropy_cache import (
    SIDES,
    Pairs,
    build_entropy_cache,
    describe,
    entropies,
    load_entropy_model,
)
from .errors import UserError
from .fit_normalizer import fit_responses, write
from .models.lm_head import token_stats
from .models.loading import load_causal_lm, load_tokenizer
from .models.reward_model import SegmentRewardModel, check_threshold
from .ppo.config import PPOConfig
from .ppo.trainer import PPOTrainer
from .reward.config import RewardConfig
from .reward.trainer import SegmentRewardTrainer
from .runtime import files

Granularity = Literal["bandit", "token", "segment"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
START = "before PPO"
# Name: whose reward model, and how its rewards are paid.
VARIANTS: dict[str, tuple[Granularity, dict[str, Any]]] = {
    "bandit": ("bandit", {}),
    "token": ("token", {}),
    "segment": ("segment", {}),
    "segment mean at last token": ("segment", {"reward_credit": "final"}),
}
OPENING_WORDS = 12  # of a prompt that a given language model writes
N_EXAMPLES = 4


@dataclass
class DemoConfig:
    """Arguments of ``segrlhf demo``. Every variant runs with the same ones."""

    output_dir: str = field(
        default="runs/demo",
        metadata={"help": "Where everything goes; one that holds files is kept, and -2, -3 used."},
    )
    seeds: int = field(default=1, metadata={"help": "PPO runs of each variant."})
    seed: int = field(
        default=0,
        metadata={"help": "Of texts, language model, pairs, reward models and the first PPO run."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A causal LM to start from; default: one trained on a written corpus."},
    )
    gold: str | None = field(
        default=None,
        metadata={"help": "Gold rule: phrases (the written corpus) or stories (English stories)."},
    )
    n_texts: int = field(default=6000, metadata={"help": "Texts of the corpus."})
    lm_steps: int = field(default=150, metadata={"help": "Steps of the language model, 32 texts."})
    n_prompts: int = field(default=384, metadata={"help": "Prompts of pairs and rollouts."})
    n_eval_prompts: int = field(default=128, metadata={"help": "Prompts held out of both."})
    n_pairs: int = field(default=3000, metadata={"help": "Preference pairs to train on."})
    n_eval_pairs: int = field(default=600, metadata={"help": "Pairs on the held-out prompts."})
    response_length: int = field(default=48, metadata={"help": "Most tokens of a response."})
    entropy_threshold: float = field(
        default=1.5, metadata={"help": "Nats; a token of more entropy starts a segment."}
    )
    reward_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the reward models."}
    )
    reward_epochs: float = field(
        default=2.0, metadata={"help": "Passes of each reward model over the pairs."}
    )
    updates: int = field(default=20, metadata={"help": "PPO updates of each run."})
    eval_every: int = field(default=4, metadata={"help": "Updates between evaluations."})
    rollouts: int = field(default=64, metadata={"help": "Responses an update."})
    mini_batch_size: int = field(default=16, metadata={"help": "Responses an optimizer step."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the policy."})
    value_learning_rate: float = field(default=1e-3, metadata={"help": "Of the value model."})
    kl_coef: float = field(default=0.02, metadata={"help": "beta: weight of the KL penalty."})
    reward_reduction: Literal["mean", "sum"] = field(
        default="mean",
        metadata={"help": "mean, or sum: a return about K times larger, so beta K times weaker."},
    )

    def __post_init__(self) -> None:
        for name in (
            "seeds", "n_texts", "lm_steps", "n_prompts", "n_eval_prompts", "n_pairs",
            "n_eval_pairs", "response_length", "updates", "eval_every", "rollouts",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        check_threshold(self.entropy_threshold)
        if self.gold is not None:
            corpus.gold_rule(self.gold)
        n_openings = len(corpus.openings())
        if self.model_name_or_path is None and self.n_prompts + self.n_eval_prompts > n_openings:
            raise UserError(
                f"n_prompts: expected n_prompts and n_eval_prompts within the {n_openings} "
                f"openings of the corpus, got {self.n_prompts} and {self.n_eval_prompts}; "
                "ask for fewer"
            )


def run(config: DemoConfig) -> dict[str, Any]:
    """``segrlhf demo``: writes results.json, table.md and report.html; returns the results."""
    out = new_output_dir(config.output_dir)
    seconds: dict[str, float] = {}
    with _quiet(), _one_thread():
        with _step(seconds, 1, "texts and language model"):
            world = make_world(config, out)
        with _step(seconds, 2, "preference pairs"):
            pairs, baselines = make_pairs(config, world, out)
        with _step(seconds, 3, "reward models"):
            accuracy = {g: train_reward_model(config, world, pairs, g) for g in GRANULARITIES}
        with _step(seconds, 4, "normalisers"):
            fits = {g: fit_normalizer(world, pairs["train"], g) for g in GRANULARITIES}
        with _step(seconds, 5, "PPO"):
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
            for seed in range(config.seed, config.seed + config.seeds):
                for name in VARIANTS:
                    runs[name].append(train_policy(config, world, name, seed))
        print("[6/6] results", flush=True)
        results: dict[str, Any] = {
            "settings": dataclasses.asdict(config) | {"output_dir": str(out)},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "gold": {"rule": world.gold.name, "about": world.gold.about},
            "baselines": baselines,
            "reward_models": {g: {"accuracy": accuracy[g], "fit": fits[g]} for g in GRANULARITIES},
            "runs": runs,
            "seconds": seconds,
        }
        results["levels"] = common_levels(runs)
        results["table"] = dataclasses.asdict(result_table(results))
        results["examples"] = colour(world, runs["segment"][0])
    table = report.Table(**results["table"])
    notes = report.demo_notes(results)
    files.write_json(out / "results.json", results)
    files.write_text(out / "table.md", "\n\n".join([table.markdown(), *notes]) + "\n")
    files.write_text(out / "report.html", report.demo_html(results))
    print("\n".join(["", table.text(), "", *notes, "", f"report: {out / 'report.html'}"]))
    return results


def new_output_dir(name: str) -> Path:
    """``name``, or the first of name-2, name-3, ... that holds nothing; an earlier run stays."""
    path, number = Path(name), 1
    while path.exists() and (not path.is_dir() or any(path.iterdir())):
        number += 1
        path = Path(f"{name}-{number}")
    if number > 1:
        print(f"{name} holds an earlier run, which is left alone; this one goes to {path}")
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _step(seconds: dict[str, float], number: int, name: str) -> Iterator[None]:
    print(f"[{number}/6] {name}", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the bars of loading and mapping files, which take no time here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
        datasets.enable_progress_bars()


@contextmanager
def _one_thread() -> Iterator[None]:
    """On models this small torch's threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- texts, language model, pairs ---------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What all variants share."""

    out: Path
    lm: str  # directory or hub name of the language model
    tokenizer: Any
    gold: corpus.Gold
    prompts: dict[str, list[str]]  # train, test

    def reward_model(self, granularity: str) -> Path:
        return self.out / "reward_models" / granularity

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Prompts as the PPO trainer reads them."""
        ids = self.tokenizer(self.prompts[split])["input_ids"]
        return [
            {"prompt": text, "prompt_ids": one}
            for text, one in zip(self.prompts[split], ids, strict=True)
        ]


def make_world(config: DemoConfig, out: Path) -> World:
    """Writes a corpus and trains a language model on it, or takes the given one."""
    n = config.n_prompts + config.n_eval_prompts
    if config.model_name_or_path is None:
        texts = [t.opening + t.body for t in corpus.write_texts(config.n_texts, config.seed)]
        tokenizer = corpus.train_tokenizer(texts)
        model = corpus.pretrain_lm(texts, tokenizer, steps=config.lm_steps, seed=config.seed)
        lm = str(out / "language_model")
        model.save_pretrained(lm)
        tokenizer.save_pretrained(lm)
        openings = corpus.openings()
        order = torch.randperm(
            len(openings), generator=torch.Generator().manual_seed(config.seed)
        ).tolist()
        prompts = [openings[i] for i in order[:n]]
        gold = corpus.gold_rule(config.gold or "phrases")
    else:
        lm = config.model_name_or_path
        tokenizer = load_tokenizer(lm)
        prompts = corpus.sample_openings(
            load_entropy_model(lm), tokenizer, n, words=OPENING_WORDS, seed=config.seed
        )
        gold = corpus.gold_rule(config.gold or "stories")
    split = {"train": prompts[: config.n_prompts], "test": prompts[config.n_prompts :]}
    return World(out, lm, tokenizer, gold, split)


def make_pairs(
    config: DemoConfig, world: World, out: Path
) -> tuple[dict[str, Pairs], dict[str, float]]:
    """Pairs of both splits with their entropies, and what reads no reward model gets right."""
    model = load_entropy_model(world.lm)
    found, pairs = {}, {}
    for offset, (split, n) in enumerate((("train", config.n_pairs), ("test", config.n_eval_pairs))):
        found[split] = corpus.sample_pairs(
            model,
            world.tokenizer,
            world.prompts[split],
            n,
            world.gold,
            response_length=config.response_length,
            seed=2 * config.seed + offset,
            desc=f"{split} pairs",
        )
        texts = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in found[split]]
        lines = "".join(f"{json.dumps(row)}\n" for row in texts)
        files.write_text(out / "pairs" / f"{split}.jsonl", lines)
        rows = datasets.Dataset.from_list(found[split])
        cache = build_entropy_cache(
            world.lm, world.tokenizer, rows, cache_dir=out / "entropy", batch_size=64
        )
        pairs[split] = Pairs(rows, cache)
    ids = {s: [(r["chosen_ids"], r["rejected_ids"]) for r in rows] for s, rows in found.items()}
    vocab_size = len(world.tokenizer)
    test = found["test"]
    return pairs, {
        "bag of tokens": corpus.bag_of_tokens_accuracy(ids["train"], ids["test"], vocab_size),
        "longer response wins": statistics.fmean(
            (len(c) > len(r)) + 0.5 * (len(c) == len(r)) for c, r in ids["test"]
        ),
        "gold itself": statistics.fmean(r["chosen_gold"] > r["rejected_gold"] for r in test),
    }


# ---- reward models and normalisers --------------------------------------------------------------


def train_reward_model(
    config: DemoConfig, world: World, pairs: dict[str, Pairs], granularity: Granularity
) -> float:
    """Trains and saves one reward model; its accuracy on the held-out pairs."""
    segment = granularity == "segment"
    directory = world.reward_model(granularity)
    model = SegmentRewardModel.from_causal_lm(
        world.lm,
        granularity,
        config.entropy_threshold if segment else None,
        str(Path(world.lm).resolve()) if segment and Path(world.lm).is_dir() else None,
        seed=config.seed,
        tokenizer=world.tokenizer,
        dtype=torch.float32,
    )
    arguments = RewardConfig(
        output_dir=str(directory),
        granularity=granularity,
        entropy_threshold=config.entropy_threshold if segment else None,
        learning_rate=config.reward_learning_rate,
        num_train_epochs=config.reward_epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        warmup_steps=10,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=config.seed,
    )
    trainer = SegmentRewardTrainer(
        model, arguments, pairs["train"], pairs["test"], processing_class=world.tokenizer
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_final(directory, {})
    return metrics["eval_accuracy"]


def fit_normalizer(world: World, pairs: Pairs, granularity: str) -> dict[str, Any]:
    """Fits and keeps the normaliser of a reward model; the fit's curves."""
    directory = world.reward_model(granularity)
    model = score.load_reward_model(score.RewardModelConfig(str(directory)))
    responses = [
        score.Response(
            describe(2 * pair + side),
            row["prompt_ids"],
            row[f"{name}_ids"],
            row[f"{name}_terminated"],
            row[f"{name}_entropy"] if granularity == "segment" else None,
        )
        for pair, row in enumerate(pairs[i] for i in range(len(pairs)))
        for side, name in enumerate(SIDES)
    ]
    normalizer, fit = fit_responses(model, responses, batch_size=64)
    write(directory, model, normalizer, fit)
    return fit


# ---- policies -----------------------------------------------------------------------------------


class Judge:
    """Gold rewards of responses, and how many segments the frozen LM would cut them into.

    The count is the same measure for every variant: tokens of more entropy than the threshold,
    whatever the variant's own reward model cuts by.
    """

    def __init__(self, world: World) -> None:
        self.gold, self.tokenizer = world.gold, world.tokenizer
        self.lm = load_entropy_model(world.lm)
        config = score.RewardModelConfig(str(world.reward_model("segment")))
        self.segments = score.load_reward_model(config).segment_ends
        self.counts: list[float] = []  # mean of each evaluation
        self.texts: list[list[str]] = []

    @torch.inference_mode()
    def __call__(self, responses: list[str], prompts: list[str]) -> list[float]:
        said = [(p, r) for p, r in zip(prompts, responses, strict=True) if r]
        starts = self.tokenizer([p for p, _ in said])["input_ids"]
        texts = self.tokenizer([r for _, r in said], add_special_tokens=False)["input_ids"]
        ids, attention, action = pad_responses(starts, texts, self.lm.device)
        _, entropy = token_stats(self.lm, ids, attention, action)
        unfinished = torch.zeros(len(said), dtype=torch.bool, device=ids.device)
        ends = self.segments(entropy, action, unfinished)
        self.counts.append(int(ends.sum()) / len(responses))
        self.texts.append(responses)
        return [self.gold(text).value for text in responses]


def train_policy(config: DemoConfig, world: World, name: str, seed: int) -> dict[str, Any]:
    """One PPO run; its evaluations, held-out responses before and after, and seconds."""
    granularity, options = VARIANTS[name]
    directory = world.reward_model(granularity)
    judge = Judge(world)
    trainer = PPOTrainer(
        load_causal_lm(ModelConfig(world.lm, dtype="float32")),
        SegmentRewardModel.from_pretrained(str(directory), dtype=torch.float32),
        world.tokenizer,
        world.rows("train"),
        PPOConfig(
            output_dir=str(world.out / "ppo" / f"{name.replace(' ', '-')}-{seed}"),
            reward_model=str(directory),
            reward_reduction=config.reward_reduction,
            total_episodes=config.updates * config.rollouts,
            rollout_batch_size=config.rollouts,
            mini_batch_size=config.mini_batch_size,
            per_device_train_batch_size=config.rollouts,
            generation_batch_size=max(config.rollouts, config.n_eval_prompts),
            response_length=config.response_length,
            learning_rate=config.learning_rate,
            value_learning_rate=config.value_learning_rate,
            lr_scheduler_type="constant",
            kl_coef=config.kl_coef,
            eval_steps=config.eval_every,
            save_steps=0,
            seed=seed,
            **options,
        ),
        eval_prompts=world.rows("test"),
        eval_fn=judge,
    )
    print(f"{name}, seed {seed}", flush=True)
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
                "segments": count,
                "distinct_bigrams": point["eval/distinct_bigrams"],
                "length": point["eval/response_length"],
                "score": point["eval/scores"],
            }
            for point, count in zip(evaluated, judge.counts, strict=True)
        ],
        "responses": {"before": judge.texts[0], "after": judge.texts[-1]},
    }


def colour(world: World, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Held-out responses before and after, with their segment rewards, for the report."""
    config = score.RewardModelConfig(str(world.reward_model("segment")))
    model, lm = score.load_reward_model(config), load_entropy_model(world.lm)
    rows: list[dict[str, Any]] = []
    responses = []
    for i, prompt in enumerate(world.prompts["test"][:N_EXAMPLES]):
        for when in ("before", "after"):
            text = run["responses"][when][i]
            start = world.tokenizer(prompt)["input_ids"]
            ids = world.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                continue
            entropy = entropies(lm, [start], [ids], [f"prompt {i}"])[0]
            responses.append(score.Response(f"prompt {i}", start, ids, False, entropy))
            label = f"{when} PPO, gold {world.gold(text).value:+.1f}"
            rows.append({"label": label, "prompt": prompt})
    scores = score.score_responses(model, responses, batch_size=len(responses))
    for row, response, scored in zip(rows, responses, scores, strict=True):
        text, spans = score.pieces(world.tokenizer, response.ids, scored.ends)
        rewards = scored.rewards.tolist()
        row["segments"] = [(text[a:b], r) for (a, b), r in zip(spans, rewards, strict=True)]
        row["score"] = statistics.fmean(rewards)
        if not text.startswith(" "):
            row["prompt"] += " "
    return rows


# ---- the table ----------------------------------------------------------------------------------


def at_level(curve: Sequence[dict[str, float]], key: str, level: float, wanted: str) -> float:
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


def common_levels(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The highest gold reward and the highest KL that every run of every variant reaches."""
    curves = [run["curve"] for variant in runs.values() for run in variant]
    return {key: min(max(p[key] for p in curve) for curve in curves) for key in ("gold", "kl")}


def _over_seeds(values: Sequence[float], digits: int = 3) -> str:
    text = report.number(statistics.fmean(values), digits)
    if len(values) > 1:
        text += f" ± {report.number(statistics.stdev(values), 2)}"
    return text


def result_table(results: dict[str, Any]) -> report.Table:
    """Accuracy, segments, gold, updates, KL, diversity and seconds of every variant."""
    levels, runs = results["levels"], results["runs"]
    columns = [
        "",
        "held-out accuracy",
        "segments",
        "gold",
        "best gold",
        f"updates to gold {report.number(levels['gold'])}",
        "KL (nats)",
        f"gold at KL {report.number(levels['kl'])}",
        "distinct bigrams",
        "seconds",
    ]
    blank = ["-"] * (len(columns) - 2)
    rows = []
    for name, accuracy in results["baselines"].items():
        rows.append([name, f"{100 * accuracy:.1f} %", *blank])
    starts = [run["curve"][0] for variant in runs.values() for run in variant]

    def start(key: str) -> str:
        return report.number(statistics.fmean(point[key] for point in starts))

    rows.append(
        [START, "-", start("segments"), start("gold"), "-", "-", "0", "-",
         start("distinct_bigrams"), "-"]
    )  # fmt: skip
    for name, variant in runs.items():
        curves = [run["curve"] for run in variant]

        def end(key: str, curves: list[Any] = curves) -> str:
            return _over_seeds([curve[-1][key] for curve in curves])

        accuracy = results["reward_models"][VARIANTS[name][0]]["accuracy"]
        rows.append(
            [
                name,
                f"{100 * accuracy:.1f} %",
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
    return report.Table(columns, rows)
