"""Token statistics and policy loss against logits, for every way that a head may be wrapped."""

import pytest
import torch
from families import SCALED, batch, left
from torch import nn
from transformers import AutoModelForCausalLM

from segrlhf.configs import AdaptedModelConfig, ModelConfig
from segrlhf.models.lm_head import (
    _is_plain,
    _last_hidden,
    policy_loss,
    positions,
    token_stats,
    token_stats_at,
)
from segrlhf.models.loading import apply_lora, load_causal_lm, load_tokenizer


def naive_stats(model, ids, attention, action, temperature=1.0):
    """One row at a time without padding, from logits in fp64."""
    logprobs, entropy = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for row in range(len(ids)):
        at = attention[row].nonzero().flatten()
        logits = model(input_ids=ids[row, at][None]).logits[0].double() / temperature
        logp = logits.log_softmax(-1)
        for k in range(1, len(at)):
            if action[row, at[k]]:
                logprobs[row, at[k]] = logp[k - 1, ids[row, at[k]]]
                entropy[row, at[k]] = -(logp[k - 1].exp() * logp[k - 1]).sum()
    return logprobs, entropy


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gpt2", "falcon", *sorted(SCALED)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_stats(family, temperature, family_dir):
    model = AutoModelForCausalLM.from_pretrained(family_dir(family)).eval()
    ids, attention, action = batch()
    with torch.no_grad():
        expected = naive_stats(model, ids, attention, action, temperature)
        right = token_stats(model, ids, attention, action, temperature)
        flipped = [left(x, attention) for x in (ids, attention, action)]
        other = token_stats(model, *flipped, temperature)
    assert _is_plain(model, model) == (family not in SCALED)
    for ours, moved, truth in zip(right, other, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moved, left(ours, attention), rtol=1e-4, atol=1e-4)
        assert (ours[~action] == 0).all()


@pytest.mark.parametrize("family", ["llama", "phi", "cohere"])
def test_token_stats_gradients(family, family_dir):
    model = AutoModelForCausalLM.from_pretrained(family_dir(family))
    ids, attention, action = batch()
    logprobs, entropy = token_stats(model, ids, attention, action)
    (logprobs.sum() + 0.3 * entropy.sum()).backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logp = model(ids, attention_mask=attention).logits[:, :-1].double().log_softmax(-1)
    chosen = logp.gather(-1, ids[:, 1:, None])[..., 0]
    h = -(logp.exp() * logp).sum(-1)
    (chosen + 0.3 * h)[action[:, 1:]].sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "phi", "cohere"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_policy_loss(family, aggregation, side, family_dir):
    """Every number and gradient against the formulas on logits in fp64; cohere scales its own."""
    model = AutoModelForCausalLM.from_pretrained(family_dir(family)).eval()
    ids, attention, action = batch()
    if side == "left":
        ids, attention, action = (left(x, attention) for x in (ids, attention, action))
    action = action & (attention.cumsum(-1) > 2)
    generator = torch.Generator().manual_seed(1)
    noise, advantages = torch.randn(2, *ids.shape, generator=generator)
    logprobs, entropy = token_stats(model, ids, attention, action, 0.7)
    old = logprobs.detach() + 0.3 * noise
    old[~action], advantages[~action] = torch.nan, torch.inf
    out = policy_loss(
        model, ids, attention, action, old, advantages,
        temperature=0.7, clip=0.2, aggregation=aggregation,
    )  # fmt: skip
    out.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert not any(field.requires_grad for field in out[1:])
    torch.testing.assert_close(out.logprobs, logprobs.detach())
    torch.testing.assert_close(out.entropy, entropy.detach())

    position = None if side == "right" else positions(model, attention)
    logits = model(ids, attention_mask=attention, position_ids=position).logits[:, :-1].double()
    logp = (logits / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    mask = action[:, 1:]
    q = torch.where(mask, logp - old[:, 1:], 0)
    a = torch.where(mask, advantages[:, 1:], 0)
    plain, clipped = q.exp() * a, q.exp().clamp(0.8, 1.2) * a
    terms = -torch.minimum(plain, clipped)
    n = mask.sum()
    truth = {
        "token-mean": terms.sum() / n,
        "seq-mean-token-mean": (terms.sum(1) / mask.sum(1)).mean(),
        "seq-mean-token-sum": terms.sum(1).mean(),
    }[aggregation]
    truth.backward()
    held = (clipped < plain).sum()
    assert 0 < held < n
    for found, expected in (
        (out.loss, truth),
        (out.clip_fraction, held / n),
        (out.approx_kl, q.square().sum() / (2 * n)),
    ):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=2e-3, atol=2e-4)


