"""Language models, tokenizers and adapters that load, and what is refused."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from families import batch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from segrlhf import cli
from segrlhf.configs import AdaptedModelConfig, ModelConfig
from segrlhf.entropy_cache import load_entropy_model
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


def damaged(source, path, change):
    """A copy of a saved model whose weights, a dict, ``change`` has altered."""
    shutil.copytree(source, path)
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_weight_that_is_not_exactly_the_models_own_is_refused(family, family_dir, tmp_path):
    """Each weight in turn is missing, or of another shape; the files have a layer too many."""
    source = family_dir(family)
    load_causal_lm(ModelConfig(str(source)))
    names = list(load_file(source / "model.safetensors"))
    changes = [("without", lambda w, name=name: w.pop(name)) for name in names]
    for name in names:
        misshapen = {name: torch.zeros(3, 3)}
        changes.append(("with the shapes", lambda w, misshapen=misshapen: w.update(misshapen)))
    further = {name.replace(".1.", ".2."): torch.zeros(2) for name in names if ".1." in name}
    changes.append(("which also has", lambda w: w.update(further)))
    for how, change in changes:
        path = damaged(source, tmp_path / "damaged", change)
        with pytest.raises(UserError, match=rf"expected exactly the weights of .* {how} "):
            load_causal_lm(ModelConfig(str(path)))
        shutil.rmtree(path)


def test_masks_that_older_versions_saved_are_no_weights(family_dir, tmp_path):
    def change(weights):
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    path = damaged(family_dir("gpt2"), tmp_path / "old", change)
    load_causal_lm(ModelConfig(str(path)))


def test_reward_models_and_language_models_are_not_taken_for_each_other(tiny_lm_dir, tmp_path):
    SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token").save_pretrained(tmp_path / "rm")
    for call in (
        lambda: load_causal_lm(ModelConfig(str(tmp_path / "rm"))),
        lambda: load_entropy_model(str(tmp_path / "rm")),
    ):
        with pytest.raises(UserError, match=r"weights of LlamaForCausalLM, .* without lm_head"):
            call()
    with pytest.raises(UserError, match=r"which is no language model, it has score\.weight"):
        SegmentRewardModel.from_causal_lm(tmp_path / "rm", "token")
    both = damaged(tiny_lm_dir, tmp_path / "v", lambda w: w.update({"v_head.w": torch.ones(1, 16)}))
    with pytest.raises(UserError, match=r"which also has v_head\.w"):
        load_causal_lm(ModelConfig(str(both)))


def test_commands_refuse_a_tokenizer_larger_than_the_model(
    tiny_lm_dir, make_tokenizer, pairs_file, prompts_file, tmp_path, capsys
):
    """In every place where they meet: the language, the reward and the entropy model."""
    larger = make_tokenizer()
    larger.add_tokens(["<new>"])
    config = LlamaConfig.from_pretrained(tiny_lm_dir, vocab_size=261)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "grown")
    for lm, name in ((tiny_lm_dir, "small_rm"), (tmp_path / "grown", "grown_rm")):
        model = SegmentRewardModel.from_causal_lm(lm, "segment", 1.75, str(tiny_lm_dir))
        model.save_pretrained(tmp_path / name)
    for name in ("larger", "grown", "small_rm", "grown_rm"):
        larger.save_pretrained(tmp_path / name)

    small = f"--model_name_or_path {tiny_lm_dir} --tokenizer_name_or_path {tmp_path}/larger"
    grown = f"--model_name_or_path {tmp_path}/grown"
    out = f"--output_dir {tmp_path}/out --use_cpu true"
    score = f"score --output {tmp_path}/scores.jsonl --reward_model {tmp_path}"
    reward = f"reward {out} --report_to none --granularity"
    ppo = f"ppo {out} --rollout_batch_size 4 --mini_batch_size 4 --reward_model {tmp_path}"
    cases = [
        f"segment {small}",
        f"{reward} token {small}",
        f"{reward} segment --entropy_threshold 1 {grown} --entropy_model {tiny_lm_dir}",
        f"fit-normalizer --reward_model {tmp_path}/small_rm",
        f"fit-normalizer --reward_model {tmp_path}/grown_rm",
        f"{score}/small_rm",
        f"{score}/grown_rm",
        f"{ppo}/small_rm {small}",
        f"{ppo}/small_rm {grown} --entropy_model policy",
    ]
    for case in cases:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        data = prompts_file if case.startswith("ppo") else pairs_file
        assert cli.main([*case.split(), "--dataset_name", str(data)]) == cli.EXIT_USER, case
        assert "expected token ids below 260, the vocab_size" in capsys.readouterr().err, case


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
