import json
import math

import pytest
import torch

from segkernels import LocationNormalizer
from segrlhf import cli
from segrlhf.configs import DataConfig, ModelConfig
from segrlhf.data.render import Renderer
from segrlhf.errors import NonFiniteError, UserError
from segrlhf.models.lm_head import token_stats
from segrlhf.models.loading import load_causal_lm
from segrlhf.models.reward_model import SegmentRewardModel
from segrlhf.reward.checkpoint import RUN_FILE
from segrlhf.score import ScoreConfig, run


@pytest.fixture
def make_rm(tiny_lm_dir, tokenizer, tmp_path):
    """Saves an untrained reward model."""

    def make(granularity="segment", normalizer=None, run=None):
        model = SegmentRewardModel.from_causal_lm(
            tiny_lm_dir,
            granularity,
            3.0 if granularity == "segment" else None,
            str(tiny_lm_dir) if granularity == "segment" else None,
        )
        model.normalizer = normalizer
        path = tmp_path / f"rm_{granularity}"
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        if run:
            (path / RUN_FILE).write_text(json.dumps(run))
        return path

    return make


@pytest.fixture
def score(tmp_path):
    def score(rm, rows, output="scores.jsonl", **changes):
        config = ScoreConfig(reward_model=str(rm), output=str(tmp_path / output), **changes)
        result = run(DataConfig(str(rows)), config)
        text = (tmp_path / output).read_text()
        return result, [
            json.loads(line) for line in text.splitlines()
        ] if "jsonl" in output else text

    return score


def test_pairs_are_scored_segment_by_segment(
    make_rm, score, pairs_file, pair_rows, tokenizer, capsys
):
    normalizer = LocationNormalizer(0.1, 0.5, 0.0, 2.0)
    rm = make_rm(normalizer=normalizer)
    result, lines = score(rm, pairs_file, max_tokens_per_batch=200)
    assert len(lines) == 2 * len(pair_rows)
    assert [line["label"] for line in lines[:4]] == ["chosen", "rejected"] * 2
    assert [line["id"] for line in lines[:4]] == [0, 0, 1, 1]

    model = SegmentRewardModel.from_pretrained(rm)
    causal = load_causal_lm(ModelConfig(model.entropy_model))
    line, row = lines[5], pair_rows[2]
    assert (line["prompt"], line["response"]) == (row["prompt"], row["rejected"])
    prompt, (ids,) = Renderer(tokenizer).pair(row["prompt"], [row["rejected"]])
    batch = torch.tensor([prompt + ids])
    mask = torch.arange(batch.shape[1])[None] >= len(prompt)
    with torch.no_grad():
        _, entropy = token_stats(causal, batch, torch.ones_like(batch), mask)
        rewards = model(batch)
    at_ends = rewards[model.segment_ends(entropy, mask)]
    found = torch.tensor([segment["reward"] for segment in line["segments"]])
    torch.testing.assert_close(found, at_ends, atol=1e-5, rtol=1e-5)
    assert line["score"] == pytest.approx(float(at_ends.mean()), abs=1e-5)
    p = torch.arange(1, len(found) + 1) / len(found)
    normalized = torch.tensor([segment["normalized"] for segment in line["segments"]])
    torch.testing.assert_close(normalized, normalizer(found, p))

    for line in lines:
        assert "".join(s["text"] for s in line["segments"]) == line["response"]
        for s in line["segments"]:
            assert line["response"][s["start"] : s["end"]] == s["text"]
    right = [a["score"] > b["score"] for a, b in zip(lines[::2], lines[1::2], strict=True)]
    assert result["accuracy"] == pytest.approx(sum(right) / len(right))
    assert "'the longer response wins' is right for" in capsys.readouterr().out


def test_prompt_and_response_rows(make_rm, score, write_jsonl, tmp_path):
    rows = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"id": "a", "prompt": "Say it:", "response": " caf\u00e9 \u2615!"},
            {"id": "b", "prompt": "Say it:", "response": ""},
            {"id": "c", "prompt": "x" * 50, "response": "too long"},
        ],
    )
    result, lines = score(make_rm("token"), rows, max_prompt_length=20)
    assert result == {"output": str(tmp_path / "scores.jsonl"), "responses": 1, "skipped": 2}
    (line,) = lines
    assert (line["id"], line["label"]) == ("a", None)
    assert line["response"] == " caf\u00e9 \u2615!"
    # One segment per byte: characters of several bytes appear once, at the last of them.
    assert len(line["segments"]) == len(line["response"].encode())
    assert [s["text"] for s in line["segments"] if s["text"]] == list(line["response"])
    assert line["segments"][0]["normalized"] is None


