"""Flags of ``segrlhf reward``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from ..configs import PairConfig, flag
from ..errors import UserError
from ..models.reward_model import check_threshold


@dataclass
class RewardConfig(PairConfig, TrainingArguments):
    """Arguments of ``segrlhf reward``: transformers' TrainingArguments and these.

    ``label_smoothing_factor`` is the label smoothing of the Bradley-Terry loss.
    """

    granularity: Literal["segment", "token", "bandit"] = flag("segment", "What gets one reward.")
    entropy_threshold: float | None = flag(
        None,
        "Segments only: a token whose entropy exceeds this many nats starts a segment.",
        depends_on=("granularity",),
    )
    entropy_model: str | None = flag(
        None, "Frozen LM that gives the entropies; default: the model itself."
    )
    center_rewards_coefficient: float | None = flag(
        None, "Weight of mean[(score_chosen + score_rejected)^2]."
    )
    score_reduction: Literal["mean", "sum"] = flag(
        "mean", "How segment rewards make the score of a response."
    )
    entropy_cache_dir: str | None = flag(
        None, "Where entropies are kept; default ~/.cache/segrlhf/entropy."
    )
    entropy_batch_size: int = flag(16, "Responses in one forward of the entropy model.")
    num_train_epochs: float = flag(1.0, "Passes over the pairs.")
    logging_steps: float = flag(10, "Steps between two logs.")
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
        super().__post_init__()
        for name, allowed in (
            ("granularity", ("segment", "token", "bandit")),
            ("score_reduction", ("mean", "sum")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
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
