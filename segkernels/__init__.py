"""Kernels for segment-level RLHF: entropy segments, their rewards, advantages and losses.

The method is that of arXiv 2501.02790. Every op works on padded grids and on packed streams, reads
action tokens only, and takes ``backend=``; ``segkernels.backend.explain()`` tells what would run.
"""

from . import backend
from .advantages import segment_advantages, segment_ends_and_advantages
from .bradley_terry import BradleyTerry, segment_bradley_terry, segment_scores
from .gae import gae
from .linear import linear_logprobs_and_entropy
from .linear_policy import linear_policy_loss
from .normalizer import LocationNormalizer, Normalizer, ScalarNormalizer, TableNormalizer
from .normalizer_fit import LocationFit, fit_location
from .ppo_loss import PolicyLoss, policy_loss, value_loss
from .rewards import scatter_segment_rewards
from .running_normalizer import RunningLocationNormalizer, normalizer_from_dict
from .segments import segment_ends, segment_offsets, segment_positions
from .token_stats import entropy_from_logits, logprobs_and_entropy
from .vocab_parallel import (
    merge_vocab_stats,
    vocab_parallel_logprobs_and_entropy,
    vocab_shard_stats,
)
from .whiten import whiten

__all__ = [
    "BradleyTerry",
    "LocationFit",
    "LocationNormalizer",
    "Normalizer",
    "PolicyLoss",
    "RunningLocationNormalizer",
    "ScalarNormalizer",
    "TableNormalizer",
    "backend",
    "entropy_from_logits",
    "fit_location",
    "gae",
    "linear_logprobs_and_entropy",
    "linear_policy_loss",
    "logprobs_and_entropy",
    "merge_vocab_stats",
    "normalizer_from_dict",
    "policy_loss",
    "scatter_segment_rewards",
    "segment_advantages",
    "segment_bradley_terry",
    "segment_ends",
    "segment_ends_and_advantages",
    "segment_offsets",
    "segment_positions",
    "segment_scores",
    "value_loss",
    "vocab_parallel_logprobs_and_entropy",
    "vocab_shard_stats",
    "whiten",
]
