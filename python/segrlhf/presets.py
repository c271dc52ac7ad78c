"""The systems of arXiv 2501.02790 as presets: three backbones, each at several granularities.

A preset is a set of flags, as if they stood at the front of the command line: a config file and
flags win over it. Values: the paper's appendix on implementation details, its table of normaliser
coefficients, and the scripts that its authors published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from segkernels import LocationNormalizer, ScalarNormalizer

from .configs import Missing
from .errors import UserError

PREFERENCE_DATA = "hendrydong/preference_700K"
PROMPT_DATA = "argilla/ultrafeedback-binarized-preferences-cleaned"
BATCH = 128  # pairs in a step of a reward model; responses in a step of PPO
SCHEDULE = {
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 0.03,
}

Flags = dict[str, Any]


@dataclass(frozen=True)
class Backbone:
    """A language model, and what all runs on it share."""

    model: str
    episodes: int  # passes of PPO over the prompts
    pairs_per_device: int  # in one forward of the reward model; changes memory, not results
    train_rows: int  # a device's, in one forward of PPO's optimisation
    rollout_rows: int  # a device's, in one batch of generation
    strip_system_header: bool = False  # of the preference pairs


@dataclass(frozen=True)
class Policy:
    """A published policy and its results, judged by GPT-4o."""

    name: str
    alpaca_eval: float  # AlpacaEval 2, length-controlled win rate in %
    arena_hard: float  # win rate in %
    mt_bench: float  # out of 10


@dataclass(frozen=True)
class System:
    """A reward model, the normaliser of its rewards, and the policy that PPO made with them."""

    backbone: Backbone
    granularity: str
    normalizer: LocationNormalizer | ScalarNormalizer
    reward_model: str | None  # hub name; None: none was published
    policy: Policy | None = None
    threshold: float | None = None  # nats
    ppo: Flags = field(default_factory=dict)  # what this run has besides


def _line(w_m: float, w_s: float, b_m: float, b_s: float) -> LocationNormalizer:
    """mean(p) = w_m ln p + b_m, std(p) = w_s ln p + b_s; in the order of the paper's table."""
    return LocationNormalizer(mean_slope=w_m, mean_intercept=b_m, std_slope=w_s, std_intercept=b_s)


_PHI3 = Backbone("microsoft/Phi-3-mini-4k-instruct", 2, 8, train_rows=4, rollout_rows=16)
_LLAMA3 = Backbone("RLHFlow/LLaMA3-SFT-v2", 1, 4, train_rows=2, rollout_rows=4)
_LLAMA31 = Backbone(
    "meta-llama/Llama-3.1-8B-Instruct",
    1,
    4,
    train_rows=2,
    rollout_rows=4,
    strip_system_header=True,
)

