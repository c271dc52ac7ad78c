"""``segrlhf ppo``: loads models and prompts, trains, saves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ..configs import DataConfig, ModelConfig
from ..data.load import load_split
from ..data.tokenize import tokenize_prompts
from ..models.loading import (
    check_positions,
    check_same_tokenizer,
    check_vocabulary,
    load_causal_lm,
    load_tokenizer,
)
from ..models.reward_model import SegmentRewardModel
from ..outputs import check_apart
from ..runtime.checkpoints import check_output_dir, claimed
from .config import PPOConfig
from .metrics import METRICS_FILE
from .models import starting_value_model
from .trainer import PPOTrainer


def run(model: ModelConfig, data: DataConfig, config: PPOConfig) -> dict[str, Any]:
    """``segrlhf ppo``: loads everything, trains, saves; returns the last logged metrics."""
    state = PartialState(cpu=config.use_cpu)
    with claimed(config.output_dir, here=state.is_main_process):
        return _run(model, data, config, state)


def _run(
    model: ModelConfig, data: DataConfig, config: PPOConfig, state: PartialState
) -> dict[str, Any]:
    if state.is_main_process:
        check_apart(config.output_dir, model, data, config)
        check_output_dir(config.output_dir, config.resume_from_checkpoint, METRICS_FILE)
    say = tqdm.write if state.is_main_process else (lambda _: None)

    tokenizer = load_tokenizer(model)
    check_same_tokenizer(tokenizer, load_tokenizer(config.reward_model))
    prompts: dict[str, Any] = {"train": None, "eval": None}
    for split in ("train", "eval") if config.eval_steps else ("train",):
        rows = load_split(data, split)
        if rows is not None:
            prompts[split], report = tokenize_prompts(
                rows,
                tokenizer,
                max_prompt_length=config.max_prompt_length,
                truncation_side=config.truncation_side,
            )
            say(f"{split} prompts: {report.summary()}")

    reward_model = SegmentRewardModel.from_pretrained(
        config.reward_model,
        config.reward_granularity,
        config.reward_threshold,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
    )
    entropy_model = None
    named = config.entropy_model or reward_model.entropy_model
    if reward_model.granularity == "segment":
        if named in (None, "policy") or _same_model(named, model.model_name_or_path):
            say(f"segments: by the entropy of {model.model_name_or_path}, the reference policy")
        else:
            say(f"segments: by the entropy of {named}, which is not the reference policy")
            check_same_tokenizer(tokenizer, load_tokenizer(named))
            entropy_model = load_causal_lm(dataclasses.replace(model, model_name_or_path=named))
    policy = load_causal_lm(dataclasses.replace(model, dtype="float32"))
    check_vocabulary(policy.config, tokenizer)
    longest = max(len(ids) for rows in prompts.values() if rows for ids in rows["prompt_ids"])
    for trained in (policy, reward_model):
        check_positions(trained, longest + config.response_length, "prompt and response")
    trainer = PPOTrainer(
        policy,
        reward_model,
        tokenizer,
        prompts["train"],
        config,
        eval_prompts=prompts["eval"],
        value_model=starting_value_model(config, model, reward_model),
        entropy_model=entropy_model,
    )
    history = trainer.train()
    say(f"policy saved in {config.output_dir}")
    # Not end_training: it also takes down the process group, which is the launch's and whose gloo
    # threads it would join with the GIL held, while one may still need the GIL to drop a tensor.
    for tracker in trainer.accelerator.trackers:
        tracker.finish()
    return history[-1]


def _same_model(name: str, other: str) -> bool:
    return name == other or (Path(name).exists() and Path(name).resolve() == Path(other).resolve())
