"""The peers' own functions, from their packages, under the names that the cases use.

Each function below gives {name: function, or Missing with the reason}. Nothing is re-implemented: a
peer that is not installed, or does not run on this device, says so and has no number.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import Missing

Found = dict[str, Callable[..., Any] | Missing]


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
        lines = str(error).strip().splitlines() or [""]
        return Missing(f"does not import: {type(error).__name__}: {lines[0][:120]}")
    finally:
        logging.disable(logging.NOTSET)


def _with(form: Callable[..., Any], *needed: Any) -> Callable[..., Any] | Missing:
    """``form`` over the peer's functions, or the reason why one of them is missing."""
    return next((each for each in needed if isinstance(each, Missing)), form)


def entropy() -> Found:
    trl = _from("trl.trainer.utils", "entropy_from_logits")
    verl = _from("verl.utils.torch_functional", "entropy_from_logits")
    return {
        "TRL": _with(lambda logits: {"entropy": trl(logits)}, trl),
        "verl": _with(lambda logits: {"entropy": verl(logits)}, verl),
    }


def logprobs_and_entropy() -> Found:
    trl = _from("trl.trainer.utils", "selective_log_softmax_and_entropy")
    verl_logprobs = _from("verl.utils.torch_functional", "logprobs_from_logits")
    verl_entropy = _from("verl.utils.torch_functional", "entropy_from_logits")

    def run_trl(logits, targets):
        logprobs, entropy = trl(logits, targets)
        return {"logprobs": logprobs, "entropy": entropy}

    def run_verl(logits, targets):
        # In place by default where flash-attn is installed, which would destroy shared inputs.
        logprobs = verl_logprobs(logits, targets, inplace_backward=False)
        return {"logprobs": logprobs, "entropy": verl_entropy(logits)}

    return {"TRL": _with(run_trl, trl), "verl": _with(run_verl, verl_logprobs, verl_entropy)}


def linear_logprobs_and_entropy(device: torch.device) -> Found:
    """Those that say "log-prob alone" compute no entropy, and are held to that half alone."""
    cuda = device.type == "cuda"
    trl = _from("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    verl = _from("verl.utils.experimental.torch_functional", "FusedLinearForPPO")
    verl_kernel = _from("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    liger = _from("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
    cce = _from("cut_cross_entropy", "linear_cross_entropy")
    quack = _from("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    torch_fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)

    def run_trl(hidden, weight, targets):
        out = trl.apply(hidden, weight, None, targets, 1.0, 16384, None, 1.0, ("entropy",))
        return {"logprobs": out[0], "entropy": out[1]}

    def run_verl(hidden, weight, targets):
        logprobs, entropy = verl()(hidden, weight, targets)
        return {"logprobs": logprobs, "entropy": entropy}

    def run_verl_kernel(hidden, weight, targets):
        logprobs, entropy = verl_kernel(hidden, weight, targets)
        return {"logprobs": logprobs, "entropy": entropy}

    def run_liger(hidden, weight, targets):
        nll, entropy = liger.apply(hidden, weight, targets, 1.0, -100, 1, True)
        return {"logprobs": -nll, "entropy": entropy}

    def run_cce(hidden, weight, targets):
        impl = "cce" if cuda else "torch_compile"
        return {"logprobs": -cce(hidden, weight, targets, reduction="none", impl=impl)}

    def run_quack(hidden, weight, targets):
        return {"nll": quack(hidden, weight, targets, reduction="mean")}

    def run_torch(hidden, weight, targets):
        return {"nll": torch_fused(hidden, weight, targets, options=options())}

    found = {
        "TRL": _with(run_trl, trl),
        "verl": _with(run_verl, verl),
        "Liger": _with(run_liger, liger),
        "CCE, log-prob alone": _with(run_cce, cce),
        "F.linear_cross_entropy, log-prob alone": run_torch
        if torch_fused and options
        else Missing(f"torch {torch.__version__} has none"),
    }
    if cuda:
        found["verl's kernel"] = _with(run_verl_kernel, verl_kernel)
        found["QuACK, log-prob alone"] = _with(run_quack, quack)
    return found


def linear_policy_loss() -> Found:
    liger = _from("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")

    def run_liger(hidden, weight, targets, old_logprobs, advantages, mask):
        # One advantage per row is all that it takes; the inputs of the case have one per row.
        loss = liger(beta=0.0, use_ref_model=False, loss_type="dapo")
        out, _ = loss(
            hidden,
            weight,
            targets,
            mask.float(),
            advantages[:, 0],
            old_per_token_logps=old_logprobs,
        )
        return {"loss": out}

    return {"Liger": _with(run_liger, liger)}


def gae() -> Found:
    """verl's GAE whitens its advantages within; its returns are those of plain GAE."""
    verl = _from("verl.trainer.ppo.core_algos", "compute_gae_advantage_return")

    def run_verl(rewards, values, mask):
        keep = mask.to(rewards.dtype)
        _, returns = verl(rewards, values, keep, 1.0, 0.95)
        return {"returns": returns * keep}

    return {"verl": _with(run_verl, verl)}


def whiten() -> Found:
    verl = _from("verl.utils.torch_functional", "masked_whiten")
    return {"verl": _with(lambda x, mask: {"white": verl(x, mask) * mask}, verl)}


def policy_loss() -> Found:
    verl = _from("verl.trainer.ppo.core_algos", "compute_policy_loss")

    def run_verl(logprobs, old_logprobs, advantages, mask):
        # clip_ratio_c beyond every ratio: dual clipping, which the plain loss has not, stays out.
        out = verl(
            old_logprobs, logprobs, advantages, mask.float(), cliprange=0.2, clip_ratio_c=1e9
        )
        return {"loss": out[0]}

    return {"verl": _with(run_verl, verl)}


def value_loss() -> Found:
    verl = _from("verl.trainer.ppo.core_algos", "compute_value_loss")

    def run_verl(values, old_values, returns, mask):
        return {"loss": verl(values, returns, old_values, mask.float(), cliprange_value=0.2)[0]}

    return {"verl": _with(run_verl, verl)}
