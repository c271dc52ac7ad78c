"""Checkpoints of a PPO run: all that its continuation needs to end with the same weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from segkernels import RunningLocationNormalizer

from ..errors import UserError, reading
from ..models.loading import load_whole
from ..models.reward_model import SegmentRewardModel
from ..runtime import files
from .config import PPOConfig
from .models import PolicyAndValue

# Settings that a run must keep for its continuation to be the run that was cut off.
KEPT = (
    "seed", "rollout_batch_size", "mini_batch_size", "num_ppo_epochs", "response_length",
    "temperature", "normalizer", "reward_credit", "reward_spread", "reward_reduction",
)  # fmt: skip


@dataclass
class TrainingState:
    """What changes from update to update beside weights, Adam's moments and a normaliser."""

    kl_coef: float
    global_step: int = 0  # updates done
    history: list[dict[str, float]] = field(default_factory=list)  # everything logged


def run_identity(config: PPOConfig, prompts: Any) -> dict[str, Any]:
    """``KEPT`` and a hash of the prompts' token ids."""
    ids = json.dumps([list(row["prompt_ids"]) for row in prompts])
    digest = hashlib.blake2b(ids.encode(), digest_size=16).hexdigest()
    return {**{name: getattr(config, name) for name in KEPT}, "prompts": digest}


def write_checkpoint(
    directory: Path,
    module: PolicyAndValue,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    normalizer: Any,
    state: TrainingState,
    identity: dict[str, Any],
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
    kept = {"normalizer": normalizer.state_dict() if running else None, "identity": identity}
    files.write_json(directory / "state.json", {**asdict(state), **kept})


def read_checkpoint(
    path: Path,
    module: PolicyAndValue,
    optimizer: torch.optim.Optimizer,
    normalizer: Any,
    identity: dict[str, Any],
) -> TrainingState:
    """Loads what ``write_checkpoint`` wrote; UserError when it belongs to another run."""
    with reading("resume_from_checkpoint", "a whole checkpoint", path, "resume from an older one"):
        return _read(path, module, optimizer, normalizer, identity)


def _read(
    path: Path,
    module: PolicyAndValue,
    optimizer: torch.optim.Optimizer,
    normalizer: Any,
    identity: dict[str, Any],
) -> TrainingState:
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    changed = [
        f"{k} {v} (now {identity[k]})" for k, v in saved["identity"].items() if v != identity[k]
    ]
    if changed:
        raise UserError(
            f"resume_from_checkpoint: expected the settings of {path}, got another run's: "
            f"{', '.join(changed)}; repeat the first command line, or start in a new output_dir"
        )
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
    return TrainingState(saved["kl_coef"], saved["global_step"], saved["history"])


def drop_old_checkpoints(output_dir: str | Path, limit: int | None) -> None:
    """Removes all but the ``limit`` newest checkpoints; None keeps all."""
    if limit is None:
        return
    steps = {p.name.rpartition("-")[2]: p for p in Path(output_dir).glob("checkpoint-*")}
    numbered = sorted((int(step), path) for step, path in steps.items() if step.isdigit())
    for _, path in numbered[:-limit]:
        shutil.rmtree(path)
