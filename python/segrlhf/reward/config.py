"""Flags of ``segrlhf reward``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..configs import (
    LEARNING_RATE,
    SEED,
    THRESHOLD,
    WEIGHT_DECAY,
    PairConfig,
    Range,
    check_flags,
    flag,
)
from ..errors import UserError, first_line
from ..models.packing import PackingConfig
from ..models.reward_model import check_threshold

_COUNT, _SHARE, _NOT_NEGATIVE = Range(min=1), Range(min=0, below=1), Range(min=0)

# Of TrainingArguments' numbers that are not declared anew below.
TRAINING_LIMITS = {
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": Range(above=0),
    "data_seed": SEED,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "eval_delay": _NOT_NEGATIVE,
    "eval_steps": Range(above=0),
    "gradient_accumulation_steps": _COUNT,
    "label_smoothing_factor": Range(min=0, max=1),
    "learning_rate": LEARNING_RATE,
    "local_rank": Range(min=-1),
    "max_grad_norm": Range(min=0, infinite=True),  # 0 and inf: none
    "max_steps": Range(min=-1),  # -1: by num_train_epochs
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "per_device_eval_batch_size": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "save_steps": Range(above=0),
    "save_total_limit": _COUNT,
    "seed": SEED,
    "torch_empty_cache_steps": _COUNT,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": WEIGHT_DECAY,
}

EVAL_METRICS = (
    "loss", "accuracy", "longer_wins", "margin", "mean_reward", "min_reward", "max_reward",
    "segments/per_response", "segments/tokens_per_segment",
)  # fmt: skip


@dataclass
class RewardConfig(PackingConfig, PairConfig, TrainingArguments):
    """Arguments of ``segrlhf reward``: transformers' TrainingArguments and these.

    ``label_smoothing_factor`` is the label smoothing of the Bradley-Terry loss.
    """

    output_dir: str = flag(..., "Where the reward model and checkpoints go.", writes="directory")
    granularity: Literal["segment", "token", "bandit"] = flag("segment", "What gets one reward.")
    entropy_threshold: float | None = flag(
        None,
        "Segments only: a token whose entropy exceeds this many nats starts a segment.",
        depends_on=("granularity",),
        limits=THRESHOLD,
    )
    entropy_model: str | None = flag(
        None, "Frozen LM that gives the entropies; default: the model itself."
    )
    center_rewards_coefficient: float | None = flag(
        None, "Weight of mean[(score_chosen + score_rejected)^2].", limits=Range(min=0)
    )
    score_reduction: Literal["mean", "sum"] = flag(
        "mean", "How segment rewards make the score of a response."
    )
    entropy_cache_dir: str | None = flag(
        None,
        "Where entropies are kept; default ~/.cache/segrlhf/entropy.",
        writes="directory",
    )
    num_train_epochs: float = flag(
        1.0, "Passes over the pairs.", limits=Range(above=0, max=1_000_000)
    )
    logging_steps: float = flag(10, "Steps between two logs.", limits=Range(above=0))
    logging_nan_inf_filter: bool = flag(
        False, "Leave false: NaN stops the run, and looking for it waits for the device."
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = flag(
        None,
        'More settings of the schedule as json, e.g. {"min_lr_rate": 0.1}.',
        depends_on=("lr_scheduler_type",),
    )
    # Transformers 5.17 knows the second name only, 5.23 warns of it: here both are one flag.
    activation_checkpointing: bool | None = flag(
        None, "Recompute activations to save memory.", nargs="?", const=True
    )
    gradient_checkpointing: bool | None = flag(
        None,
        "Same as --activation_checkpointing.",
        nargs="?",
        const=True,
        dest="activation_checkpointing",
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = flag(
        None, "Options of transformers for it, as json."
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = flag(
        None,
        "Same as --activation_checkpointing_kwargs.",
        dest="activation_checkpointing_kwargs",
    )
    ddp_find_unused_parameters: bool | None = flag(
        False, "Every parameter of a reward model is used."
    )
    remove_unused_columns: bool = flag(
        False, "Must stay false: pairs are no arguments of the model."
    )

    def __post_init__(self) -> None:
        # Else the processes of torchrun would each train alone, into the same directory.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        for what in ("checkpointing", "checkpointing_kwargs"):
            given = getattr(self, f"activation_{what}")
            given = getattr(self, f"gradient_{what}") if given is None else given
            setattr(self, f"activation_{what}", given)
            setattr(self, f"gradient_{what}", given)
        check_flags(self, TRAINING_LIMITS)
        TrainingArguments.__post_init__(self)
        try:
            get_reporting_integration_callbacks(self.report_to)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(
                f"report_to: expected none or trackers that transformers knows, got "
                f"{', '.join(self.report_to)}: {first_line(error)}"
            ) from error
        if self.granularity == "segment":
            check_threshold(self.entropy_threshold)
        elif self.entropy_threshold is not None:
            raise UserError(
                f"entropy_threshold: expected none with granularity {self.granularity}, got "
                f"{self.entropy_threshold}; drop it, or pass --granularity segment"
            )
        if self.remove_unused_columns:
            raise UserError(
                "remove_unused_columns: expected false, got true; the columns of a pair are no "
                "arguments of the model's forward"
            )
        if self.dataloader_num_workers:
            raise UserError(
                f"dataloader_num_workers: expected 0, got {self.dataloader_num_workers}; the pairs "
                "are tokens already, and a signal to all processes would end workers that the "
                "step under way still needs"
            )
        if self.max_steps == 0:
            raise UserError(
                "max_steps: expected at least 1, or -1 for as many as num_train_epochs has, got 0; "
                "a model without a step of training gives random rewards"
            )
        if not self.eval_do_concat_batches:
            raise UserError(
                "eval_do_concat_batches: expected true, got false; metrics are those of all pairs"
            )
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if metric not in EVAL_METRICS:
            raise UserError(
                f"metric_for_best_model: expected one of {', '.join(EVAL_METRICS)}, got "
                f"{self.metric_for_best_model}"
            )
        if self.enable_jit_checkpoint:
            raise UserError(
                "enable_jit_checkpoint: expected false, got true; SIGTERM saves a checkpoint here "
                "without it"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise UserError(
                "train_sampling_strategy: expected random or sequential, got "
                f"{self.train_sampling_strategy}; pairs have no single length to group by"
            )
