import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from segrlhf import entropy_cache
from segrlhf.entropy_cache import SIDES, EntropyCache, Pairs, cache_directory
from segrlhf.errors import NonFiniteError, UserError
from segrlhf.runtime import files


def forbid(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(entropy_cache, "load_causal_lm", loaded)


def test_entropies_are_those_of_each_response_alone(build_cache, pairs, tiny_lm):
    cache = build_cache(batch_size=5)
    assert cache.complete
    assert len(cache) == len(pairs)
    for i in (0, 7, len(pairs) - 1):
        for side, entropy in zip(SIDES, cache[i], strict=True):
            prompt, response = pairs[i]["prompt_ids"], pairs[i][f"{side}_ids"]
            with torch.no_grad():
                logits = tiny_lm(torch.tensor([prompt + response])).logits[0]
            # Logits at a position are the distribution of the token after it.
            of_response = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
            expected = -(of_response.exp() * of_response).sum(-1)
            assert entropy.shape == (len(response),)
            np.testing.assert_allclose(entropy, expected, atol=2e-5)


def test_reading_a_finished_cache_needs_no_model(build_cache, monkeypatch):
    first = build_cache()
    forbid(monkeypatch)
    again = build_cache()
    assert again.directory == first.directory
    np.testing.assert_array_equal(again.response(3), first.response(3))


def test_a_build_that_was_cut_off_resumes_where_it_was(build_cache, monkeypatch, pairs):
    real, seen = entropy_cache.entropies, []

    def three_batches(model, prompts, responses, names):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(names)
        return real(model, prompts, responses, names)

    monkeypatch.setattr(entropy_cache, "entropies", three_batches)
    with pytest.raises(KeyboardInterrupt):
        build_cache(batch_size=4)
    done = {name for names in seen for name in names}

    def rest(model, prompts, responses, names):
        assert not done & set(names)
        done.update(names)
        return real(model, prompts, responses, names)

    monkeypatch.setattr(entropy_cache, "entropies", rest)
    cache = build_cache(batch_size=4)
    assert cache.complete
    assert len(done) == 2 * len(pairs)


def test_a_response_that_was_half_written_is_computed_again(build_cache):
    cache = build_cache()
    expected = np.array(cache.response(5))
    with cache.writer() as write:
        write(5, np.full_like(expected, np.nan)[:2])
    files.write_json(cache.directory / "meta.json", {"complete": False, "format": 1})
    assert EntropyCache(cache.directory).missing() == [5]
    np.testing.assert_allclose(build_cache().response(5), expected, atol=1e-6)


def test_the_key_follows_model_tokenizer_template_and_data(
    tiny_lm, tiny_lm_dir, tokenizer, chat_tokenizer, pairs, tmp_path
):
    def key(model=tiny_lm_dir, tokenizer=tokenizer, pairs=pairs):
        return cache_directory(str(model), tokenizer, pairs, cache_dir=tmp_path)

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


def test_non_finite_entropy_names_the_row(build_cache, tiny_lm, pairs, tmp_path):
    broken = LlamaForCausalLM(tiny_lm.config)
    broken.load_state_dict(tiny_lm.state_dict())
    with torch.no_grad():
        broken.model.embed_tokens.weight[pairs[1]["rejected_ids"][-2]] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match=r"got nan at token \d+ of the response of row \d+ \("):
        build_cache(model=tmp_path / "broken")


def test_a_damaged_cache_says_so(build_cache):
    cache = build_cache()
    (cache.directory / "offsets.npy").unlink()
    with pytest.raises(UserError, match=r"offsets\.npy.*delete the directory and build it again"):
        build_cache()


def test_weights_must_be_safetensors(build_cache, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"expected \*\.safetensors weights, got none in .*bare"):
        build_cache(model=tmp_path / "bare")


def test_pairs_carry_their_number_and_entropies(build_cache, pairs):
    cache = build_cache()
    row = Pairs(pairs, cache)[4]
    assert row["row"] == 4
    np.testing.assert_array_equal(row["rejected_entropy"], cache[4][1])
    assert "chosen_entropy" not in Pairs(pairs)[4]