SYSTEMS = {
    "phi3-mini-segment": System(
        _PHI3,
        "segment",
        _line(0.7668, 0.2569, 0.4705, 2.8339),
        "yyqoni/Phi-3-mini-4k-instruct-segment-rm-700k",
        Policy("yyqoni/Phi-3-mini-4k-segment-ppo-60k", 31.05, 34.0, 7.65),
        threshold=1.75,
    ),
    "phi3-mini-segment-2.0": System(
        _PHI3,
        "segment",
        _line(0.7209, 0.2330, 0.6055, 2.6555),
        None,
        threshold=2.0,
    ),
    "phi3-mini-token": System(
        _PHI3,
        "token",
        _line(0.9628, 0.3796, 1.2917, 3.5006),
        "yyqoni/Phi-3-mini-4k-instruct-token-rm-700k",
        Policy("yyqoni/Phi-3-mini-4k-token-ppo-60k", 27.82, 27.2, 7.58),
    ),
    "phi3-mini-bandit": System(
        _PHI3,
        "bandit",
        ScalarNormalizer(-0.5195, 2.1563),
        "yyqoni/Phi-3-mini-4k-instruct-bandit-rm-700k",
        Policy("yyqoni/Phi-3-mini-4k-bandit-ppo-60k", 27.05, 31.3, 7.46),
    ),
    "llama3-8b-sft-segment": System(
        _LLAMA3,
        "segment",
        _line(0.8967, 0.5680, 0.8572, 4.1667),
        "yyqoni/rlhflow-llama-3-sft-8b-v2-segment-rm-700k",
        Policy("yyqoni/rlhflow-llama-3-sft-8b-v2-segment-ppo-60k", 25.11, 30.4, 7.15),
        threshold=2.0,
    ),
    "llama3-8b-sft-token": System(
        _LLAMA3,
        "token",
        _line(1.7340, 0.9906, 1.3212, 5.4513),
        "yyqoni/rlhflow-llama-3-sft-8b-v2-token-rm-700k",
        Policy("yyqoni/rlhflow-llama-3-sft-8b-v2-token-ppo-60k", 23.84, 26.0, 7.13),
        ppo={"reward_reduction": "token-mean"},
    ),
    "llama3-8b-sft-bandit": System(
        _LLAMA3,
        "bandit",
        ScalarNormalizer(-0.8164, 2.9531),
        "yyqoni/rlhflow-llama-3-sft-8b-v2-bandit-rm-700k",
        Policy("yyqoni/rlhflow-llama-3-sft-8b-v2-bandit-ppo-60k", 21.20, 18.7, 7.11),
    ),
    "llama3.1-8b-segment": System(
        _LLAMA31,
        "segment",
        _line(0.8345, 0.4780, 0.8798, 3.7358),
        "yyqoni/meta-llama-3.1-instruct-8b-segment-rm-700k",
        Policy("yyqoni/meta-llama-3.1-instruct-8b-segment-ppo-60k", 40.97, 49.7, 8.03),
        threshold=2.0,
        ppo={"overlong_tokens": 800, "overlong_reward": -0.05},
    ),
    "llama3.1-8b-token": System(
        _LLAMA31,
        "token",
        _line(1.6268, 0.6254, 0.6419, 4.9217),
        "yyqoni/meta-llama-3.1-instruct-8b-token-rm-700k",
        Policy("yyqoni/meta-llama-3.1-instruct-8b-token-ppo-60k", 45.81, 49.3, 7.93),
    ),
    "llama3.1-8b-bandit": System(
        _LLAMA31,
        "bandit",
        ScalarNormalizer(-0.8281, 2.9375),
        "yyqoni/meta-llama-3.1-instruct-8b-bandit-rm-700k",
        Policy("yyqoni/meta-llama-3.1-instruct-8b-bandit-ppo-60k", 40.77, 36.6, 7.76),
    ),
}


def preset(name: str, command: str, given: Mapping[str, Any], world_size: int = 1) -> Flags:
    """Flags of preset ``name`` for ``command``, for ``world_size`` processes.

    ``given`` holds the flags that win over it: the accumulation of gradients keeps the published
    batch for the rows a device that they name. A value may be ``Missing``. Raises UserError for an
    unknown preset, for a command that presets say nothing about, and for a batch that cannot be
    divided.
    """
    if name not in SYSTEMS:
        raise UserError(f"preset: expected one of {', '.join(SYSTEMS)}, got {name!r}")
    system = SYSTEMS[name]
    if command == "segment":
        return {**_language_model(system), **_pairs(system)}
    if command == "reward":
        return _reward(system, given, world_size)
    if command == "ppo":
        return _ppo(system, _reward_model(name, system))
    if command == "score":
        return _scored(system, _reward_model(name, system))
    if command == "fit-normalizer":
        return _fit(name, system)
    raise UserError(f"preset: expected a command that presets configure, got {command!r}")


def _language_model(system: System) -> Flags:
    return {"model_name_or_path": system.backbone.model, "dataset_name": PREFERENCE_DATA}


def _pairs(system: System) -> Flags:
    return {
        "max_length": 2048,
        "max_prompt_length": 1728,
        "truncation_side": "left",
        "force_eos": True,
        "strip_system_header": system.backbone.strip_system_header,
    }


def _scored(system: System, reward_model: str | Missing) -> Flags:
    flags: Flags = {
        **_pairs(system),
        "reward_model": reward_model,
        "granularity": system.granularity,
    }
    if system.threshold is not None:
        flags["entropy_threshold"] = system.threshold
        flags["entropy_model"] = system.backbone.model
    return flags


