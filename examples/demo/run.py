"""The whole method on a small language model made on the spot: ``python examples/demo/run.py``.

Texts and a language model of them; pairs of its responses, labelled by a known *gold* rule; a
bandit, a token and a segment reward model and their normalisers; PPO with each, and with a control.
Prints one table and writes results.json, table.md, report.html and segments.svg.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import corpus
import datasets
import page
import torch
import transformers
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from segrlhf import compare, fit_normalizer, score
from segrlhf.entropy_cache import (
    SIDES,
    Pairs,
    build_entropy_cache,
    describe,
    load_entropy_model,
)
from segrlhf.errors import NonFiniteError, UserError
from segrlhf.models.loading import load_tokenizer
from segrlhf.models.reward_model import SegmentRewardModel, check_threshold
from segrlhf.page import responses_svg
from segrlhf.reward.config import RewardConfig
from segrlhf.reward.trainer import SegmentRewardTrainer
from segrlhf.runtime import files
from segrlhf.runtime.workers import workers

Granularity = Literal["bandit", "token", "segment"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
# Name: whose reward model, and how its rewards are paid.
VARIANTS: dict[str, tuple[Granularity, dict[str, Any]]] = {
    "bandit": ("bandit", {}),
    "token": ("token", {}),
    "segment": ("segment", {}),
    "segment mean at last token": ("segment", {"reward_credit": "final"}),
}
OPENING_WORDS = 12  # of a prompt that a given language model writes
N_EXAMPLES = 4
STEPS = 5

Row = dict[str, Any]


@dataclass
class DemoConfig:
    """Every variant runs with the same settings."""

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

    jobs: int | None = field(
        default=None,
        metadata={"help": "Runs at once; default: as many as torch has threads, one with a GPU."},
    )

    def __post_init__(self) -> None:
        for name in (
            "seeds", "n_texts", "lm_steps", "n_prompts", "n_eval_prompts", "n_pairs",
            "n_eval_pairs", "response_length", "updates", "eval_every", "rollouts",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"jobs: expected at least 1, got {self.jobs}")
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
    """Runs everything and writes the files; returns what results.json holds."""
    out = new_output_dir(config.output_dir)
    seeds = range(config.seed, config.seed + config.seeds)
    jobs = min(config.jobs or default_jobs(), len(VARIANTS) * config.seeds)
    if jobs > 1:
        print(f"{jobs} runs at once; what they print goes to {out / 'log.txt'}", flush=True)
    seconds: dict[str, float] = {}
    with _one_thread(), workers(jobs, out / "log.txt", be_quiet) as executor:
        with _step(seconds, 1, "texts and language model"):
            world = make_world(config, out)
        with _step(seconds, 2, "preference pairs"):
            pairs, baselines = make_pairs(config, world, executor)
        with _step(seconds, 3, "reward models and their normalisers"):
            reward_models = train_reward_models(config, world, pairs, executor)
        with _step(seconds, 4, "PPO"):
            variants = [
                compare.Variant(name, str(world.reward_model(granularity)), options)
                for name, (granularity, options) in VARIANTS.items()
            ]
            runs = compare.train_all(comparison(config, world), variants, seeds, executor)
        print(f"[5/{STEPS}] results", flush=True)
        accuracy = {name: reward_models[g]["accuracy"] for name, (g, _) in VARIANTS.items()}
        table = compare.result_table(runs, accuracy, baselines)
        results: dict[str, Any] = {
            "settings": dataclasses.asdict(config) | {"output_dir": str(out), "jobs": jobs},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "gold": {"rule": world.gold.name, "about": world.gold.about},
            "baselines": baselines,
            "reward_models": reward_models,
            "runs": runs,
            "seconds": seconds,
            "levels": compare.common_levels(runs),
            "table": dataclasses.asdict(table),
            "examples": colour(world, runs["segment"][0]),
        }
    notes = page.notes(results)
    files.write_json(out / "results.json", results)
    files.write_text(out / "table.md", "\n\n".join([table.markdown(), *notes]) + "\n")
    files.write_text(out / "report.html", page.report(results))
    files.write_text(out / "segments.svg", responses_svg(results["examples"][:2]))
    print("\n".join(["", table.text(), "", *notes, "", f"report: {out / 'report.html'}"]))
    return results


def default_jobs() -> int:
    return 1 if torch.accelerator.is_available() else torch.get_num_threads()


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
    print(f"[{number}/{STEPS}] {name}", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def be_quiet() -> None:
    """Hides the bars of loading and mapping files, which take no time here."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


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
    """What all steps share. Sent to worker processes by pickle."""

    out: Path
    lm: str  # directory or hub name of the language model
    tokenizer: Any
    gold: corpus.Gold
    prompts: dict[str, list[str]]  # train, test

    def reward_model(self, granularity: str) -> Path:
        return self.out / "reward_models" / granularity

    def pairs(self, rows: list[Row]) -> Pairs:
        """Pairs with their entropies, which the first call computes and keeps."""
        found = datasets.Dataset.from_list(rows)
        cache = build_entropy_cache(self.lm, self.tokenizer, found, cache_dir=self.out / "entropy")
        return Pairs(found, cache)

    def rows(self, split: str) -> list[Row]:
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


