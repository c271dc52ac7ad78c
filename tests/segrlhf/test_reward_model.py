"""Reward models over many families, and in the layouts that were published."""

import json
import math

import pytest
import torch
from families import BARE_FAMILIES, FAMILIES, SMALL, batch, left
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from segkernels.normalizer import LocationNormalizer, ScalarNormalizer
from segrlhf.errors import UserError
from segrlhf.models.loading import recompute_activations
from segrlhf.models.reward_model import SegmentRewardModel


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
    saved = model.state_dict()
    assert again.state_dict().keys() == saved.keys()
    assert all(torch.equal(weight, saved[name]) for name, weight in again.state_dict().items())
    # To rounding: where weights lie in memory, which some matrix products depend on, is the file's.
    torch.testing.assert_close(again(ids, attention), rewards)
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


def test_head_is_drawn_with_the_seed_and_the_authors_spread(family_dir):
    path = family_dir("llama")
    a = SegmentRewardModel.from_causal_lm(path, "bandit", seed=1)
    state = torch.random.get_rng_state()
    b = SegmentRewardModel.from_causal_lm(path, "bandit", seed=1)
    c = SegmentRewardModel.from_causal_lm(path, "bandit", seed=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(a.score.weight, b.score.weight)
    assert not torch.equal(a.score.weight, c.score.weight)
    torch.manual_seed(1)
    drawn = torch.empty(1, 16).normal_(std=1 / 17)
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


def test_direct_construction(tiny_lm):
    with pytest.raises(TypeError, match="expected from_pretrained or from_causal_lm"):
        SegmentRewardModel(tiny_lm.config)


# Training


def test_gradient_checkpointing_gives_the_same_gradients(tiny_lm_dir):
    ids, attention, _ = batch()
    grads = []
    for checkpointing in (False, True):
        model = SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token").train()
        if checkpointing:
            recompute_activations(model)
        model(ids, attention).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


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
