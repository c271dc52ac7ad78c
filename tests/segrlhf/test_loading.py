"""Language models, tokenizers and adapters that load, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from families import batch

from segrlhf.configs import AdaptedModelConfig, ModelConfig
from segrlhf.errors import UserError
from segrlhf.models.loading import (
    apply_lora,
    check_same_tokenizer,
    load_causal_lm,
    load_tokenizer,
    recompute_activations,
)
from segrlhf.models.reward_model import SegmentRewardModel


def test_pickled_weights_are_refused(tiny_lm_dir, tmp_path):
    config = (tiny_lm_dir / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    torch.save({}, tmp_path / "pytorch_model.bin")
    calls = [
        lambda: SegmentRewardModel.from_pretrained(tmp_path),
        lambda: SegmentRewardModel.from_causal_lm(tmp_path, "token"),
        lambda: load_causal_lm(ModelConfig(str(tmp_path))),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"expected model\.safetensors in .*, got none"):
            call()


def test_name_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"model: expected a directory with config.json or a hub"):
        SegmentRewardModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer: expected a directory or hub name"):
        load_tokenizer(tmp_path)


def test_load_tokenizer(make_tokenizer, tmp_path):
    make_tokenizer(pad=False).save_pretrained(tmp_path / "no_pad")
    assert load_tokenizer(tmp_path / "no_pad").pad_token is None
    make_tokenizer(eos=False).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError, match=r"expected one with an EOS token.*set eos_token"):
        load_tokenizer(tmp_path / "no_eos")
    template = tmp_path / "chat.jinja"
    config = ModelConfig(str(tmp_path / "no_pad"), chat_template_path=str(template))
    with pytest.raises(UserError, match="chat_template_path: expected a jinja file"):
        load_tokenizer(config)
    template.write_text("{{ messages }}")
    assert load_tokenizer(config).chat_template == "{{ messages }}"


def test_same_tokenizer(make_tokenizer):
    ours = make_tokenizer()
    check_same_tokenizer(ours, make_tokenizer(chat_template="x"))
    larger = make_tokenizer()
    larger.add_tokens(["new"])
    with pytest.raises(UserError, match=r"expected the policy's tokenizer .* 261 tokens instead"):
        check_same_tokenizer(ours, larger)
    other = make_tokenizer()
    other.add_tokens(["other"])
    with pytest.raises(UserError, match="'new' as id None instead of 260"):
        check_same_tokenizer(larger, other)
    ended = make_tokenizer()
    ended.eos_token = "<|end|>"
    with pytest.raises(UserError, match=r"EOS '<.end.>' instead of '</s>'"):
        check_same_tokenizer(ours, ended)


def test_tokenizer_larger_than_the_model(tiny_lm_dir, make_tokenizer):
    larger = make_tokenizer()
    larger.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(UserError, match=r"expected token ids below 260, .* got 260"):
        SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token", tokenizer=larger)


def test_activations_are_recomputed_by_the_older_name_too():
    calls = []
    recompute_activations(SimpleNamespace(gradient_checkpointing_enable=calls.append))
    assert calls == [{"use_reentrant": False}]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_trains_adapters_and_the_head(family, family_dir, tmp_path):
    model = SegmentRewardModel.from_causal_lm(family_dir(family), "token").eval()
    ids, attention, _ = batch()
    before = model(ids, attention).detach()
    lora = apply_lora(model, AdaptedModelConfig("x", lora_r=2), "SEQ_CLS")
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert any("score" in name for name in trained)
    assert all("lora_" in name or "score" in name for name in trained)
    assert not any("score" in name and "lora_" in name for name in trained)
    torch.testing.assert_close(lora(input_ids=ids, attention_mask=attention), before)
    recompute_activations(lora)
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
