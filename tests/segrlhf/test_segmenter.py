import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from segkernels import segment_ends
from segrlhf import data, modeling, segmenter
from segrlhf.configs import DataConfig, ModelConfig
from segrlhf.errors import NonFiniteError, UserError


@pytest.fixture(scope="module")
def pairs(pair_rows, tokenizer):
    return data.tokenize_pairs(
        Dataset.from_list(pair_rows), tokenizer, max_length=48, max_prompt_length=40
    )[0]


@pytest.fixture
def build(tiny_lm_dir, tokenizer, pairs, tmp_path):
    def build(rows=pairs, model=tiny_lm_dir, **options):
        return segmenter.build_entropy_cache(
            str(model), tokenizer, rows, cache_dir=tmp_path / "cache", **options
        )

    return build


def forbid(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(modeling, "load_causal_lm", loaded)


def test_entropies_are_those_of_each_response_alone(build, pairs, tiny_lm):
    cache = build(batch_size=5)
    assert cache.complete
    assert len(cache) == len(pairs)
    for i in (0, 7, len(pairs) - 1):
        for side, entropy in zip(segmenter.SIDES, cache[i], strict=True):
            prompt, response = pairs[i]["prompt_ids"], pairs[i][f"{side}_ids"]
            with torch.no_grad():
                logits = tiny_lm(torch.tensor([prompt + response])).logits[0]
            # Logits at a position are the distribution of the token after it.
            of_response = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
            expected = -(of_response.exp() * of_response).sum(-1)
            assert entropy.shape == (len(response),)
            np.testing.assert_allclose(entropy, expected, atol=2e-5)


def test_reading_a_finished_cache_needs_no_model(build, monkeypatch):
    first = build()
    forbid(monkeypatch)
    again = build()
    assert again.directory == first.directory
    np.testing.assert_array_equal(again.response(3), first.response(3))


def test_a_build_that_was_cut_off_resumes_where_it_was(build, monkeypatch, pairs):
    real, seen = segmenter.entropies, []

    def three_batches(model, prompts, responses, names):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(names)
        return real(model, prompts, responses, names)

    monkeypatch.setattr(segmenter, "entropies", three_batches)
    with pytest.raises(KeyboardInterrupt):
        build(batch_size=4)
    done = {name for names in seen for name in names}

    def rest(model, prompts, responses, names):
        assert not done & set(names)
        done.update(names)
        return real(model, prompts, responses, names)

    monkeypatch.setattr(segmenter, "entropies", rest)
    cache = build(batch_size=4)
    assert cache.complete
    assert len(done) == 2 * len(pairs)


def test_a_response_that_was_half_written_is_computed_again(build):
    cache = build()
    expected = np.array(cache.response(5))
    with cache.writer() as write:
        write(5, np.full_like(expected, np.nan)[:2])
    segmenter.files.write_json(cache.directory / "meta.json", {"complete": False, "format": 1})
    assert segmenter.EntropyCache(cache.directory).missing() == [5]
    np.testing.assert_allclose(build().response(5), expected, atol=1e-6)


def test_the_key_follows_model_tokenizer_template_and_data(
    tiny_lm, tiny_lm_dir, tokenizer, chat_tokenizer, pairs, tmp_path
):
    def key(model=tiny_lm_dir, tokenizer=tokenizer, pairs=pairs):
        return segmenter.cache_directory(str(model), tokenizer, pairs, cache_dir=tmp_path)

    other = LlamaForCausalLM(tiny_lm.config)
    other.load_state_dict(tiny_lm.state_dict())
    other.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    assert key() == key(model=tmp_path / "same")
    reordered = pairs.select([*range(1, len(pairs)), 0])
    different = [
        key(),
        key(model=tmp_path / "other"),
        key(tokenizer=chat_tokenizer),
        key(pairs=reordered),
        key(pairs=pairs.select(range(3))),
    ]
    assert len(set(different)) == len(different)


def test_non_finite_entropy_names_the_row(build, tiny_lm, pairs, tmp_path):
    broken = LlamaForCausalLM(tiny_lm.config)
    broken.load_state_dict(tiny_lm.state_dict())
    with torch.no_grad():
        broken.model.embed_tokens.weight[pairs[1]["rejected_ids"][-2]] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match=r"got nan at token \d+ of the response of row \d+ \("):
        build(model=tmp_path / "broken")


def test_a_damaged_cache_says_so(build):
    cache = build()
    (cache.directory / "offsets.npy").unlink()
    with pytest.raises(UserError, match=r"offsets\.npy.*delete the directory and build it again"):
        build()


def test_weights_must_be_safetensors(build, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"expected \*\.safetensors weights, got none in .*bare"):
        build(model=tmp_path / "bare")


def test_pairs_carry_their_number_and_entropies(build, pairs):
    cache = build()
    row = segmenter.Pairs(pairs, cache)[4]
    assert row["row"] == 4
    np.testing.assert_array_equal(row["rejected_entropy"], cache[4][1])
    assert "chosen_entropy" not in segmenter.Pairs(pairs)[4]


@pytest.mark.parametrize("threshold", [0.5, 2.5])
def test_cut_counts_the_segments_of_each_response(build, pairs, threshold):
    cache = build()
    row = segmenter.cut(cache, pairs, threshold)
    counts, tokens = [], []
    for i in range(len(pairs)):
        for side, entropy in zip(segmenter.SIDES, cache[i], strict=True):
            ends = segment_ends(
                torch.from_numpy(np.array(entropy))[None],
                torch.ones(1, len(entropy), dtype=torch.bool),
                threshold,
                entropy_of="current",
                exclude_last=pairs[i][f"{side}_terminated"],
            )[0]
            at = ends.nonzero().squeeze(1).tolist()
            counts.append(len(at))
            tokens += [end - start for start, end in zip([-1, *at], at, strict=False)]
    np.testing.assert_array_equal(row.segments, counts)
    np.testing.assert_array_equal(row.tokens, tokens)


def test_run_prints_a_table_and_how_to_choose(tiny_lm_dir, pairs_file, tmp_path, capsys):
    result = segmenter.run(
        ModelConfig(str(tiny_lm_dir)),
        DataConfig(str(pairs_file), eval_size=0.25),
        segmenter.SegmentConfig(thresholds=[1.0, 4.0], entropy_cache_dir=str(tmp_path)),
    )
    out = capsys.readouterr().out
    assert "tokens per segment" in out
    assert "example at 4.0: " in out
    assert "Choose a threshold" in out
    low, high = result["thresholds"]
    assert low["segments_per_response"] > high["segments_per_response"] >= 1
    assert len(list(tmp_path.glob("*/entropy.npy"))) == 2  # train and eval rows


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_thresholds_are_checked(tiny_lm_dir, pairs_file, bad):
    config = segmenter.SegmentConfig(thresholds=[1.0, bad])
    with pytest.raises(UserError, match=r"thresholds: expected a finite number of nats >= 0, got"):
        segmenter.run(ModelConfig(str(tiny_lm_dir)), DataConfig(str(pairs_file)), config)
