"""The systems of arXiv 2501.02790 as presets: three backbones, three granularities.

A preset is a set of flags, as if they stood at the front of the command line, so a config file and
flags win over it. Values: the paper's appendix on implementation details and its table of
normaliser coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UserError

PREFERENCE_DATA = "hendrydong/preference_700K"
PROMPT_DATA = "argilla/ultrafeedback-binarized-preferences-cleaned"


@dataclass(frozen=True)
class Line:
    """mean(p) = mean_slope ln p + mean_intercept, std(p) likewise."""

    mean_slope: float
    std_slope: float
    mean_intercept: float
    std_intercept: float

    @property
    def flags(self) -> list[float]:
        """In the order of ``--normalizer_line``."""
        return [self.mean_slope, self.mean_intercept, self.std_slope, self.std_intercept]


@dataclass(frozen=True)
class Backbone:
    model: str
    reward_models: dict[str, str]  # hub name by granularity
    threshold: float
    segment: dict[float, Line]  # by threshold
    token: Line
    bandit: tuple[float, float]  # mean, std
    episodes: int
    per_device: int  # pairs in one forward of the reward model
    overlong: dict[str, float]


BACKBONES = {
    "phi3-mini": Backbone(
        model="microsoft/Phi-3-mini-4k-instruct",
        reward_models={
            "segment": "yyqoni/Phi-3-mini-4k-instruct-segment-rm-700k",
            "token": "yyqoni/Phi-3-mini-4k-instruct-token-rm-700k",
            "bandit": "yyqoni/Phi-3-mini-4k-instruct-bandit-rm-700k",
        },
        threshold=1.75,
        segment={
            1.75: Line(0.7668, 0.2569, 0.4705, 2.8339),
            2.0: Line(0.7209, 0.2330, 0.6055, 2.6555),
        },
        token=Line(0.9628, 0.3796, 1.2917, 3.5006),
        bandit=(-0.5195, 2.1563),
        episodes=2,
        per_device=8,
        overlong={},
    ),
    "llama3-8b-sft": Backbone(
        model="RLHFlow/LLaMA3-SFT-v2",
        reward_models={
            "segment": "yyqoni/rlhflow-llama-3-sft-8b-v2-segment-rm-700k",
            "token": "yyqoni/rlhflow-llama-3-sft-8b-v2-token-rm-700k",
            "bandit": "yyqoni/rlhflow-llama-3-sft-8b-v2-bandit-rm-700k",
        },
        threshold=2.0,
        segment={2.0: Line(0.8967, 0.5680, 0.8572, 4.1667)},
        token=Line(1.7340, 0.9906, 1.3212, 5.4513),
        bandit=(-0.8164, 2.9531),
        episodes=1,
        per_device=4,
        overlong={},
    ),
    "llama3.1-8b": Backbone(
        model="meta-llama/Llama-3.1-8B-Instruct",
        reward_models={
            "segment": "yyqoni/meta-llama-3.1-instruct-8b-segment-rm-700k",
            "token": "yyqoni/meta-llama-3-1-instruct-8b-token-rm-700k",
            "bandit": "yyqoni/meta-llama-3-1-instruct-8b-bandit-rm-700k",
        },
        threshold=2.0,
        segment={2.0: Line(0.8345, 0.4780, 0.8798, 3.7358)},
        token=Line(1.6268, 0.6254, 0.6419, 4.9217),
        bandit=(-0.8281, 2.9375),
        episodes=1,
        per_device=4,
        overlong={"overlong_tokens": 800, "overlong_reward": -0.05},
    ),
}

Flags = dict[str, object]


def _reward(backbone: Backbone, granularity: str, threshold: float, world_size: int) -> Flags:
    per_device = backbone.per_device
    if 128 % (per_device * world_size):
        per_device = 1
    if 128 % world_size:
        raise UserError(
            f"preset: expected a number of processes that divides the published batch of 128, got "
            f"{world_size}; pass --per_device_train_batch_size and --gradient_accumulation_steps "
            "with a --config of your own"
        )
    flags: Flags = {
        "model_name_or_path": backbone.model,
        "dataset_name": PREFERENCE_DATA,
        "granularity": granularity,
        "num_train_epochs": 1,
        "learning_rate": 1e-6,
        "warmup_steps": 0.03,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": 128 // (per_device * world_size),
        "max_length": 2048,
        "max_prompt_length": 1728,
        "gradient_checkpointing": True,
        "bf16": True,
    }
    if granularity == "segment":
        flags["entropy_threshold"] = threshold
    return flags


def _ppo(backbone: Backbone, granularity: str, threshold: float) -> Flags:
    flags: Flags = {
        "model_name_or_path": backbone.model,
        "dataset_name": PROMPT_DATA,
        "reward_model": backbone.reward_models[granularity],
        "reward_granularity": granularity,
        "num_episodes": backbone.episodes,
        "response_length": 1024,
        "max_prompt_length": 1024,
        "rollout_batch_size": 1024,
        "mini_batch_size": 128,
        "num_ppo_epochs": 1,
        "learning_rate": 5e-7,
        "value_learning_rate": 9e-6,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "kl_coef": 0.01,
        "gamma": 1.0,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2 if granularity == "bandit" else 0.25,
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "whiten_advantages": True,
        "loss_aggregation": "seq-mean-token-mean",
        "reward_reduction": "sum",
        "reward_spread": "last" if granularity == "bandit" else "even",
        "value_model": "policy",
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        **backbone.overlong,
    }
    if granularity == "bandit":
        flags["normalizer"] = "scalar"
        flags["normalizer_scalar"] = list(backbone.bandit)
    else:
        flags["normalizer"] = "line"
        line = backbone.token if granularity == "token" else backbone.segment[threshold]
        flags["normalizer_line"] = line.flags
        if granularity == "segment":
            flags["reward_threshold"] = threshold
    return flags


def names() -> list[str]:
    """``<backbone>-<granularity>``; a second published threshold of a backbone is a suffix."""
    found = []
    for name, backbone in BACKBONES.items():
        found += [f"{name}-{g}" for g in ("segment", "token", "bandit")]
        found += [f"{name}-segment-{t}" for t in backbone.segment if t != backbone.threshold]
    return found


def preset(name: str, command: str, world_size: int = 1) -> Flags:
    """Flags of preset ``name`` for ``command``, for ``world_size`` processes.

    Raises UserError for an unknown preset and for a command that presets say nothing about.
    """
    if name not in names():
        raise UserError(f"preset: expected one of {', '.join(names())}, got {name!r}")
    prefix = max((b for b in BACKBONES if name.startswith(b + "-")), key=len)
    granularity, _, threshold = name[len(prefix) + 1 :].partition("-")
    backbone = BACKBONES[prefix]
    entropy = float(threshold) if threshold else backbone.threshold
    if command == "reward":
        return _reward(backbone, granularity, entropy, world_size)
    if command == "ppo":
        return _ppo(backbone, granularity, entropy)
    if command == "segment":
        return {"model_name_or_path": backbone.model, "dataset_name": PREFERENCE_DATA}
    raise UserError(f"preset: expected a command that presets configure, got {command!r}")
