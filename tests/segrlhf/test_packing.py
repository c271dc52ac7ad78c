"""Pairs that are read once: the same numbers as padded rows, or not at all."""

import numpy as np
import pytest
import torch
from families import BARE_FAMILIES, FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from segkernels import segment_bradley_terry
from segrlhf.data.batch import Example, Sizes, make_batch
from segrlhf.errors import UserError
from segrlhf.models.lm_head import response_entropy, response_states
from segrlhf.models.packing import PackingConfig, Reader, choose_packing, make_reader
from segrlhf.models.reward_model import SegmentRewardModel, response_rewards

# Families whose attention takes no mask or positions but its own.
PADDED = {"bloom", "mpt"}


def examples(seed=0, longest=20, count=3):
    draw = np.random.default_rng(seed)

    def ids(most):
        return draw.integers(3, 99, draw.integers(1, most + 1)).tolist()

    return [Example(ids(longest), [ids(longest), ids(longest)]) for _ in range(count)]


def loss_and_gradients(model, rows, packing):
    batch = make_batch(rows, packing)
    rewards = response_rewards(model, batch, packing)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    ends = torch.rand(len(mask), generator=torch.Generator().manual_seed(0)) < 0.5
    ends[batch.cu_seqlens[1:].long() - 1] = True
    loss = segment_bradley_terry(rewards, ends, mask, cu_seqlens=batch.cu_seqlens).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", [*FAMILIES, *BARE_FAMILIES])
def test_a_family_reads_pairs_once_or_padded(family, family_dir):
    model = SegmentRewardModel.from_causal_lm(family_dir(family), "token").eval()
    rows = examples()
    packing, line = choose_packing(model, "auto", response_rewards, rows[0])
    assert packing == ("none" if family in PADDED else "mask"), line
    loss, gradients = loss_and_gradients(model, rows, packing)
    padded_loss, padded = loss_and_gradients(model, rows, "none")
    torch.testing.assert_close(loss, padded_loss, rtol=1e-5, atol=1e-6)
    whole = torch.cat([g.flatten() for g in padded.values()]).norm()
    for name, gradient in gradients.items():
        assert (gradient - padded[name]).norm() <= 1e-5 * whole, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", ["mask", "varlen"])
def test_entropies_are_those_of_padded_rows(attention, packing, tiny_lm_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_dir, attn_implementation=attention).eval()
    rows = examples()
    found, _ = choose_packing(model, packing, response_states, rows[0])
    assert found == packing
    with torch.no_grad():
        entropy = response_entropy(model, make_batch(rows, packing), packing)
        padded = response_entropy(model, make_batch(rows), "none")
    torch.testing.assert_close(entropy, padded, rtol=1e-5, atol=1e-5)


def test_flex_attention_gives_the_rewards_of_padded_rows(tiny_lm_dir, monkeypatch):
    """Compiled on a GPU; here its definition is run."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as theirs

    def definition(*args, training=False, **kwargs):
        return flex_attention(*args, **kwargs)

    monkeypatch.setattr(theirs, "compile_friendly_flex_attention", definition)
    make = SegmentRewardModel.from_causal_lm
    flex = make(tiny_lm_dir, "token", attn_implementation="flex_attention").eval()
    padded = make(tiny_lm_dir, "token", attn_implementation="sdpa").eval()
    rows = examples()
    batch = Reader("flex", 4096).batch(rows, "cpu")
    assert batch.input_ids.shape == (1, 1024)
    with torch.no_grad():
        rewards = response_rewards(flex, batch, "flex")
        expected = response_rewards(padded, make_batch(rows), "none")
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def sliding(family_dir):
    """Reads eight tokens back, which a mask of ours would not say."""
    model = SegmentRewardModel.from_causal_lm(family_dir("mistral"), "token").eval()
    model.config.sliding_window = 8
    return model


def test_a_model_that_reads_pairs_otherwise_gets_padded_rows(sliding, capsys):
    rows = examples(longest=30)
    sizes = Sizes.of(rows)
    reader = make_reader(sliding, PackingConfig(), response_rewards, sizes, rows.__getitem__)
    assert reader.packing == "none"
    said = capsys.readouterr().out
    assert "packing: none, one padded row a response (with mask, numbers differ by" in said
    with pytest.raises(UserError, match=r"got mask: with mask, numbers differ .*--packing auto"):
        choose_packing(sliding, "mask", response_rewards, rows[0])
    short = Example([3, 4], [[5, 6], [7]])  # within the window
    assert choose_packing(sliding, "auto", response_rewards, short)[0] == "mask"


def test_a_model_that_fails_gets_padded_rows(tiny_lm_dir):
    model = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token")

    def refuse(module, arguments, inputs):
        if inputs["attention_mask"].dim() == 4:
            raise ValueError("one mask for all")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    packing, line = choose_packing(model.train(), "auto", response_rewards, examples()[0])
    assert packing == "none"
    assert "numbers fail: ValueError: one mask for all" in line
    assert model.training  # as it was


def test_a_packing_that_the_attention_cannot_do(tiny_lm_dir):
    model = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token", attn_implementation="sdpa")
    with pytest.raises(UserError, match=r"suits --attn_implementation sdpa, got flex, which is"):
        choose_packing(model, "flex", response_rewards, examples()[0])


def test_dropout_is_off_while_packings_are_tried(tiny_lm_dir):
    model = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token")
    model.score = nn.Sequential(nn.Dropout(0.5), model.score)
    before = torch.get_rng_state()
    assert choose_packing(model.train(), "auto", response_rewards, examples()[0])[0] == "mask"
    assert torch.equal(torch.get_rng_state(), before)