def sample_pairs(config: DemoConfig, world: World, split: str) -> list[Row]:
    """Pairs on the prompts of one split; written as jsonl, with their entropies kept."""
    held_out = split == "test"
    rows = corpus.sample_pairs(
        load_entropy_model(world.lm),
        world.tokenizer,
        world.prompts[split],
        config.n_eval_pairs if held_out else config.n_pairs,
        world.gold,
        response_length=config.response_length,
        seed=2 * config.seed + held_out,
        desc=f"{split} pairs",
    )
    texts = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
    lines = "".join(f"{json.dumps(row)}\n" for row in texts)
    files.write_text(world.out / "pairs" / f"{split}.jsonl", lines)
    world.pairs(rows)
    return rows


def make_pairs(
    config: DemoConfig, world: World, executor: Executor
) -> tuple[dict[str, list[Row]], dict[str, float]]:
    """Pairs of both splits, and what reads no reward model gets right."""
    futures = {s: executor.submit(sample_pairs, config, world, s) for s in ("train", "test")}
    found = {split: future.result() for split, future in futures.items()}
    ids = {s: [(r["chosen_ids"], r["rejected_ids"]) for r in rows] for s, rows in found.items()}
    vocab_size = len(world.tokenizer)
    return found, {
        "bag of tokens": corpus.bag_of_tokens_accuracy(ids["train"], ids["test"], vocab_size),
        "longer response wins": statistics.fmean(
            (len(c) > len(r)) + 0.5 * (len(c) == len(r)) for c, r in ids["test"]
        ),
        "gold itself": statistics.fmean(
            r["chosen_gold"] > r["rejected_gold"] for r in found["test"]
        ),
    }


# ---- reward models and normalisers --------------------------------------------------------------


def train_reward_models(
    config: DemoConfig, world: World, pairs: dict[str, list[Row]], executor: Executor
) -> dict[str, dict[str, Any]]:
    """``train_reward_model`` of every granularity, by granularity."""
    futures = {
        g: executor.submit(train_reward_model, config, world, pairs, g) for g in GRANULARITIES
    }
    found: dict[str, dict[str, Any]] = {}
    for granularity, future in futures.items():
        found[granularity] = future.result()
        accuracy, fit = found[granularity]["accuracy"], found[granularity]["fit"]
        print(f"{granularity}: accuracy {accuracy:.3f}, normaliser {fit['kind']}", flush=True)
    return found


def train_reward_model(
    config: DemoConfig, world: World, rows: dict[str, list[Row]], granularity: Granularity
) -> dict[str, Any]:
    """Trains and saves one reward model with its normaliser; its accuracy on the held-out pairs and
    the normaliser's fit."""
    pairs = {split: world.pairs(found) for split, found in rows.items()}
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
    return {
        "accuracy": metrics["eval_accuracy"],
        "fit": fit_rewards(world, pairs["train"], granularity),
    }


def fit_rewards(world: World, pairs: Pairs, granularity: str) -> dict[str, Any]:
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
    normalizer, fit = fit_normalizer.fit_responses(model, responses)
    fit_normalizer.write(directory, model, normalizer, fit)
    return fit


# ---- policies -----------------------------------------------------------------------------------


def comparison(config: DemoConfig, world: World) -> compare.Comparison:
    """What all PPO runs share."""
    return compare.Comparison(
        output_dir=world.out / "ppo",
        model=world.lm,
        train_prompts=world.rows("train"),
        eval_prompts=world.rows("test"),
        gold=world.gold.reward,
        threshold=config.entropy_threshold,
        settings={
            "reward_reduction": config.reward_reduction,
            "total_episodes": config.updates * config.rollouts,
            "rollout_batch_size": config.rollouts,
            "mini_batch_size": config.mini_batch_size,
            "per_device_train_batch_size": config.mini_batch_size,
            "response_length": config.response_length,
            "learning_rate": config.learning_rate,
            "value_learning_rate": config.value_learning_rate,
            "lr_scheduler_type": "constant",
            "kl_coef": config.kl_coef,
            "eval_steps": config.eval_every,
            "save_steps": 0,
        },
    )


def colour(world: World, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Held-out responses before and after, with their segment rewards, for the page."""
    config = score.RewardModelConfig(str(world.reward_model("segment")))
    model = score.load_reward_model(config)
    rows: list[dict[str, Any]] = []
    responses = []
    for i, prompt in enumerate(world.prompts["test"][:N_EXAMPLES]):
        for when in ("before", "after"):
            text = run["responses"][when][i]
            start = world.tokenizer(prompt)["input_ids"]
            ids = world.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                continue
            responses.append(score.Response(f"prompt {i}", start, ids, False))
            label = f"{when} PPO, gold {world.gold.reward(text):+.1f}"
            rows.append({"label": label, "prompt": prompt})
    score.add_entropies(responses, world.lm, world.tokenizer)
    scores = score.score_responses(model, responses)
    for row, response, scored in zip(rows, responses, scores, strict=True):
        text, spans = score.pieces(world.tokenizer, response.ids, scored.ends)
        rewards = scored.rewards.tolist()
        row["segments"] = [(text[a:b], r) for (a, b), r in zip(spans, rewards, strict=True)]
        row["score"] = statistics.fmean(rewards)
        if not text.startswith(" "):
            row["prompt"] += " "
    return rows


def main() -> int:
    parser = HfArgumentParser(
        DemoConfig, prog="run.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    try:
        (config,) = parser.parse_args_into_dataclasses(look_for_args_file=False)
        be_quiet()
        run(config)
    except (UserError, NonFiniteError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; what was written stays", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
