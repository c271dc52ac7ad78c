"""Token statistics and policy loss of a causal LM, straight from its last hidden states."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import segkernels
from segkernels.layout import each, values_may_be_checked

from ..data.batch import Batch, Packing
from .packing import model_inputs

if TYPE_CHECKING:
    from segkernels.ppo_loss import Aggregation


def positions(module: nn.Module, attention_mask: Tensor | None) -> Tensor | None:
    """Position ids ``[B, T]`` counted over tokens, or None where ``module`` takes none."""
    if attention_mask is None or not _takes(module, "position_ids"):
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _takes(module: nn.Module, argument: str) -> bool:
    # Of the class: accelerate puts a wrapper without signature in front of an instance's forward.
    return argument in inspect.signature(type(module).forward).parameters


def token_stats(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each action token under a causal LM.

    logprobs[t] = log p(input_ids[t] | tokens before t), entropy[t] that of the same distribution,
    p = softmax(logits / temperature); both fp32 ``[B, T]``, in nats, 0 where ``action_mask`` (bool
    ``[B, T]``) is False, differentiable. Padding may be on either side. ``model`` may be wrapped by
    peft or for distributed training. Where its logits are exactly lm_head(hidden), which is tried
    out once per model, they are never formed; else (soft caps, logit scales, sharded heads) the
    same numbers come from the logits. Under autocast the head multiplies in autocast's dtype.

    Raises ValueError for an action token with no token before it: nothing predicts it (CPU tensors,
    or SEGKERNELS_DEBUG=1).
    """
    at = token_stats_at(model, input_ids, attention_mask, action_mask, [temperature])
    return at[temperature]


def token_stats_at(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    temperatures: Iterable[float],
) -> dict[float, tuple[Tensor, Tensor]]:
    """``token_stats`` by temperature, all from one pass through the model."""
    states, head = _before_tokens(model, input_ids, attention_mask, action_mask)
    targets, mask = input_ids[:, 1:], action_mask[:, 1:]

    def stats(temperature: float) -> tuple[Any, Tensor]:
        if head is None:
            return segkernels.logprobs_and_entropy(states, targets, temperature, mask)
        return segkernels.linear_logprobs_and_entropy(
            states, head.weight, targets, head.bias, temperature, mask
        )

    at = {}
    for temperature in temperatures:
        logprobs, entropy = each(_first_is_zero, *stats(temperature))
        at[temperature] = logprobs, entropy
    return at


def response_entropy(model: nn.Module, batch: Batch, packing: Packing) -> Tensor:
    """Entropy of the distribution that each response token of a packed batch is drawn from.

    fp32 ``[N]``, in nats, in the order of ``batch.tokens``; the model, its head or logits and
    autocast as in ``token_stats``.
    """
    states, head = _before_responses(model, batch, packing)
    if head is None:
        return segkernels.entropy_from_logits(states)
    return segkernels.linear_logprobs_and_entropy(states, head.weight, bias=head.bias)[1]


def response_states(model: nn.Module, batch: Batch, packing: Packing) -> Tensor:
    """What entropies are computed from, by which packings are compared: hidden states or logits
    before each response token, ``[N, ...]``."""
    return _before_responses(model, batch, packing)[0]


def _before_responses(
    model: nn.Module, batch: Batch, packing: Packing
) -> tuple[Tensor, _Head | None]:
    if values_may_be_checked(batch.before) and bool((batch.before < 0).any()):
        raise ValueError("prompt: expected at least one token in front of a response, got none")
    states, head = _states(model, model_inputs(model, batch, packing))
    return states.flatten(0, 1).index_select(0, batch.before), head


def policy_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    temperature: float = 1.0,
    clip: float = 0.2,
    aggregation: Aggregation = "token-mean",
) -> segkernels.PolicyLoss:
    """``segkernels.linear_policy_loss`` of a causal LM's action tokens.

    ``old_logprobs`` (nats) and ``advantages`` are constants ``[B, T]``; their values outside
    ``action_mask`` are not read. Everything per token is aligned with ``input_ids``; the model, its
    padding, autocast and errors as in ``token_stats``, with the same choice of head or logits.
    """
    states, head = _before_tokens(model, input_ids, attention_mask, action_mask)
    targets, mask, old, advantages = (
        x[:, 1:] for x in (input_ids, action_mask, old_logprobs, advantages)
    )
    if head is None:
        logprobs, entropy = segkernels.logprobs_and_entropy(states, targets, temperature, mask)
        out = segkernels.policy_loss(
            logprobs, old, advantages, mask, entropy=entropy, clip=clip, aggregation=aggregation
        )
    else:
        out = segkernels.linear_policy_loss(
            states,
            head.weight,
            targets,
            old,
            advantages,
            mask,
            bias=head.bias,
            temperature=temperature,
            clip=clip,
            aggregation=aggregation,
        )
    logprobs, entropy = each(_first_is_zero, out.logprobs, out.entropy)
    return out._replace(logprobs=logprobs, entropy=entropy)