def test_score_reduction_is_that_of_the_training(make_rm, score, pairs_file):
    _, lines = score(make_rm("token", run={"score_reduction": "sum"}), pairs_file)
    line = lines[0]
    assert line["score"] == pytest.approx(sum(s["reward"] for s in line["segments"]), rel=1e-4)


def test_bandit_has_one_segment(make_rm, score, pairs_file):
    _, lines = score(make_rm("bandit"), pairs_file)
    assert all(len(line["segments"]) == 1 for line in lines)
    assert lines[0]["segments"][0]["text"] == lines[0]["response"]


def test_html(make_rm, score, pairs_file):
    _, page = score(make_rm(), pairs_file, "scores.html")
    assert page.startswith("<!doctype html>")
    assert "Tell me about tea:" in page
    assert "data-reward" in page


def test_bandit_model_has_no_segment_rewards(make_rm, pairs_file, tmp_path, capsys):
    words = ["--reward_model", make_rm("bandit"), "--dataset_name", pairs_file]
    words += ["--granularity", "segment", "--output", tmp_path / "out.jsonl"]
    assert cli.main(["score", *map(str, words)]) == cli.EXIT_USER
    said = capsys.readouterr().err
    assert "granularity: expected bandit, with which" in said
    assert "got segment" in said
    assert not (tmp_path / "out.jsonl").exists()


def test_a_segment_model_needs_its_entropy_model(make_rm, score, pairs_file):
    rm = make_rm()
    config = json.loads((rm / "config.json").read_text())
    config["segment_reward"]["entropy_model"] = None
    (rm / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"entropy_model: expected the frozen LM .*--entropy_model"):
        score(rm, pairs_file)


def test_non_finite_rewards_name_the_row(make_rm, score, pairs_file, monkeypatch):
    real = SegmentRewardModel.forward

    def forward(self, input_ids, attention_mask=None, **kwargs):
        rewards = real(self, input_ids, attention_mask, **kwargs)
        never = (input_ids == 46).any(1)  # the byte "O" of "Of course"
        return torch.where(never[:, None], math.nan, rewards)

    monkeypatch.setattr(SegmentRewardModel, "forward", forward)
    with pytest.raises(NonFiniteError, match=r"got nan at segment 0 of row \d+ \(chosen\)"):
        score(make_rm(), pairs_file)


def test_bad_input(make_rm, score, pairs_file, prompts_file, write_jsonl, tmp_path):
    rm = make_rm("token")
    with pytest.raises(
        UserError, match=r"expected the columns prompt and response, .* got prompt in "
    ):
        score(rm, prompts_file)
    with pytest.raises(
        UserError, match=r"expected a name ending in .jsonl or .html, got .*out.csv"
    ):
        score(rm, pairs_file, "out.csv")
    (tmp_path / "mine.jsonl").write_text("precious")
    with pytest.raises(UserError, match=r"expected a new file, got .*mine.jsonl, which exists"):
        score(rm, pairs_file, "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "precious"
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "a", "response": ""}])
    with pytest.raises(UserError, match=r"expected at least one usable row, got 1 with an empty"):
        score(rm, empty)


def test_a_tokenizer_from_elsewhere(make_rm, score, chat_tokenizer, tmp_path, write_jsonl):
    rm = make_rm("token")
    (rm / "tokenizer.json").unlink()
    (rm / "tokenizer_config.json").unlink()
    message = [{"role": "user", "content": "hi"}]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": message, "response": "yes"}])
    with pytest.raises(UserError, match=r"tokenizer: .* pass --tokenizer_name_or_path"):
        score(rm, rows)
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    template = tmp_path / "template.jinja"
    template.write_text(chat_tokenizer.chat_template.replace("<|end|>", "</s>"))
    here = {"tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    (line,) = score(rm, rows, **here)[1]
    assert line["prompt"] == "<s><|user|>hi<|end|>\n<|assistant|>"
    (line,) = score(rm, rows, "other.jsonl", **here, chat_template_path=str(template))[1]
    assert line["prompt"] == "<s><|user|>hi</s>\n<|assistant|>"


def test_rows_are_read_as_in_training(make_rm, score, tmp_path, write_jsonl):
    trained = {"max_length": 8, "max_prompt_length": 3, "truncation_side": "left"}
    rm = make_rm("bandit", run={**trained, "force_eos": True})
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "abcdef", "response": "0123456789"}])
    (line,) = score(rm, rows)[1]
    assert line["response"] == "0123"  # and EOS, after the last 3 tokens of the prompt
    assert score(rm, rows, "other.jsonl", force_eos=False)[1][0]["response"] == "01234"
    with pytest.raises(
        UserError, match=r"got 1 with an empty response or a prompt that is .* over 3"
    ):
        score(rm, rows, "none.jsonl", truncation_side="none")
