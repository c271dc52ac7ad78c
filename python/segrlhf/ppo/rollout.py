"""Responses sampled from a policy, each row from its own stream of random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..data.batch import pad_left, pad_responses
from ..data.render import pad_token_id
from ..errors import NonFiniteError, UserError


@dataclass(frozen=True)
class Rollout:
    """B rows, repacked: each response follows its prompt, padding stands last.

    ``action_mask`` marks the response tokens, EOS included. ``terminated`` is False for a response
    that the length limit cut before its EOS.
    """

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64
    action_mask: Tensor  # [B, T] bool
    terminated: Tensor  # [B] bool

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row, on the host: cutting rows out must not wait for the device."""
        return self.attention_mask.sum(1).tolist()

    def rows(self, part: slice) -> Rollout:
        """Some of the rows, no wider than the longest of them."""
        width = max(self.lengths[part])
        return Rollout(
            self.input_ids[part, :width],
            self.attention_mask[part, :width],
            self.action_mask[part, :width],
            self.terminated[part],
        )

    def responses(self) -> list[list[int]]:
        """Token ids of the responses, EOS included where there is one."""
        pairs = zip(self.input_ids.cpu(), self.action_mask.cpu(), strict=True)
        return [ids[mask].tolist() for ids, mask in pairs]


class RowSampler(LogitsProcessor):
    """Inverse-CDF sampling of softmax(logits / temperature) with one given uniform a row and step.

    A row's token depends on its own logits and uniform only, so neither the batch nor the number of
    processes matters, and there is no generator state to save. A token of probability 0 is never
    taken: u < 1 lies strictly below the total, and the first CDF value above it is a rise.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int, temperature: float) -> None:
        self.uniforms = uniforms  # [B, steps] fp64 in [0, 1)
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.broken = torch.zeros(len(uniforms), dtype=torch.bool, device=uniforms.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        u = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None]
        cdf = (scores / self.temperature).double().softmax(-1).cumsum(-1)  # [B, V]
        self.broken |= ~cdf[:, -1].isfinite()
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=cdf.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def seed_from(*parts: object) -> int:
    """A seed from several numbers or names; neighbours give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def prompt_of(row: int, n_prompts: int, seed: int) -> int:
    """Index of the prompt of a run's row-th response: each once an epoch, in a new order."""
    epoch, place = divmod(row, n_prompts)
    return _epoch_order(n_prompts, seed, epoch)[place]


@lru_cache(maxsize=2)
def _epoch_order(n_prompts: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed_from(seed, "epoch", epoch))
    return torch.randperm(n_prompts, generator=generator).tolist()


def row_uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """``[B, steps]`` fp64 uniforms in [0, 1), row b from a generator seeded with ``seeds[b]``."""
    streams = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.rand(steps, dtype=torch.float64, generator=g) for g in streams])


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a response: the tokenizer's EOS and those of the generation config."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    found = listed if isinstance(listed, list) else [listed]
    return sorted({i for i in (*found, tokenizer.eos_token_id) if i is not None})


def distinct_bigrams(responses: Sequence[Sequence[int]]) -> float:
    """Different pairs of neighbouring tokens over all such pairs, of all responses together."""
    pairs = [pair for ids in responses for pair in pairwise(ids)]
    return len(set(pairs)) / max(len(pairs), 1)


@contextmanager
def _own_rules_only(model: Any) -> Iterator[None]:
    """Hides the checkpoint's generation config, whose unset values would fill in ours.

    Repetition penalties, top-k and suppressed tokens there would make the sampled distribution
    another one than the policy's, and every log-probability ratio of PPO wrong.
    """
    kept, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = kept
        model.train(training)


@torch.no_grad()
def generate(
    policy: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seeds: Sequence[int],
    temperature: float = 1.0,
    batch_size: int = 64,
    end_token_ids: Sequence[int] | None = None,
) -> Rollout:
    """Samples one response per prompt from softmax(logits / temperature).

    ``prompt_ids``: B non-empty lists of token ids; ``seeds``: B integers. A row's response is a
    function of its prompt, its seed and ``max_new_tokens`` (up to the rounding of the model's
    matrix products, which may depend on the batch). ``batch_size`` rows are generated at a time,
    longest prompts first. Responses end with the first of ``end_token_ids`` (default: ``eos_ids``),
    or at ``max_new_tokens`` with ``terminated`` False.

    Raises UserError for empty prompts and for rows longer than the model's context, NonFiniteError
    naming the rows whose logits were NaN or infinite.
    """
    _check_prompts(policy, prompt_ids, max_new_tokens)
    if not temperature > 0:
        raise UserError(f"temperature: expected a positive number, got {temperature}")
    ends = eos_ids(policy, tokenizer) if end_token_ids is None else list(end_token_ids)
    pad = pad_token_id(tokenizer)
    rules = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # RowSampler leaves one token to choose
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
    )
    uniforms = row_uniforms(seeds, max_new_tokens).to(policy.device)
    responses: dict[int, list[int]] = {}
    broken: list[int] = []
    order = sorted(range(len(prompt_ids)), key=lambda row: -len(prompt_ids[row]))
    with _own_rules_only(policy):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, attention = pad_left(
                [prompt_ids[row] for row in rows], policy.device, pad_token_id=pad
            )
            width = ids.shape[1]
            sampler = RowSampler(uniforms[rows], width, temperature)
            out = policy.generate(
                input_ids=ids,
                attention_mask=attention,
                generation_config=rules,
                logits_processor=LogitsProcessorList([sampler]),
            )[:, width:].cpu()
            broken += [rows[i] for i in sampler.broken.nonzero().flatten().tolist()]
            is_end = torch.isin(out, torch.tensor(ends))
            kept = is_end.cumsum(1) - is_end.long() == 0
            responses.update({row: out[i][kept[i]].tolist() for i, row in enumerate(rows)})
    if broken:
        raise NonFiniteError(
            f"generate: expected finite logits, got NaN or infinity in rows {sorted(broken)[:8]} "
            f"of {len(prompt_ids)}; the policy's weights or its precision are broken"
        )
    ordered = [responses[row] for row in range(len(order))]
    terminated = torch.tensor([ids[-1] in ends for ids in ordered], device=policy.device)
    return Rollout(*pad_responses(prompt_ids, ordered, policy.device, pad_token_id=pad), terminated)


def _check_prompts(policy: Any, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    empty = [row for row, ids in enumerate(prompt_ids) if len(ids) == 0]
    if empty:
        raise UserError(
            f"prompt_ids: expected at least one token a prompt, got none in rows {empty[:8]}; "
            "drop empty prompts, or use a tokenizer that adds BOS"
        )
    limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompt_ids), default=0) + max_new_tokens
    if limit is not None and longest > limit:
        raise UserError(
            f"response_length: expected prompt and response within the model's {limit} positions, "
            f"got {longest - max_new_tokens} + {max_new_tokens}; lower max_prompt_length or "
            "response_length"
        )
