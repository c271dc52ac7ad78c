"""Flags of ``segrlhf reward``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

from ..errors import UserError
from ..models.reward_model import check_threshold


@dataclass
class RewardConfig(TrainingArguments):
    """Arguments of ``segrlhf reward``: transformers' TrainingArguments and these.

    ``label_smoothing_factor`` is the label smoothing of the Bradley-Terry loss.
    """

    granularity: Literal["segment", "token", "bandit"] = field(
        default="segment", metadata={"help": "What gets one reward."}
    )
    entropy_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Segments only: a token whose entropy exceeds this many nats starts a segment."
        },
    )
    entropy_model: str | None = field(
        default=None,
        metadata={"help": "Frozen LM that gives the entropies; default: the model itself."},
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens of prompt and response."})
    max_prompt_length: int = field(
        default=1728, metadata={"help": "Rows with a longer prompt are dropped and counted."}
    )
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of mean[(score_chosen + score_rejected)^2]."}
    )
    score_reduction: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "How segment rewards make the score of a response."}
    )
    entropy_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where entropies are kept; default ~/.cache/segrlhf/entropy."},
    )
    entropy_batch_size: int = field(
        default=16, metadata={"help": "Responses in one forward of the entropy model."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter of a reward model is used."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: pairs are no arguments of the model."}
    )

    def __post_init__(self) -> None:
        # Else the processes of torchrun would each train alone, into the same directory.
        if not torch.accelerator.is_available():
            self.use_cpu = True
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
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise UserError(
                "train_sampling_strategy: expected random or sequential, got "
                f"{self.train_sampling_strategy}; pairs have no single length to group by"
            )
