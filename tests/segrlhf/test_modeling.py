"""segrlhf.modeling: reward models over many families, published layouts, token statistics."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from segkernels.normalizer import LocationNormalizer, ScalarNormalizer
from segrlhf import modeling
from segrlhf.configs import AdaptedModelConfig, ModelConfig
from segrlhf.errors import UserError
from segrlhf.modeling import SegmentRewardModel, policy_loss, token_stats, token_stats_at

SMALL = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
# Family -> what differs from SMALL. None drops a setting.
FAMILIES: dict[str, dict] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {},
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {},
    "phi": {"num_key_value_heads": 2},
    "phi3": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {"rotary_pct": 1.0},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "olmo2": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {"head_dim": None, "num_kv_heads": 1},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "starcoder2": {},
    "stablelm": {"num_key_value_heads": 2},
    "smollm3": {},
    "glm4": {},
    "biogpt": {},
    "deepseek_v3": {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "num_key_value_heads": 2,
        "head_dim": None,
        "first_k_dense_replace": 1,
    },
}
# Families without a sequence-classification class in transformers.
BARE_FAMILIES: dict[str, dict] = {
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "olmoe": {"num_experts": 2, "num_experts_per_tok": 1},
    "codegen": {"num_attention_heads": 4, "rotary_dim": 4},
}
SCALED = {"gemma2", "cohere", "granite"}  # logits are not lm_head(hidden)


def small_config(family: str):
    changes = (FAMILIES | BARE_FAMILIES)[family]
    settings = {k: v for k, v in {**SMALL, **changes}.items() if v is not None}
    return AutoConfig.for_model(family, **settings)


@pytest.fixture(scope="module")
def family_dir(tmp_path_factory):
    """Directory of a small causal LM of a family, made once."""
    made = {}

    def directory(family: str):
        if family not in made:
            torch.manual_seed(0)
            path = tmp_path_factory.mktemp(family)
            model = AutoModelForCausalLM.from_config(small_config(family)).eval()
            with torch.no_grad():
                model.get_output_embeddings().weight *= 10.0
            model.save_pretrained(path)
            made[family] = path
        return made[family]

    return directory


def batch(generator_seed: int = 0, vocab: int = 99):
    """(input_ids, attention_mask, action_mask), right padding, rows of 9, 5 and 3 tokens."""
    generator = torch.Generator().manual_seed(generator_seed)
    ids = torch.randint(3, vocab, (3, 9), generator=generator)
    attention = torch.ones(3, 9, dtype=torch.long)
    for row, length in enumerate([9, 5, 3]):
        attention[row, length:] = 0
    ids[attention == 0] = 0
    action = attention.bool()
    action[:, :2] = False
    return ids, attention, action


def left(tensor: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """The same rows with their padding in front."""
    shift = (attention == 0).sum(-1)
    return torch.stack([row.roll(int(n)) for row, n in zip(tensor, shift, strict=True)])


@pytest.mark.parametrize("family", [*FAMILIES, *BARE_FAMILIES])
def test_families(family, family_dir, tmp_path):
    source = family_dir(family)
    model = SegmentRewardModel.from_causal_lm(source, "segment", 1.5, "some-lm").eval()
    assert isinstance(model, SegmentRewardModel)

    # the backbone is a copy; the head is new
    lm = AutoModelForCausalLM.from_pretrained(source).base_model.state_dict()
    ours = model.base_model.state_dict()
    assert ours.keys() == lm.keys()
    assert all(torch.equal(ours[name], lm[name]) for name in lm)

    ids, attention, _ = batch()
    rewards = model(ids, attention)
    assert rewards.shape == ids.shape
    assert rewards.dtype == torch.float32

    model.save_pretrained(tmp_path)
    again = SegmentRewardModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids, attention), rewards)
    assert (again.granularity, again.entropy_threshold) == ("segment", 1.5)
    assert again.entropy_model == "some-lm"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert config["architectures"][0].endswith("ForSequenceClassification")

    if family in BARE_FAMILIES:
        return
    plain, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not isinstance(plain, SegmentRewardModel)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    logits = plain.eval()(ids, attention_mask=attention).logits
    last = attention.sum(-1) - 1
    torch.testing.assert_close(logits[:, 0], rewards[torch.arange(3), last], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, *BARE_FAMILIES])
def test_padding_side_does_not_matter(family, family_dir):
    model = SegmentRewardModel.from_causal_lm(family_dir(family), "token").eval()
    ids, attention, _ = batch()
    right = model(ids, attention)
    other = model(left(ids, attention), left(attention, attention))
    keep = left(attention, attention).bool()
    torch.testing.assert_close(other[keep], right[attention.bool()], rtol=1e-4, atol=1e-5)


def test_head_is_drawn_with_the_seed_and_the_papers_variance(family_dir):
    path = family_dir("llama")
    a = SegmentRewardModel.from_causal_lm(path, "bandit", seed=1)
    state = torch.random.get_rng_state()
    b = SegmentRewardModel.from_causal_lm(path, "bandit", seed=1)
    c = SegmentRewardModel.from_causal_lm(path, "bandit", seed=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(a.score.weight, b.score.weight)
    assert not torch.equal(a.score.weight, c.score.weight)
    torch.manual_seed(1)
    drawn = torch.empty(1, 16).normal_(std=1 / math.sqrt(17))
    assert torch.equal(a.score.weight, drawn)


def test_settings_are_kept_in_the_config(tiny_lm_dir, tmp_path):
    model = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token")
    assert model.normalizer is None
    assert model.entropy_threshold is None
    model.normalizer = LocationNormalizer(0.7, 0.4, 0.2, 2.8)
    model.save_pretrained(tmp_path)
    again = SegmentRewardModel.from_pretrained(tmp_path, "token")
    assert again.normalizer.to_dict() == model.normalizer.to_dict()
    kept = json.loads((tmp_path / "config.json").read_text())["segment_reward"]
    assert set(kept) == {"granularity", "entropy_threshold", "entropy_model", "normalizer"}


def test_pad_token_of_plain_classifiers(tiny_lm_dir, make_tokenizer):
    own = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token", tokenizer=make_tokenizer())
    assert own.config.pad_token_id == 256
    eos = make_tokenizer(pad=False)
    eos.pad_token = eos.eos_token
    shared = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token", tokenizer=eos)
    assert shared.config.pad_token_id is None


# Segments


def test_segment_ends_by_granularity(tiny_lm_dir):
    mask = torch.tensor([[False, True, True, True, True], [False, True, True, False, False]])
    entropy = torch.tensor([[0.0, 9.0, 0.1, 2.0, 0.1], [0.0, 0.5, 0.2, 0.0, 0.0]])
    terminated = torch.tensor([True, False])

    def ends(granularity, threshold=None, h=entropy):
        model = SegmentRewardModel.from_causal_lm(tiny_lm_dir, granularity, threshold)
        return model.segment_ends(h, mask, terminated).int().tolist()

    assert ends("bandit", h=None) == [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]
    assert ends("token", h=None) == [[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]]
    assert ends("segment", 1.0) == [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0]]
    with pytest.raises(UserError, match="entropy: expected the response tokens' entropies"):
        ends("segment", 1.0, h=None)


# Published checkpoints


@pytest.fixture
def published(tiny_lm_dir, tmp_path):
    """Writes a reward model as others published it; gives its directory and ours."""

    def make(config_changes: dict, labels: int = 1, shards: bool = False):
        ours = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token").eval()
        ours.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights["score.weight"] = weights["score.weight"].repeat(labels, 1)
        if shards:
            (tmp_path / "model.safetensors").unlink()
            head = {"score.weight": weights.pop("score.weight")}
            parts = {"model-1-of-2.safetensors": weights, "model-2-of-2.safetensors": head}
            where = {name: file for file, part in parts.items() for name in part}
            for file, part in parts.items():
                save_file(part, tmp_path / file, metadata={"format": "pt"})
            index = {"metadata": {}, "weight_map": where}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        for key in ("segment_reward", "id2label", "label2id", "num_labels"):
            config.pop(key, None)
        config |= config_changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path, ours

    return make


REMOTE = {"auto_map": {"AutoModel": "modeling_x.RewardModel", "AutoConfig": "conf_x.Config"}}
ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
STATS = {"mean": -0.5195, "std": 2.1563}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(
    "layout",
    [{**ONE_LABEL, **REMOTE}, {"architectures": ["RewardModel"], **REMOTE}],
    ids=["one label", "RewardModel"],
)
def test_published_layouts_load_without_remote_code(layout, shards, published, tmp_path):
    path, ours = published({**layout, **STATS, "normalize_reward": False}, shards=shards)
    model = SegmentRewardModel.from_pretrained(path, "token").eval()
    ids, attention, _ = batch()
    assert torch.equal(model(ids, attention), ours(ids, attention))
    assert model.normalizer is None
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    plain, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert plain.num_labels == 1
    assert not info["missing_keys"] | info["unexpected_keys"]


def test_published_bandit_brings_its_normalizer(published, tmp_path):
    path, _ = published({**ONE_LABEL, **STATS, "normalize_reward": False})
    model = SegmentRewardModel.from_pretrained(path, granularity="bandit")
    assert model.normalizer.to_dict() == ScalarNormalizer(-0.5195, 2.1563).to_dict()
    model.save_pretrained(tmp_path / "again")
    assert SegmentRewardModel.from_pretrained(tmp_path / "again").granularity == "bandit"


def test_normalize_reward_brings_the_normalizer(published):
    path, _ = published({**ONE_LABEL, **STATS, "normalize_reward": True})
    model = SegmentRewardModel.from_pretrained(path)
    assert model.normalizer.to_dict() == ScalarNormalizer(-0.5195, 2.1563).to_dict()


def test_mean_zero_and_std_one_mean_that_none_was_fitted(published):
    path, _ = published({**ONE_LABEL, "mean": 0.0, "std": 1.0, "normalize_reward": True})
    assert SegmentRewardModel.from_pretrained(path, granularity="bandit").normalizer is None


# Bad input


def test_two_labels(published):
    path, _ = published({}, labels=2)
    with pytest.raises(UserError, match=r"expected one label, got 2 in .*'segrlhf reward'"):
        SegmentRewardModel.from_pretrained(path)


def test_language_model_as_reward_model(tiny_lm_dir):
    with pytest.raises(UserError, match=r"expected a head 'score\.weight', got .* without"):
        SegmentRewardModel.from_pretrained(tiny_lm_dir)


def test_unknown_granularity(published):
    path, _ = published(ONE_LABEL)
    model = SegmentRewardModel.from_pretrained(path)
    with pytest.raises(UserError, match="whose config does not say; pass granularity="):
        model.segment_ends(None, torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(UserError, match="expected one of segment, token, bandit, got 'word'"):
        model.granularity = "word"


def test_bandit_asked_for_segments(tiny_lm_dir, tmp_path):
    SegmentRewardModel.from_causal_lm(tiny_lm_dir, "bandit").save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"granularity: expected bandit, with which .* was trained, got segment"
    ):
        SegmentRewardModel.from_pretrained(tmp_path, granularity="segment")


def test_other_threshold(tiny_lm_dir, tmp_path):
    SegmentRewardModel.from_causal_lm(tiny_lm_dir, "segment", 1.75).save_pretrained(tmp_path)
    assert SegmentRewardModel.from_pretrained(tmp_path, "segment", 1.75).entropy_threshold == 1.75
    with pytest.raises(UserError, match=r"entropy_threshold: expected 1\.75, .* got 2\.0"):
        SegmentRewardModel.from_pretrained(tmp_path, entropy_threshold=2.0)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf, None])
def test_threshold_that_is_none(threshold, tiny_lm_dir, published):
    with pytest.raises(UserError, match="entropy_threshold: expected a finite number of nats >= 0"):
        SegmentRewardModel.from_causal_lm(tiny_lm_dir, "segment", threshold)
    path, _ = published(ONE_LABEL)
    with pytest.raises(UserError, match="entropy_threshold: expected a finite number of nats >= 0"):
        SegmentRewardModel.from_pretrained(path, "segment", threshold)


def test_pickled_weights_are_refused(tiny_lm_dir, tmp_path):
    config = (tiny_lm_dir / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    torch.save({}, tmp_path / "pytorch_model.bin")
    calls = [
        lambda: SegmentRewardModel.from_pretrained(tmp_path),
        lambda: SegmentRewardModel.from_causal_lm(tmp_path, "token"),
        lambda: modeling.load_causal_lm(ModelConfig(str(tmp_path))),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"expected model\.safetensors in .*, got none"):
            call()


def test_missing_weights(published):
    path, _ = published(ONE_LABEL)
    weights = load_file(path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"without model\.norm\.weight"):
        SegmentRewardModel.from_pretrained(path)
    with pytest.raises(UserError, match=r"without model\.norm\.weight"):
        SegmentRewardModel.from_causal_lm(path, "token")


def test_what_is_no_decoder(tmp_path):
    bert = AutoConfig.for_model("bert", **{**SMALL, "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(bert).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BertForSequenceClassification has a linear head 'score'"):
        SegmentRewardModel.from_causal_lm(tmp_path, "token")


def test_encoder_decoder(tmp_path):
    AutoConfig.for_model("bart").save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="expected a decoder-only model"):
        SegmentRewardModel.from_causal_lm(tmp_path, "token")


def test_name_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"model: expected a directory with config.json or a hub"):
        SegmentRewardModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer: expected a directory or hub name"):
        modeling.load_tokenizer(tmp_path)


def test_direct_construction(tiny_lm):
    with pytest.raises(TypeError, match="expected from_pretrained or from_causal_lm"):
        SegmentRewardModel(tiny_lm.config)


# Tokenizers


def test_load_tokenizer(make_tokenizer, tmp_path):
    make_tokenizer(pad=False).save_pretrained(tmp_path / "no_pad")
    assert modeling.load_tokenizer(tmp_path / "no_pad").pad_token is None
    make_tokenizer(eos=False).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError, match=r"expected one with an EOS token.*set eos_token"):
        modeling.load_tokenizer(tmp_path / "no_eos")
    template = tmp_path / "chat.jinja"
    config = ModelConfig(str(tmp_path / "no_pad"), chat_template_path=str(template))
    with pytest.raises(UserError, match="chat_template_path: expected a jinja file"):
        modeling.load_tokenizer(config)
    template.write_text("{{ messages }}")
    assert modeling.load_tokenizer(config).chat_template == "{{ messages }}"


def test_same_tokenizer(make_tokenizer):
    ours = make_tokenizer()
    modeling.check_same_tokenizer(ours, make_tokenizer(chat_template="x"))
    larger = make_tokenizer()
    larger.add_tokens(["new"])
    with pytest.raises(UserError, match=r"expected the policy's tokenizer .* 261 tokens instead"):
        modeling.check_same_tokenizer(ours, larger)
    other = make_tokenizer()
    other.add_tokens(["other"])
    with pytest.raises(UserError, match="'new' as id None instead of 260"):
        modeling.check_same_tokenizer(larger, other)
    ended = make_tokenizer()
    ended.eos_token = "<|end|>"
    with pytest.raises(UserError, match=r"EOS '<.end.>' instead of '</s>'"):
        modeling.check_same_tokenizer(ours, ended)


def test_tokenizer_larger_than_the_model(tiny_lm_dir, make_tokenizer):
    larger = make_tokenizer()
    larger.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(UserError, match=r"expected token ids below 260, .* got 260"):
        SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token", tokenizer=larger)


# Training


def test_gradient_checkpointing_gives_the_same_gradients(tiny_lm_dir):
    ids, attention, _ = batch()
    grads = []
    for checkpointing in (False, True):
        model = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, attention).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_trains_adapters_and_the_head(family, family_dir, tmp_path):
    model = SegmentRewardModel.from_causal_lm(family_dir(family), "token").eval()
    ids, attention, _ = batch()
    before = model(ids, attention).detach()
    lora = modeling.apply_lora(model, AdaptedModelConfig("x", lora_r=2), "SEQ_CLS")
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert any("score" in name for name in trained)
    assert all("lora_" in name or "score" in name for name in trained)
    assert not any("score" in name and "lora_" in name for name in trained)
    torch.testing.assert_close(lora(input_ids=ids, attention_mask=attention), before)
    lora.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    lora.train()
    for _ in range(2):
        lora(input_ids=ids, attention_mask=attention).mean().backward()
        optimizer.step()
    lora.eval()
    after = lora(input_ids=ids, attention_mask=attention).detach()
    assert not torch.equal(after, before)
    merged = lora.merge_and_unload()
    assert isinstance(merged, SegmentRewardModel)
    merged.save_pretrained(tmp_path)
    again = SegmentRewardModel.from_pretrained(tmp_path, "token").eval()
    torch.testing.assert_close(again(ids, attention), after, rtol=1e-4, atol=1e-5)


def test_bf16_weights_and_autocast(tiny_lm_dir):
    ids, attention, _ = batch()
    full = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token", dtype="float32").eval()
    half = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token", dtype="bfloat16").eval()
    assert half.score.weight.dtype == torch.bfloat16
    assert half(ids, attention).dtype == torch.float32
    torch.testing.assert_close(half(ids, attention), full(ids, attention), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = full(ids, attention)
    assert mixed.dtype == torch.float32
    rounded = mixed.bfloat16().float()
    assert not torch.equal(mixed, rounded)


# Token statistics


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
    assert modeling._is_plain(model, model) == (family not in SCALED)
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

    position = None if side == "right" else modeling.positions(model, attention)
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
        with torch.no_grad(), modeling._last_hidden(model) as hidden:
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
    lm = modeling.load_causal_lm(ModelConfig(str(tiny_lm_dir))).eval()
    ids, attention, action = batch()
    expected = token_stats(lm, ids, attention, action)
    lora = modeling.apply_lora(lm, AdaptedModelConfig("x", lora_r=2), "CAUSAL_LM")
    found = token_stats(lora, ids, attention, action)
    torch.testing.assert_close(found[0], expected[0])
    found[0].sum().backward()
    assert any(p.grad is not None for n, p in lora.named_parameters() if "lora_" in n)


def test_token_stats_through_ddp(tiny_lm_dir, tmp_path):
    lm = modeling.load_causal_lm(ModelConfig(str(tiny_lm_dir)))
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
        assert modeling._is_plain(wrapped, lm)
    finally:
        torch.distributed.destroy_process_group()
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_compiled_models_go_through_logits(tiny_lm):
    assert modeling._is_plain(tiny_lm, tiny_lm)
    assert not modeling._is_plain(torch.compile(tiny_lm, backend="eager"), tiny_lm)


def test_the_probe_leaves_the_random_stream_alone(family_dir):
    model = AutoModelForCausalLM.from_pretrained(family_dir("gpt2")).train()
    assert any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout))
    state = torch.random.get_rng_state()
    assert modeling._is_plain(model, model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training


def test_action_token_without_a_token_before_it(tiny_lm):
    ids, attention, action = batch()
    action[1, 0] = True
    with pytest.raises(ValueError, match="none before token 0 of row 1; put a prompt or a BOS"):
        token_stats(tiny_lm, ids, attention, action)


@pytest.mark.real_data
def test_entropies_of_a_real_model(real_data):
    from segrlhf.data import Renderer

    path = real_data / "tiny_lm" / "stories260K"
    lm = modeling.load_causal_lm(ModelConfig(str(path))).eval()
    tokenizer = modeling.load_tokenizer(path)
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