def _first_is_zero(stats: Tensor) -> Tensor:
    """``[B, T]`` of ``[B, T - 1]``: no distribution stands before the first token."""
    return nn.functional.pad(stats, (1, 0))


class _Head(NamedTuple):
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


def _before_tokens(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, action_mask: Tensor
) -> tuple[Tensor, _Head | None]:
    """What predicts tokens 1 to T - 1: (hidden states ``[B, T - 1, D]``, the head that reads them),
    or (logits ``[B, T - 1, V]``, None)."""
    if values_may_be_checked(action_mask):
        first = attention_mask.long().cumsum(-1) == 1
        alone = (action_mask & first).nonzero()
        if alone.numel():
            raise ValueError(
                f"action_mask: expected a token before every action token, got none before token "
                f"{int(alone[0, 1])} of row {int(alone[0, 0])}; put a prompt or a BOS token in "
                "front"
            )
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    states, head = _states(model, inputs)
    return states[:, :-1], head


def _states(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, _Head | None]:
    """(Hidden states ``[B, T, D]``, the head that reads them), or (logits ``[B, T, V]``, None)."""
    causal = _unwrapped(model)
    inputs = {**inputs, "use_cache": False}
    if "position_ids" not in inputs:
        position_ids = positions(causal, inputs["attention_mask"])
        inputs |= {} if position_ids is None else {"position_ids": position_ids}
    if not _is_plain(model, causal):
        return model(**inputs).logits, None
    with _last_hidden(causal) as hidden:
        model(**inputs, logits_to_keep=1)
    head = causal.get_output_embeddings()
    device = head.weight.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    return hidden[0].to(dtype), _Head(head.weight.to(dtype), bias)


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    from accelerate.utils import extract_model_from_parallel

    inner: Any = extract_model_from_parallel(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@contextmanager
def _last_hidden(causal: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects what the backbone returns while the block runs."""
    out: list[Tensor] = []
    hook = causal.base_model.register_forward_hook(lambda *call: out.append(call[-1][0]))
    try:
        yield out
    finally:
        hook.remove()


_PLAIN: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _is_plain(model: nn.Module, causal: PreTrainedModel) -> bool:
    """Whether logits are exactly lm_head(hidden), and hidden and weight can be had from outside."""
    from accelerate.utils import is_compiled_module
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    head = causal.get_output_embeddings()
    within_reach = (
        type(head) is nn.Linear
        and not isinstance(model, FullyShardedDataParallel)
        and not isinstance(head.weight, DTensor)
        and not hasattr(head.weight, "ds_id")  # DeepSpeed's mark of a partitioned weight
        and not is_compiled_module(model)  # a compiled module does not see new hooks
        and _takes(causal, "logits_to_keep")
    )
    if within_reach and causal not in _PLAIN:
        _PLAIN[causal] = _head_is_plain(causal)
    return within_reach and _PLAIN[causal]


@torch.no_grad()
def _head_is_plain(causal: PreTrainedModel) -> bool:
    """Runs two tokens and looks at both sides of the head: it must get the backbone's output
    unchanged, and known numbers put in place of its own must come out as the logits."""
    head = causal.get_output_embeddings()
    seen: list[tuple[Tensor, Tensor]] = []

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        known = torch.linspace(-300, 300, output.shape[-1], device=output.device)
        known = known.to(output.dtype).expand_as(output).contiguous()
        seen.append((inputs[0], known))
        return known

    ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    hook = head.register_forward_hook(replace)
    devices = [head.weight.device] if head.weight.device.type == "cuda" else []
    try:
        # Dropout must not draw from the stream that a resumed run would find elsewhere.
        with torch.random.fork_rng(devices), _last_hidden(causal) as hidden:
            logits = causal(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if len(seen) != 1 or len(hidden) != 1:
        return False
    read, known = seen[0]
    return torch.equal(read, hidden[0]) and torch.equal(logits.float(), known.float())
