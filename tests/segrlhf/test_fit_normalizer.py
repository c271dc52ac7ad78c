import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segkernels import LocationNormalizer, ScalarNormalizer, TableNormalizer, fit_location
from segrlhf import cli, entropy_cache, fit_normalizer, score
from segrlhf.configs import DataConfig
from segrlhf.entropy_cache import EntropyCache
from segrlhf.errors import NonFiniteError, UserError
from segrlhf.fit_normalizer import FitConfig, choose
from segrlhf.models.reward_model import SegmentRewardModel
from segrlhf.reward.checkpoint import RUN_FILE
from segrlhf.score import ScoreConfig


@pytest.fixture
def make_rm(tiny_lm_dir, tokenizer, tmp_path):
    """Saves an untrained reward model as its training would."""

    def make(granularity="segment"):
        model = SegmentRewardModel.from_causal_lm(
            tiny_lm_dir,
            granularity,
            3.0 if granularity == "segment" else None,
            str(tiny_lm_dir) if granularity == "segment" else None,
        )
        path = tmp_path / f"rm_{granularity}"
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        limits = {"max_length": 48, "max_prompt_length": 40, "score_reduction": "mean"}
        (path / RUN_FILE).write_text(json.dumps(limits))
        return path

    return make


@pytest.fixture
def fit(pairs_file, tmp_path):
    def fit(rm, rows=pairs_file, **changes):
        config = FitConfig(
            reward_model=str(rm), entropy_cache_dir=str(tmp_path / "cache"), **changes
        )
        return fit_normalizer.run(DataConfig(str(rows)), config)

    return fit


def test_fits_all_segment_rewards_and_writes_them_beside_the_model(
    make_rm, fit, pairs_file, tmp_path, capsys
):
    rm = make_rm()
    weights = (rm / "model.safetensors").read_bytes()
    config = json.loads((rm / "config.json").read_text())
    result = fit(rm)

    scoring = ScoreConfig(reward_model=str(rm), output=str(tmp_path / "scores.jsonl"))
    score.run(DataConfig(str(pairs_file)), scoring)
    lines = [json.loads(x) for x in (tmp_path / "scores.jsonl").read_text().splitlines()]
    rewards = [segment["reward"] for line in lines for segment in line["segments"]]
    positions = [
        (k + 1) / len(line["segments"]) for line in lines for k in range(len(line["segments"]))
    ]
    assert result["n_segments"] == len(rewards) == sum(result["counts"])
    expected = fit_location(
        torch.tensor(positions, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64)
    )
    assert result["r2_mean"] == pytest.approx(expected.r2_mean, abs=1e-3)
    assert result["means"] == pytest.approx(expected.means.tolist(), abs=1e-4)

    model = SegmentRewardModel.from_pretrained(rm)
    assert model.normalizer.to_dict() == result["normalizer"]
    assert model.normalizer == expected.best.__class__(
        **{k: v for k, v in result["normalizer"].items() if k != "type"}
    )
    after = json.loads((rm / "config.json").read_text())
    assert after["segment_reward"].pop("normalizer") == result["normalizer"]
    config["segment_reward"].pop("normalizer")
    assert after == config
    assert (rm / "model.safetensors").read_bytes() == weights
    assert json.loads((rm / "normalizer.json").read_text()) == result
    assert "<svg" in (rm / "normalizer.svg").read_text()
    assert "ln p" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["line", "table", "scalar"])
def test_the_form_may_be_chosen(make_rm, fit, kind):
    rm = make_rm("token")
    assert fit(rm, kind=kind)["kind"] == kind
    kinds = {"line": LocationNormalizer, "table": TableNormalizer, "scalar": ScalarNormalizer}
    assert isinstance(SegmentRewardModel.from_pretrained(rm).normalizer, kinds[kind])


def test_auto_takes_the_table_where_the_line_explains_less_than_half():
    scalar = ScalarNormalizer(0.0, 1.0)
    for r2, best in ((0.4, "table"), (0.6, "line")):
        fit = SimpleNamespace(line="line", table="table", best=best, r2_mean=r2)
        assert choose("auto", "segment", fit, scalar) == best
    assert choose("auto", "bandit", fit, scalar) is scalar


def test_a_bandit_model_gets_the_mean_and_std_of_its_rewards(make_rm, fit):
    result = fit(make_rm("bandit"))
    assert result["kind"] == "scalar"
    assert result["n_segments"] == 48
    assert result["normalizer"]["mean"] == pytest.approx(result["means"][0])


def test_the_training_cache_is_read(
    make_rm, fit, tokenizer, tiny_lm_dir, pairs_file, tmp_path, monkeypatch
):
    rm = make_rm()
    whole = fit(rm)  # builds the cache of all pairs

    def loaded(*args, **kwargs):
        raise AssertionError("the entropy model was loaded")

    monkeypatch.setattr(entropy_cache, "load_causal_lm", loaded)
    assert fit(rm)["means"] == whole["means"]
    part = fit(rm, max_pairs=5, seed=1)
    assert part["n_pairs"] == 5
    assert part["n_segments"] < whole["n_segments"]
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 1


def test_without_a_cache_only_the_sample_is_computed(make_rm, fit, tmp_path):
    rm = make_rm()
    fresh = fit(rm, max_pairs=5, seed=1)
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    assert len(EntropyCache(meta.parent)) == 5
    fit(rm)
    assert fit(rm, max_pairs=5, seed=1)["means"] == pytest.approx(fresh["means"], abs=1e-5)


def test_a_training_cache_that_is_damaged_is_not_read(make_rm, fit, tmp_path, capsys):
    rm = make_rm()
    whole = fit(rm)
    (path,) = (tmp_path / "cache").glob("*/entropy.npy")
    np.save(path, -np.load(path))
    assert fit(rm)["means"] == pytest.approx(whole["means"], abs=1e-5)
    said = capsys.readouterr().out
    assert "expected the numbers that were written, got others in 48 responses" in said


def test_non_finite_rewards_name_the_row_and_write_nothing(make_rm, fit, monkeypatch):
    rm = make_rm()
    before = (rm / "config.json").read_bytes()
    real = SegmentRewardModel.forward

    def forward(self, input_ids, attention_mask=None, **kwargs):
        rewards = real(self, input_ids, attention_mask, **kwargs)
        return torch.where((input_ids == 46).any(1)[:, None], math.inf, rewards)

    monkeypatch.setattr(SegmentRewardModel, "forward", forward)
    with pytest.raises(NonFiniteError, match=r"got inf at segment 0 of row \d+ \(chosen\)"):
        fit(rm)
    assert (rm / "config.json").read_bytes() == before
    assert not (rm / "normalizer.json").exists()


def test_bad_input(make_rm, fit, prompts_file, pairs_file, capsys):
    with pytest.raises(UserError, match=r"expected a directory with config.json, .*hf download"):
        fit("somebody/some-model")
    with pytest.raises(UserError, match=r"expected the columns chosen and rejected"):
        fit(make_rm("token"), prompts_file)
    with pytest.raises(UserError, match=r"max_pairs: expected a whole number, at least 1, got 0"):
        fit(make_rm("token"), max_pairs=0)
    words = ["--reward_model", make_rm("bandit"), "--dataset_name", pairs_file]
    assert cli.main(["fit-normalizer", *map(str, words), "--granularity", "token"]) == 2
    assert "granularity: expected bandit" in capsys.readouterr().err
