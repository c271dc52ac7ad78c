"""Trains a bandit, token or segment reward model from preference pairs (arXiv 2501.02790, 3.2)."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from ..configs import AdaptedModelConfig, DataConfig, PairConfig
from ..data.tokenize import tokenize_splits, tokenizer_key
from ..entropy_cache import Pairs, build_entropy_cache, model_fingerprint, pairs_digest
from ..errors import UserError, reading
from ..models.loading import apply_lora, check_positions, load_tokenizer
from ..models.reward_model import SegmentRewardModel
from ..outputs import check_apart
from ..runtime.checkpoints import check_output_dir, claimed, resolve_resume
from ..runtime.distributed import processes, say
from ..runtime.identity import Identity, digest
from ..runtime.interrupt import Interrupt
from .checkpoint import RUN_FILE
from .config import RewardConfig
from .trainer import SegmentRewardTrainer


def run(model: AdaptedModelConfig, data: DataConfig, config: RewardConfig) -> dict[str, Any]:
    """``segrlhf reward``: trains the model and leaves it, whole, in ``config.output_dir``.

    Returns ``{"output_dir", "metrics", "history"}``: final train and eval metrics, and everything
    that was logged.
    """
    with claimed(config.output_dir, here=config.process_index == 0):
        return _run(model, data, config)


def _run(model: AdaptedModelConfig, data: DataConfig, config: RewardConfig) -> dict[str, Any]:
    if config.process_index == 0:
        check_apart(config.output_dir, model, data, config)
        check_output_dir(config.output_dir, config.resume_from_checkpoint, RUN_FILE)
    processes().wait_for_everyone()
    checkpoint = resolve_resume(config.output_dir, config.resume_from_checkpoint)
    tokenizer = load_tokenizer(model)
    pairs = tokenize_splits(data, tokenizer, **config.tokenization)
    if config.eval_strategy != "no" and "eval" not in pairs:
        raise UserError(
            f"eval_strategy: expected rows to evaluate on, got none in {data.dataset_name}; pass "
            "--eval_size 0.05, --dataset_test_split, or --eval_strategy no"
        )

    entropy_model = config.entropy_model or model.model_name_or_path
    if Path(entropy_model).is_dir():
        entropy_model = str(Path(entropy_model).resolve())
    caches = {}
    if config.granularity == "segment":
        same = config.entropy_model is None
        caches = {
            split: build_entropy_cache(
                entropy_model,
                tokenizer,
                rows,
                cache_dir=config.entropy_cache_dir,
                options=config,
                revision=model.model_revision if same else "main",
                trust_remote_code=model.trust_remote_code,
            )
            for split, rows in pairs.items()
        }
    datasets = {split: Pairs(rows, caches.get(split)) for split, rows in pairs.items()}

    set_seed(config.seed)
    reward_model: Any = SegmentRewardModel.from_causal_lm(
        model.model_name_or_path,
        config.granularity,
        config.entropy_threshold,
        entropy_model if config.granularity == "segment" else None,
        seed=config.seed,
        tokenizer=tokenizer,
        revision=model.model_revision,
        # Adam's small steps vanish in bf16 weights; --bf16 runs the arithmetic in bf16 instead.
        dtype="float32" if model.dtype == "auto" else model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
    )
    for split, rows in datasets.items():
        check_positions(reward_model, int(rows.sizes.widths("none").max()), f"a {split} row")
    if model.use_peft:
        reward_model = apply_lora(reward_model, model, "SEQ_CLS")
    identity: list[Any] = [None]
    if config.process_index == 0:  # it reads all weights
        identity[0] = _identity(model, config, tokenizer, pairs["train"], entropy_model)
    trainer = SegmentRewardTrainer(
        reward_model,
        config,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        processing_class=tokenizer,
        identity=broadcast_object_list(identity)[0],
    )
    sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
    if model.use_peft and sharded:
        raise UserError(
            "use_peft: expected whole weights on every process, to merge the adapters into, got "
            "FSDP or ZeRO-3; train LoRA with plain data parallelism or ZeRO-2"
        )
    with Interrupt(config.output_dir):  # a signal after the last step waits for the model
        output = trainer.train(str(checkpoint) if checkpoint else None)
        metrics = {**output.metrics, **(trainer.evaluate() if "eval" in datasets else {})}
        trainer.save_final(
            config.output_dir,
            {**config.tokenization, "score_reduction": config.score_reduction},
        )
    say(f"reward model: {config.output_dir}")
    return {
        "output_dir": config.output_dir,
        "metrics": metrics,
        "history": trainer.state.log_history,
    }


# What a resumed run may change: how far it goes, how it reads, what it writes and shows.
FREE = (
    "num_train_epochs", "max_steps", "max_grad_norm", "max_tokens_per_batch", "packing",
    "logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
    "save_total_limit",
)  # fmt: skip

# What it may not: the continuation would be another run, or go on with the old value, which
# Trainer loads with the optimizer's and the schedule's state.
KEPT = (
    "granularity", "entropy_threshold", "score_reduction", "label_smoothing_factor",
    "center_rewards_coefficient", "seed", "data_seed", "train_sampling_strategy",
    "dataloader_drop_last", "ignore_data_skip", "per_device_train_batch_size",
    "auto_find_batch_size", "gradient_accumulation_steps", "average_tokens_across_devices",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "neftune_noise_alpha", "bf16", "fp16", "tf32", "full_determinism",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel",
    "liger_kernel_config", "fsdp", "deepspeed", "parallelism_config", "accelerator_config",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
)  # fmt: skip

# By what it holds, not by its name: these make the pairs and the models.
HASHED = (
    "entropy_model", "max_length", "max_prompt_length", "truncation_side", "force_eos",
    "strip_system_header",
)  # fmt: skip


def _identity(
    model: AdaptedModelConfig, config: RewardConfig, tokenizer: Any, pairs: Any, entropy_model: str
) -> Identity:
    """Settings, and hashes of the base model, the entropy model, the tokenizer and the pairs."""
    revision = model.model_revision
    rest = (name for name in sorted(pairs.column_names) if not name.endswith("_ids"))
    per_pair = ([name, list(pairs[name])] for name in rest)  # margins, what was cut
    settings = config.to_dict()  # as json; which flags there are depends on transformers' version
    kept = {name: settings.get(name) for name in KEPT}
    kept |= {
        "processes": config.world_size,
        "mixed precision of accelerate": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "dtype": model.dtype,
        "LoRA": [getattr(model, each.name) for each in fields(model) if "lora" in each.name]
        if model.use_peft
        else None,
        "tokenizer": tokenizer_key(tokenizer),
        "pairs": digest([pairs_digest(pairs), *per_pair]),
        "model": model_fingerprint(model.model_name_or_path, revision),
        "entropy model": None,
    }
    if config.granularity == "segment":
        same = config.entropy_model is None
        kept["entropy model"] = model_fingerprint(entropy_model, revision if same else "main")
    return Identity(kept, {name: getattr(config, name) for name in FREE})


def trained_with(reward_model: str | Path) -> dict[str, Any]:
    """How a reward model's data was tokenized and scored; the defaults of ``reward`` if unknown."""
    known = {**PairConfig().tokenization, "score_reduction": "mean"}
    path = Path(reward_model) / RUN_FILE
    if not path.is_file():
        return known
    with reading("reward_model", "the settings of its training", path, "copy the file again"):
        found = {**known, **json.loads(path.read_text(encoding="utf-8"))}
        try:
            PairConfig(**{name: found[name] for name in PairConfig().tokenization})
        except UserError as error:  # names a flag that nobody gave
            raise ValueError(str(error)) from error
        if found["score_reduction"] not in ("mean", "sum"):
            raise ValueError(f"score_reduction is {found['score_reduction']!r}")
    return found
