"""Evaluation of a policy while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from segkernels import segment_scores

from .rollout import distinct_bigrams, seed_from
from .worker import RolloutWorker

Judge = Callable[[list[str], list[str]], list[float]]  # (responses, prompts) -> gold rewards


def evaluate(worker: RolloutWorker, prompts: Any, judge: Judge | None = None) -> dict[str, float]:
    """One response per prompt, with the same random numbers every time; means over all prompts.

    The processes share the prompts, and each gets the same numbers.
    """
    accelerator, seed = worker.accelerator, worker.config.seed
    mine = list(range(accelerator.process_index, len(prompts), accelerator.num_processes))
    found: list[tuple[int, list[int], float, int, float]] = []
    if mine:
        rollout = worker.generate(
            [prompts[i]["prompt_ids"] for i in mine], [seed_from(seed, "eval", i) for i in mine]
        )
        scores, mask = worker.score(rollout), rollout.action_mask
        ends = worker.segment_ends(rollout, scores)
        kl = (scores.logprobs - scores.ref_logprobs).masked_fill(~mask, 0.0).sum(1)
        columns = kl, ends.sum(1), segment_scores(scores.rewards, ends, mask)
        found = list(zip(mine, rollout.responses(), *(x.tolist() for x in columns), strict=True))
    rows, responses, *sums = zip(*sorted(gather_object(found)), strict=True)
    mean_kl, segments, mean_score = (sum(x) / len(rows) for x in sums)
    metrics = {
        "eval/kl": mean_kl,
        "eval/segments_per_response": segments,
        "eval/scores": mean_score,
        "eval/distinct_bigrams": distinct_bigrams(responses),
        "eval/response_length": sum(map(len, responses)) / len(rows),
    }
    if judge is not None:
        gold = [0.0]
        if accelerator.is_main_process:
            texts = worker.tokenizer.batch_decode(responses, skip_special_tokens=True)
            rewards = judge(texts, [prompts[i]["prompt"] for i in rows])
            gold = [sum(rewards) / len(rewards)]
        metrics["eval/gold"] = broadcast_object_list(gold)[0]
    return metrics
