"""Rollouts: the sampled distribution is the policy's, and a row depends on nothing but itself."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from segrlhf.errors import NonFiniteError, UserError
from segrlhf.models.lm_head import token_stats
from segrlhf.ppo.rollout import RowSampler, distinct_bigrams, eos_ids, generate, row_uniforms

VOCAB, EOS, TURN_END = 13, 2, 5


class Ids:
    """What generate needs of a tokenizer; pads with EOS, as many tokenizers do."""

    pad_token_id = None
    eos_token_id = EOS


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=EOS,
        initializer_range=0.4,
    )
    model = LlamaForCausalLM(config)
    # A checkpoint that would rather sample something else than its own distribution.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[3, 4],
        min_new_tokens=7,
        max_length=9,
        eos_token_id=[EOS, TURN_END],
    )
    return model


PROMPTS = [[1, 7], [1, 3, 4, 8, 9, 10], [6], [1, 11, 12]] * 6


def sample(policy, prompts=PROMPTS, seeds=None, **kwargs):
    seeds = range(len(prompts)) if seeds is None else seeds
    kwargs = {"max_new_tokens": 12, "temperature": 0.7, **kwargs}
    return generate(policy, Ids(), prompts, seeds=list(seeds), **kwargs)


def test_tokens_are_the_inverse_cdf_of_the_policys_own_distribution(policy):
    rollout = sample(policy)
    with torch.no_grad():
        logits = policy(rollout.input_ids, attention_mask=rollout.attention_mask).logits
    cdf = (logits[:, :-1] / 0.7).double().softmax(-1).cumsum(-1)
    u = row_uniforms(range(len(PROMPTS)), 12)
    for row, prompt in enumerate(PROMPTS):
        response = rollout.responses()[row]
        assert response
        for step, token in enumerate(response):
            line = cdf[row, len(prompt) - 1 + step]
            assert token == int((line <= u[row, step] * line[-1]).sum())


def test_logprobs_recomputed_by_token_stats(policy):
    rollout = sample(policy)
    with torch.no_grad():
        logprobs, _ = token_stats(
            policy,
            rollout.input_ids,
            rollout.attention_mask,
            rollout.action_mask,
            temperature=0.7,
        )
    for row, prompt in enumerate(PROMPTS[:6]):
        ids = torch.tensor([[*prompt, *rollout.responses()[row]]])
        with torch.no_grad():
            plain = (policy(ids).logits[0, :-1] / 0.7).log_softmax(-1)
        plain = plain.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        torch.testing.assert_close(logprobs[row][rollout.action_mask[row]], plain)


def test_frequencies_fit_the_distribution(policy):
    n = 4000
    rollout = sample(policy, [[1, 7]] * n, range(n), max_new_tokens=1, batch_size=n)
    with torch.no_grad():
        p = (policy(torch.tensor([[1, 7]])).logits[0, -1] / 0.7).double().softmax(-1)
    counts = torch.bincount(rollout.input_ids[:, -1], minlength=VOCAB)
    chi_square = ((counts - n * p).square() / (n * p)).sum().item()
    degrees = VOCAB - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_a_row_depends_on_its_prompt_and_seed_alone(policy):
    whole = sample(policy).responses()
    assert sample(policy, batch_size=5).responses() == whole
    assert sample(policy, batch_size=1).responses() == whole
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(policy, [PROMPTS[i] for i in order], order).responses()
    assert shuffled == [whole[i] for i in order]
    assert sample(policy, PROMPTS[3:4], [3]).responses() == whole[3:4]
    assert sample(policy, seeds=range(100, 124)).responses() != whole


def test_responses_end_with_the_first_of_several_end_tokens(policy):
    assert eos_ids(policy, Ids()) == [EOS, TURN_END]
    rollout = sample(policy)
    for response, terminated in zip(rollout.responses(), rollout.terminated, strict=True):
        ends = [i for i, token in enumerate(response) if token in (EOS, TURN_END)]
        assert ends == ([len(response) - 1] if terminated else [])
        assert terminated or len(response) == 12
    assert rollout.terminated.any()
    assert not rollout.terminated.all()
    only_eos = sample(policy, end_token_ids=[EOS])
    assert any(TURN_END in response[:-1] for response in only_eos.responses())


def test_layout_is_repacked(policy):
    rollout = sample(policy)
    for row, (prompt, response) in enumerate(zip(PROMPTS, rollout.responses(), strict=True)):
        n = len(prompt) + len(response)
        assert rollout.input_ids[row, :n].tolist() == [*prompt, *response]
        assert rollout.attention_mask[row].tolist() == [1] * n + [0] * (
            rollout.input_ids.shape[1] - n
        )
        assert rollout.action_mask[row].nonzero().flatten().tolist() == [*range(len(prompt), n)]
    part = rollout.rows(slice(2, 4))
    assert part.input_ids.shape[1] == part.attention_mask.sum(1).max()
    assert part.responses() == rollout.responses()[2:4]


def test_leaves_policy_and_global_random_state_alone(policy):
    config, state = policy.generation_config, torch.get_rng_state()
    policy.train()
    sample(policy)
    assert policy.generation_config is config
    assert policy.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_taken(u):
    scores = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * 20
    scores[:, 0] = scores[:, -3:] = -torch.inf
    scores[1, 1:] = -torch.inf
    scores[1, 17] = -5.0
    sampler = RowSampler(torch.full((64, 1), u, dtype=torch.float64), 4, 1.0)
    chosen = sampler(torch.zeros(64, 4, dtype=torch.long), scores)
    picked = chosen.argmax(-1)
    assert (chosen.isfinite().sum(-1) == 1).all()
    assert scores[torch.arange(64), picked].isfinite().all()
    assert picked[1] == 17
    assert not sampler.broken.any()


def test_logits_that_are_not_finite_name_the_rows(policy):
    with torch.no_grad():
        kept = policy.model.embed_tokens.weight[9].clone()
        policy.model.embed_tokens.weight[9] = torch.nan
        try:
            with pytest.raises(NonFiniteError, match=r"NaN or infinity in rows \[1, 5\] of 6"):
                sample(policy, PROMPTS[:6], max_new_tokens=1)
        finally:
            policy.model.embed_tokens.weight[9] = kept


def test_bad_input(policy):
    with pytest.raises(UserError, match=r"at least one token a prompt, got none in rows \[1\]"):
        sample(policy, [[1], []])
    with pytest.raises(UserError, match=r"within the model's 64 positions, got 6 \+ 60; lower max"):
        sample(policy, max_new_tokens=60)
    with pytest.raises(UserError, match=r"temperature: expected a positive number, got 0\.0"):
        sample(policy, temperature=0.0)


def test_distinct_bigrams():
    assert distinct_bigrams([[1, 2, 3], [1, 2], [4]]) == pytest.approx(2 / 3)
    assert distinct_bigrams([[1], []]) == 0.0
