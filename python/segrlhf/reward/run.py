"""Trains a bandit, token or segment reward model from preference pairs (arXiv 2501.02790, 3.2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from ..configs import AdaptedModelConfig, DataConfig, PairConfig
from ..data.load import load_split
from ..data.tokenize import tokenize_pairs
from ..entropy_cache import Pairs, build_entropy_cache
from ..errors import UserError
from ..models.loading import apply_lora, load_tokenizer
from ..models.reward_model import SegmentRewardModel
from ..runtime.checkpoints import check_output_dir, resolve_resume
from ..runtime.distributed import say
from ..runtime.interrupt import Interrupt
from .config import RewardConfig
from .trainer import RUN_FILE, SegmentRewardTrainer


def run(model: AdaptedModelConfig, data: DataConfig, config: RewardConfig) -> dict[str, Any]:
    """``segrlhf reward``: trains the model and leaves it, whole, in ``config.output_dir``.

    Returns ``{"output_dir", "metrics", "history"}``: final train and eval metrics, and everything
    that was logged.
    """
    with config.main_process_first(desc="reading the pairs"):
        if config.process_index == 0:
            check_output_dir(config.output_dir, config.resume_from_checkpoint)
        checkpoint = resolve_resume(config.output_dir, config.resume_from_checkpoint)
        tokenizer = load_tokenizer(model)
        pairs = {}
        for split in ("train", "eval"):
            rows = load_split(data, split)
            if rows is None:
                continue
            pairs[split], report = tokenize_pairs(rows, tokenizer, **config.tokenization)
            say(f"{split}: {report.summary()}")
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
                batch_size=config.entropy_batch_size,
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
    if model.use_peft:
        reward_model = apply_lora(reward_model, model, "SEQ_CLS")
    trainer = SegmentRewardTrainer(
        reward_model,
        config,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        processing_class=tokenizer,
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


def trained_with(reward_model: str | Path) -> dict[str, Any]:
    """How a reward model's data was tokenized and scored; the defaults of ``reward`` if unknown."""
    known = {**PairConfig().tokenization, "score_reduction": "mean"}
    path = Path(reward_model) / RUN_FILE
    return {**known, **json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else known
