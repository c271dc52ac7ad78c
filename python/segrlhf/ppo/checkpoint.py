"""Checkpoints of a PPO run: all that its continuation needs to end with the same weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from segkernels import RunningLocationNormalizer

from ..data.tokenize import tokenizer_key
from ..errors import reading
from ..models.loading import load_whole
from ..models.reward_model import SegmentRewardModel
from ..runtime import files
from ..runtime.identity import Identity, digest, require_files, weights_digest
from .config import PPOConfig
from .models import PolicyAndValue

# What a resumed run may change: how far and how fast it goes, what it costs, writes and shows.
FREE = (
    "kl_coef", "kl_target", "kl_horizon", "learning_rate", "value_learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm",
    "total_episodes", "num_episodes", "generation_batch_size", "per_device_train_batch_size",
    "gradient_checkpointing", "use_cpu", "logging_steps", "eval_steps", "save_steps",
    "save_total_limit", "report_to",
)  # fmt: skip

# Places, of which what is there counts: see ``run_identity``.
PLACES = ("output_dir", "resume_from_checkpoint", "reward_model", "entropy_model", "value_model")


@dataclass
class TrainingState:
    """What changes from update to update beside weights, Adam's moments and a normaliser."""

    kl_coef: float
    global_step: int = 0  # updates done
    history: list[dict[str, float]] = field(default_factory=list)  # everything logged


def run_identity(
    config: PPOConfig,
    prompts: Any,
    tokenizer: Any,
    ref_policy: Any,
    reward_model: SegmentRewardModel,
    entropy_model: Any,
) -> Identity:
    """All settings, and hashes of the prompts' token ids, the tokenizer and the frozen models.

    The value model's start does not count: its weights come from the checkpoint.
    """
    settings = {each.name: getattr(config, each.name) for each in fields(config)}
    normalizer = reward_model.normalizer
    cuts = (
        reward_model.granularity,
        reward_model.entropy_threshold,
        None if normalizer is None else normalizer.to_dict(),
    )
    inputs = {
        "prompts": digest(list(row["prompt_ids"]) for row in prompts),
        "tokenizer": tokenizer_key(tokenizer),
        "policy before training": weights_digest(ref_policy),
        "reward model": weights_digest(reward_model),
        "reward model's segments and normalizer": digest(cuts),
        "entropy model": None if entropy_model is None else weights_digest(entropy_model),
    }
    kept = {name: v for name, v in settings.items() if name not in (*FREE, *PLACES)}
    return Identity(kept | inputs, {name: settings[name] for name in FREE})


def write_checkpoint(
    directory: Path,
    module: PolicyAndValue,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    normalizer: Any,
    state: TrainingState,
    identity: Identity,
) -> None:
    """Writes everything into the empty ``directory``."""
    module.policy.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")
    module.value.save_pretrained(directory / "value")
    moments = {
        f"{name}/{key}": tensor
        for name, parameter in module.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
    }
    save_file(moments, directory / "optimizer.safetensors")
    running = isinstance(normalizer, RunningLocationNormalizer)
    fitted = {"normalizer": normalizer.state_dict() if running else None}
    files.write_json(directory / "state.json", {**asdict(state), **fitted})
    identity.write(directory)


def read_checkpoint(
    path: Path,
    module: PolicyAndValue,
    optimizer: torch.optim.Optimizer,
    normalizer: Any,
    identity: Identity,
) -> tuple[TrainingState, dict[str, tuple[Any, Any]]]:
    """What ``write_checkpoint`` wrote, loaded; and the settings that were changed since.

    Raises UserError for another run's, for a file that is not there, and for weights that are not
    exactly the models'.
    """
    changed = identity.check(path)
    require_files(path, ["state.json", "optimizer.safetensors"])
    with reading("resume_from_checkpoint", "a whole checkpoint", path, "resume from an older one"):
        saved = _load(path, module, optimizer, normalizer)
    # Where it is adaptive beta goes on from where it was, unless another start is asked for.
    kl_coef = identity.free["kl_coef"] if "kl_coef" in changed else saved["kl_coef"]
    return TrainingState(kl_coef, saved["global_step"], saved["history"]), changed


def _load(
    path: Path, module: PolicyAndValue, optimizer: torch.optim.Optimizer, normalizer: Any
) -> dict[str, Any]:
    """Weights, Adam's moments and the normaliser, in place; what else state.json holds."""
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    load_policy = type(module.policy).from_pretrained
    policy = load_whole(load_policy, path / "policy", "checkpoint", dtype=torch.float32)
    value = SegmentRewardModel.from_pretrained(path / "value", dtype=torch.float32)
    module.policy.load_state_dict(policy.state_dict())
    module.value.load_state_dict(value.state_dict())
    parameters = dict(module.named_parameters())
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        name, _, part = key.rpartition("/")
        parameter = parameters[name]
        device = "cpu" if part == "step" else parameter.device
        optimizer.state[parameter][part] = tensor.to(device)
    if saved["normalizer"] is not None:
        normalizer.load_state_dict(saved["normalizer"])
    return saved
