"""Rows as batches: what stands where, and which tokens read which."""

import itertools

import numpy as np
import pytest
import torch

from segrlhf.data.batch import (
    PACKINGS,
    Example,
    Sizes,
    make_batch,
    make_pair_batch,
    pad_responses,
    pair_example,
    plan_batches,
    responses_of,
    token_budget,
)
from segrlhf.errors import UserError

EXAMPLES = [Example([1, 2], [[3, 4, 5], [6]]), Example([7], [[8], [9, 10]])]
ROWS = {
    "none": [[1, 2, 3, 4, 5], [1, 2, 6, 0, 0], [7, 8, 0, 0, 0], [7, 9, 10, 0, 0]],
    "mask": [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]],
    "varlen": [[1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 7, 9, 10]],
    "flex": [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]],
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_rows_of_each_packing(packing):
    batch = make_batch(EXAMPLES, packing)
    assert batch.input_ids.tolist() == ROWS[packing]
    assert batch.attention_mask.sum() == (batch.input_ids > 0).sum()
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 5, 7]
    flat, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    # All first responses, then all second ones; positions as if each stood alone.
    assert flat[batch.tokens].tolist() == [3, 4, 5, 8, 6, 9, 10]
    assert positions[batch.tokens].tolist() == [2, 3, 4, 1, 2, 1, 2]
    assert flat[batch.before].tolist() == [2, 3, 4, 7, 2, 7, 9]
    assert responses_of(EXAMPLES) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    wider = make_batch(EXAMPLES, packing, pad_token_id=99, pad_to_multiple_of=16)
    assert wider.input_ids.shape[1] == 16
    assert wider.input_ids[0, -1] == 99
    assert wider.input_ids.flatten()[wider.tokens].tolist() == [3, 4, 5, 8, 6, 9, 10]


@pytest.mark.parametrize("packing", ["mask", "flex"])
def test_a_token_reads_its_prompt_and_its_own_response(packing):
    batch = make_batch(EXAMPLES, packing, pad_to_multiple_of=4)
    read = batch.attends().squeeze(1)
    assert read.any(-1).all()  # a row of the softmax that is empty would be NaN
    ids = batch.input_ids
    for row in range(len(ids)):
        seen = {
            int(token): [int(ids[row, k]) for k in read[row, t].nonzero()]
            for t, token in enumerate(ids[row])
            if token
        }
        for example in EXAMPLES:
            if example.prompt[0] not in seen:
                continue
            for response in example.responses:
                alone = [*example.prompt, *response]
                for t, token in enumerate(alone):
                    assert seen[token] == alone[: t + 1]


def test_the_block_mask_is_the_dense_one():
    from torch.nn.attention.flex_attention import create_mask

    from segrlhf.models.packing import _block_mask

    batch = make_batch(EXAMPLES, "flex", pad_to_multiple_of=128)
    mask = _block_mask(batch)
    dense = create_mask(mask.mask_mod, 1, 1, 128, 128, "cpu")
    assert torch.equal(dense, batch.attends())
    assert mask.shape == (1, 1, 128, 128)


def test_pairs():
    rows = [
        {"row": 4, "prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]},
        {"row": 7, "prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10]},
    ]
    for row in rows:
        row |= {"chosen_terminated": True, "rejected_terminated": False}
    batch = make_batch([pair_example(row) for row in rows])
    pairs = make_pair_batch(rows, batch)
    assert pairs.rows.tolist() == [4, 7]
    assert pairs.terminated.tolist() == [True, True, False, False]
    assert pairs.margin is None
    assert pairs.entropy is None
    assert pairs.batch.mask.all()
    assert len(pairs.batch.mask) == 7
    for row in rows:
        row["chosen_entropy"] = np.full(len(row["chosen_ids"]), 0.5)
        row["rejected_entropy"] = np.full(len(row["rejected_ids"]), 1.5)
    assert make_pair_batch(rows, batch).entropy.tolist() == [0.5] * 4 + [1.5] * 3


def test_padding_of_single_responses():
    ids, attention, action = pad_responses([[1, 2], [3]], [[4], [5, 6, 7]], pad_token_id=9)
    assert ids.tolist() == [[1, 2, 4, 9], [3, 5, 6, 7]]
    assert attention.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert action.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("max_tokens", [60, 200, 5000])
def test_a_plan_holds_every_example_within_the_budget(packing, max_tokens):
    draw = np.random.default_rng(0)
    examples = [
        Example([1] * int(p), [[1] * int(a), [1] * int(b)])
        for p, a, b in draw.integers(1, 15, size=(50, 3))
    ]
    sizes = Sizes.of(examples)
    plan = plan_batches(sizes, packing, max_tokens)
    assert sorted(np.concatenate(plan).tolist()) == list(range(50))
    used = [make_batch([examples[i] for i in batch], packing).input_ids.numel() for batch in plan]
    assert max(used) <= max_tokens
    widths = sizes.widths(packing)[np.concatenate(plan)]
    assert (np.diff(widths) <= 0).all()  # those of like length together
    if max_tokens == 5000:
        assert len(plan) == 1
    else:  # nothing fits into the batch before
        for batch, after in itertools.pairwise(plan):
            more = [examples[i] for i in [*batch, after[0]]]
            assert make_batch(more, packing).input_ids.numel() > max_tokens
    tokens = [make_batch([example], packing).input_ids.numel() for example in examples]
    assert sizes.tokens(packing).tolist() == tokens


def test_a_budget_holds_the_largest_example():
    sizes = Sizes(np.array([5, 100]), np.array([[2, 3], [40, 0]]))
    assert token_budget(140, sizes, "mask") == 140
    assert token_budget(None, sizes, "mask") == 4096
    assert token_budget(None, Sizes(np.array([5000]), np.array([[9, 1]])), "none") == 10018
    with pytest.raises(UserError, match=r"max_tokens_per_batch: expected at least 140, .* got 139"):
        token_budget(139, sizes, "mask")
    with pytest.raises(UserError, match=r"2 padded rows\), got 12"):
        token_budget(12, Sizes(np.array([5]), np.array([[2, 3]])), "none")