def _fit(name: str, system: System) -> Flags:
    reward_model = _reward_model(name, system)
    if not isinstance(reward_model, Missing):
        reward_model = Missing(
            "the directory of a reward model, where its normaliser is written",
            f"bring one there with 'hf download {reward_model} --local-dir rm' and pass "
            "--reward_model rm",
        )
    return {
        **_scored(system, reward_model),
        "dataset_name": PREFERENCE_DATA,
        "max_pairs": 60_000,
        "kind": system.normalizer.type,
    }


def _reward(system: System, given: Mapping[str, Any], world_size: int) -> Flags:
    flags: Flags = {
        **_language_model(system),
        **_pairs(system),
        "granularity": system.granularity,
        "score_reduction": "mean",
        "num_train_epochs": 1,
        "learning_rate": 1e-6,
        **SCHEDULE,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "activation_checkpointing": True,
        "bf16": True,
    }
    if system.threshold is not None:
        flags["entropy_threshold"] = system.threshold
    if "gradient_accumulation_steps" not in given:
        flags |= _steps_of_a_batch(system, given, world_size)
    return flags


def _steps_of_a_batch(system: System, given: Mapping[str, Any], world_size: int) -> Flags:
    rows = given.get("per_device_train_batch_size")
    if rows is None:
        rows = system.backbone.pairs_per_device
        if BATCH % (rows * world_size):
            rows = 1
    if rows < 1:
        return {}  # the flag's own range refuses it
    if BATCH % (rows * world_size):
        raise UserError(
            f"per_device_train_batch_size: expected a number that, times {world_size} processes, "
            f"divides the published batch of {BATCH} pairs, got {rows}; run another number of "
            "processes, or choose a batch of your own with --gradient_accumulation_steps"
        )
    return {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": BATCH // (rows * world_size),
    }


def _reward_model(name: str, system: System) -> str | Missing:
    return system.reward_model or Missing(
        f"a reward model trained at threshold {system.threshold} (none was published)",
        f"train one with 'segrlhf reward --preset {name}' and pass --reward_model",
    )


def _ppo(system: System, reward_model: str | Missing) -> Flags:
    backbone, bandit = system.backbone, system.granularity == "bandit"
    flags: Flags = {
        "model_name_or_path": backbone.model,
        "dataset_name": PROMPT_DATA,
        "reward_model": reward_model,
        "reward_granularity": system.granularity,
        "num_episodes": backbone.episodes,
        "response_length": 1024,
        "max_prompt_length": 1024,
        "truncation_side": "left",
        "rollout_batch_size": 1024,
        "generation_batch_size": backbone.rollout_rows,
        "mini_batch_size": BATCH,
        "per_device_train_batch_size": backbone.train_rows,
        "num_ppo_epochs": 1,
        "learning_rate": 5e-7,
        "value_learning_rate": 9e-6,
        **SCHEDULE,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "kl_coef": 0.01,
        "gamma": 1.0,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2 if bandit else 0.25,
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "whiten_advantages": True,
        "loss_aggregation": "seq-mean-token-mean",
        "reward_reduction": "sum",
        "reward_spread": "last" if bandit else "even",
        "value_model": "policy",
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        **system.ppo,
    }
    if system.threshold is not None:
        flags["reward_threshold"] = system.threshold
    if system.reward_model is not None:  # else the numbers belong to no reward model that one has
        flags |= _normalizer(system.normalizer)
    return flags


def _normalizer(normalizer: LocationNormalizer | ScalarNormalizer) -> Flags:
    """Flags of ``segrlhf ppo``, whose numbers stand in the order of ``to_dict``."""
    numbers = normalizer.to_dict()
    if isinstance(normalizer, ScalarNormalizer):
        names = ["mean", "std"]
    else:
        names = ["mean_slope", "mean_intercept", "std_slope", "std_intercept"]
    return {
        "normalizer": normalizer.type,
        f"normalizer_{normalizer.type}": [numbers[name] for name in names],
    }
