"""The peers' own functions, from their packages, under the names that the cases use.

Each function below gives the peers of one op as contenders, imported when their turn comes.
Nothing is re-implemented: a peer that is not installed, or does not run on this device, says so and
has no number.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

import eager
import torch
from cases import Contender, Later, Missing
from goals import LIGER


def _from(module: str, name: str) -> Any:
    """An attribute of a peer's module, or Missing.

    Whatever an import raises is the reason: some peers fail with errors of their own where a GPU
    or one of their dependencies is absent.
    """
    logging.disable(logging.WARNING)  # peers announce what they lack; the reason below is enough
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(module), name)
    except Exception as error:
        package = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(package):
            return Missing("not installed")
        if isinstance(error, AttributeError) and error.name == name:
            return Missing(f"this version has no {name}")
        lines = str(error).strip().splitlines() or [""]
        return Missing(f"does not import: {type(error).__name__}: {lines[0][:120]}")
    finally:
        logging.disable(logging.NOTSET)


def _peer(name: str, form: Callable[..., Any], *needed: str, partial: bool = False) -> Contender:
    """``form``, whose first arguments are what ``needed`` names: "module:attribute" each."""

    def load():
        functions = [_from(*each.split(":")) for each in needed]
        missing = next((each for each in functions if isinstance(each, Missing)), None)
        return missing or functools.partial(form, *functions)

    return Contender(name, Later(load), partial=partial)


TRL = "trl.trainer.utils:"
VERL = "verl.utils.torch_functional:"
VERL_PPO = "verl.trainer.ppo.core_algos:"


def entropy() -> list[Contender]:
    def run(entropy, logits):
        return {"entropy": entropy(logits)}

    return [
        _peer("TRL", run, f"{TRL}entropy_from_logits"),
        _peer("verl", run, f"{VERL}entropy_from_logits"),
    ]


def logprobs_and_entropy() -> list[Contender]:
    def run_trl(both, logits, targets):
        logprobs, entropy = both(logits, targets)
        return {"logprobs": logprobs, "entropy": entropy}

    def run_verl(logprobs, entropy, logits, targets):
        # In place by default where flash-attn is installed, which would destroy shared inputs.
        logprobs = logprobs(logits, targets, inplace_backward=False)
        return {"logprobs": logprobs, "entropy": entropy(logits)}

    return [
        _peer("TRL", run_trl, f"{TRL}selective_log_softmax_and_entropy"),
        _peer("verl", run_verl, f"{VERL}logprobs_from_logits", f"{VERL}entropy_from_logits"),
    ]


def linear_logprobs_and_entropy(device: torch.device) -> list[Contender]:
    """Those that say "log-prob alone" compute no entropy, and are held to that half alone."""
    cuda = device.type == "cuda"

    def run_trl(function, hidden, weight, targets):
        out = function.apply(hidden, weight, None, targets, 1.0, 16384, None, 1.0, ("entropy",))
        return {"logprobs": out[0], "entropy": out[1]}

    def run_verl(module, hidden, weight, targets):
        logprobs, entropy = module()(hidden, weight, targets)
        return {"logprobs": logprobs, "entropy": entropy}

    def run_verl_kernel(function, hidden, weight, targets):
        logprobs, entropy = function(hidden, weight, targets)
        return {"logprobs": logprobs, "entropy": entropy}

    def run_liger(function, hidden, weight, targets):
        nll, entropy = function.apply(hidden, weight, targets, 1.0, -100, 1, True)
        return {"logprobs": -nll, "entropy": entropy}

    def run_cce(function, hidden, weight, targets):
        impl = "cce" if cuda else "torch_compile"
        return {"logprobs": -function(hidden, weight, targets, reduction="none", impl=impl)}

    def run_torch(function, options, hidden, weight, targets):
        return {"nll": function(hidden, weight, targets, options=options())}

    def run_quack(function, hidden, weight, targets):
        return {"nll": function(hidden, weight, targets, reduction="mean")}

    found = [
        _peer("TRL", run_trl, "trl.kernels.chunked_logprob:ChunkedLogProbFunction"),
        _peer("verl", run_verl, "verl.utils.experimental.torch_functional:FusedLinearForPPO"),
        _peer("Liger", run_liger, "liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction"),
        _peer(
            "CCE, log-prob alone",
            run_cce,
            "cut_cross_entropy:linear_cross_entropy",
            partial=True,
        ),
        _peer(
            "F.linear_cross_entropy, log-prob alone",
            run_torch,
            "torch.nn.functional:linear_cross_entropy",
            "torch.nn:LinearCrossEntropyOptions",
            partial=True,
        ),
    ]
    if cuda:
        found += [
            _peer(
                "verl's kernel",
                run_verl_kernel,
                "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
            ),
            _peer(
                "QuACK, log-prob alone",
                run_quack,
                "quack.linear_cross_entropy:chunked_linear_cross_entropy",
                partial=True,
            ),
        ]
    return found


def linear_policy_loss(device: torch.device) -> list[Contender]:
    def run_grpo(loss, hidden, weight, targets, old_logprobs, advantages, mask):
        # One advantage per row is all that it takes; the inputs of the case have one per row.
        out, _ = loss(beta=0.0, use_ref_model=False, loss_type="dapo")(
            hidden,
            weight,
            targets,
            mask.float(),
            advantages[:, 0],
            old_per_token_logps=old_logprobs,
        )
        return {"loss": out}

    def run_sm90(function, hidden, weight, targets, old_logprobs, advantages, mask):
        # It gives log-probabilities and entropy, and leaves what is made of them to plain torch.
        flat = hidden.flatten(0, 1), weight, targets.flatten()
        nll, _ = function.apply(*flat, 1.0, -100, 1, True)
        logprobs = -nll.view(targets.shape)
        return eager.policy_loss(logprobs, old_logprobs, advantages, mask)

    found = [_peer("Liger", run_grpo, "liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss")]
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) == (9, 0):
            form = (
                "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90:"
                "LigerFusedScaledCrossEntropySM90Function"
            )
            found.append(_peer(LIGER, run_sm90, form))
        else:
            found.append(Contender(LIGER, Missing("runs on sm_90 alone")))
    return found


def gae() -> list[Contender]:
    """verl's GAE whitens its advantages within; its returns are those of plain GAE."""

    def run(function, rewards, values, mask):
        keep = mask.to(rewards.dtype)
        _, returns = function(rewards, values, keep, 1.0, 0.95)
        return {"returns": returns * keep}

    return [_peer("verl", run, f"{VERL_PPO}compute_gae_advantage_return")]


def whiten() -> list[Contender]:
    def run(function, x, mask):
        return {"white": function(x, mask) * mask}

    return [_peer("verl", run, f"{VERL}masked_whiten")]


def policy_loss() -> list[Contender]:
    def run(function, logprobs, old_logprobs, advantages, mask):
        # clip_ratio_c beyond every ratio: dual clipping, which the plain loss has not, stays out.
        out = function(
            old_logprobs, logprobs, advantages, mask.float(), cliprange=0.2, clip_ratio_c=1e9
        )
        return {"loss": out[0]}

    return [_peer("verl", run, f"{VERL_PPO}compute_policy_loss")]


def value_loss() -> list[Contender]:
    def run(function, values, old_values, returns, mask):
        return {"loss": function(values, returns, old_values, mask.float(), cliprange_value=0.2)[0]}

    return [_peer("verl", run, f"{VERL_PPO}compute_value_loss")]
