"""accelerate's set-up of a PPO run, and what PPO does not run on."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType

from ..errors import UserError
from .config import PPOConfig


def make_accelerator(config: PPOConfig) -> Accelerator:
    """UserError for trackers that are not installed, for sharded models, and for minibatches that
    the processes cannot share."""
    asked = [name for name in config.report_to if name != "none"]
    missing = sorted(set(asked) - {tracker.value for tracker in get_available_trackers()})
    if missing:
        raise UserError(
            f"report_to: expected none or trackers that are installed, got {', '.join(missing)}; "
            "pip install it, or choose another of accelerate's"
        )
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=config.use_cpu,
        log_with=asked or None,
        project_dir=config.output_dir,
    )
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate: expected one process or data-parallel processes for PPO, got {kind}; "
            "launch with torchrun or accelerate launch --multi_gpu"
        )
    if config.mini_batch_size % processes:
        raise UserError(
            f"mini_batch_size: expected a multiple of the {processes} processes, got "
            f"{config.mini_batch_size}"
        )
    return accelerator


def check_prompts(config: PPOConfig, train_prompts: Any, eval_prompts: Any) -> None:
    """UserError for no prompts, and for evaluations without prompts of their own."""
    if config.eval_steps and not eval_prompts:
        raise UserError(
            f"eval_steps: expected prompts to evaluate on, got none with --eval_steps "
            f"{config.eval_steps}; hold some out with --eval_size 0.05, or give the dataset a test "
            "split"
        )
    if len(train_prompts) == 0:
        raise UserError("prompts: expected at least one, got none; check the dataset")