def test_token_stats_in_bf16(tiny_lm):
    import copy

    ids, attention, action = batch()
    half = copy.deepcopy(tiny_lm).bfloat16()
    with torch.no_grad():
        _, entropy = token_stats(half, ids, attention, action)
        logits = half(ids, attention_mask=attention).logits
    assert entropy.dtype == torch.float32
    logp = logits[:, :-1].double().log_softmax(-1)
    expected = -(logp.exp() * logp).sum(-1).float()
    mask = action[:, 1:]
    torch.testing.assert_close(entropy[:, 1:][mask], expected[mask], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_autocast_multiplies_the_head_in_its_dtype(family, family_dir):
    model = AutoModelForCausalLM.from_pretrained(family_dir(family))
    ids, attention, action = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropy = token_stats(model, ids, attention, action)
        with torch.no_grad(), _last_hidden(model) as hidden:
            model(ids, attention_mask=attention)
    weight, bias = model.lm_head.weight, model.lm_head.bias
    operands = [None if x is None else x.bfloat16().double() for x in (hidden[0], weight, bias)]
    logp = nn.functional.linear(*operands)[:, :-1].log_softmax(-1)
    expected = logp.gather(-1, ids[:, 1:, None])[..., 0], -(logp.exp() * logp).sum(-1)
    mask = action[:, 1:]
    for ours, truth in zip((logprobs, entropy), expected, strict=True):
        torch.testing.assert_close(ours[:, 1:][mask], truth[mask].float(), rtol=1e-5, atol=1e-5)
    logprobs.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_token_stats_at_several_temperatures_take_one_pass(tiny_lm):
    ids, attention, action = batch()
    passes = []
    with torch.no_grad():
        expected = {t: token_stats(tiny_lm, ids, attention, action, t) for t in (0.7, 1.0)}
        hook = tiny_lm.base_model.register_forward_hook(lambda *_: passes.append(1))
        found = token_stats_at(tiny_lm, ids, attention, action, (0.7, 1.0))
        hook.remove()
    assert len(passes) == 1
    assert found.keys() == expected.keys()
    for temperature, stats in expected.items():
        for ours, alone in zip(found[temperature], stats, strict=True):
            assert torch.equal(ours, alone)
    assert not torch.equal(*(entropy for _, entropy in found.values()))


def test_token_stats_through_peft(tiny_lm_dir):
    lm = load_causal_lm(ModelConfig(str(tiny_lm_dir))).eval()
    ids, attention, action = batch()
    expected = token_stats(lm, ids, attention, action)
    lora = apply_lora(lm, AdaptedModelConfig("x", lora_r=2), "CAUSAL_LM")
    found = token_stats(lora, ids, attention, action)
    torch.testing.assert_close(found[0], expected[0])
    found[0].sum().backward()
    assert any(p.grad is not None for n, p in lora.named_parameters() if "lora_" in n)


def test_token_stats_through_ddp(tiny_lm_dir, tmp_path):
    lm = load_causal_lm(ModelConfig(str(tiny_lm_dir)))
    ids, attention, action = batch()
    token_stats(lm, ids, attention, action)[0].sum().backward()
    expected = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.zero_grad()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(lm)
        for _ in range(2):  # the second forward notices gradients that did not arrive
            lm.zero_grad()
            token_stats(wrapped, ids, attention, action)[0].sum().backward()
        assert _is_plain(wrapped, lm)
    finally:
        torch.distributed.destroy_process_group()
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_compiled_models_go_through_logits(tiny_lm):
    assert _is_plain(tiny_lm, tiny_lm)
    assert not _is_plain(torch.compile(tiny_lm, backend="eager"), tiny_lm)


def test_the_probe_leaves_the_random_stream_alone(family_dir):
    model = AutoModelForCausalLM.from_pretrained(family_dir("gpt2")).train()
    assert any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout))
    state = torch.random.get_rng_state()
    assert _is_plain(model, model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training


def test_action_token_without_a_token_before_it(tiny_lm):
    ids, attention, action = batch()
    action[1, 0] = True
    with pytest.raises(ValueError, match="none before token 0 of row 1; put a prompt or a BOS"):
        token_stats(tiny_lm, ids, attention, action)


@pytest.mark.real_data
def test_entropies_of_a_real_model(real_data):
    from segrlhf.data.render import Renderer

    path = real_data / "tiny_lm" / "stories260K"
    lm = load_causal_lm(ModelConfig(str(path))).eval()
    tokenizer = load_tokenizer(path)
    prompt, (response,) = Renderer(tokenizer).pair(
        "Once upon a time, there was a little girl", [" named Lily. She loved to play outside."]
    )
    ids = torch.tensor([prompt + response])
    action = torch.arange(ids.shape[1])[None] >= len(prompt)
    with torch.no_grad():
        logprobs, entropy = token_stats(lm, ids, torch.ones_like(ids), action)
        expected = naive_stats(lm, ids, torch.ones_like(ids), action)
    torch.testing.assert_close(logprobs, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-4, atol=1e-4)
    assert (entropy[action] > 1.5).any()
    assert (entropy[action] < 0.5).any()
