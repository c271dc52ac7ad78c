"""The demonstration from end to end, with everything tiny."""

import json
import pickle
import re

import corpus
import pytest
import run as demo

from segrlhf.errors import UserError

TINY = {
    "n_texts": 200,
    "lm_steps": 20,
    "n_prompts": 16,
    "n_eval_prompts": 8,
    "n_pairs": 48,
    "n_eval_pairs": 16,
    "response_length": 24,
    "updates": 2,
    "eval_every": 1,
    "rollouts": 8,
    "mini_batch_size": 8,
    "seeds": 2,
    "gold": "letters",
    "jobs": 1,
}


def _letters(text):
    """A taste that even a model of a few steps can meet: texts with the letter e."""
    for i, letter in enumerate(text):
        if letter == "e":
            yield i, i + 1, f"e at {i}", 1.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        rule = corpus.Gold("letters", "a letter e is worth one", 1.0, _letters)
        patch.setitem(corpus.GOLD, "letters", rule)
        return out, demo.run(demo.DemoConfig(output_dir=str(out), **TINY))


def test_every_variant_runs_with_the_same_settings(run):
    _, results = run
    assert set(results["runs"]) == {"bandit", "token", "segment", "segment mean at last token"}
    for runs in results["runs"].values():
        assert len(runs) == 2  # seeds
        for one in runs:
            assert [point["update"] for point in one["curve"]] == [0, 1, 2]
    assert set(results["reward_models"]) == {"bandit", "token", "segment"}


def test_the_starting_point_is_shared(run):
    """Before any update the variants of one seed are the same policy with the same samples."""
    _, results = run
    for seed in range(2):
        starts = {runs[seed]["curve"][0]["gold"] for runs in results["runs"].values()}
        assert len(starts) == 1


def test_files_tell_the_whole_run(run):
    out, results = run
    kept = json.loads((out / "results.json").read_text())
    assert kept["settings"]["seeds"] == 2
    assert kept["baselines"].keys() == results["baselines"].keys()
    html = (out / "report.html").read_text()
    table = (out / "table.md").read_text()
    for name in ("bag of tokens", "longer response wins", *results["runs"]):
        assert name in table
        assert name in html
    assert "seeds" in table
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert all(target.startswith("#") for target in re.findall(r'href="(.*?)"', html))
    assert "src=" not in html
    assert (out / "pairs" / "train.jsonl").is_file()
    assert (out / "segments.svg").read_text().startswith("<svg")


def test_what_workers_are_sent_crosses_processes():
    """Gold rule and prompts go to worker processes by pickle."""
    gold = pickle.loads(pickle.dumps(corpus.gold_rule("phrases").reward))
    assert gold("quiet lanterns wait by moonlight") == 1.0


def test_bad_flags_are_one_line_and_a_status(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "--seeds", "0"])
    assert demo.main() == 2
    assert capsys.readouterr().err == "demo: seeds: expected at least 1, got 0\n"


def test_an_earlier_run_is_left_alone(tmp_path, capsys):
    first = demo.new_output_dir(str(tmp_path / "demo"))
    (first / "table.md").write_text("precious")
    second = demo.new_output_dir(str(tmp_path / "demo"))
    assert second.name == "demo-2"
    assert "is left alone" in capsys.readouterr().out
    assert (first / "table.md").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds: expected at least 1, got 0"),
        ({"jobs": 0}, "jobs: expected at least 1, got 0"),
        ({"gold": "silver"}, "gold: expected one of phrases, stories, got 'silver'"),
        ({"entropy_threshold": -1.0}, "entropy_threshold: expected a finite number of nats"),
        ({"n_prompts": 10**6}, "n_prompts: expected n_prompts and n_eval_prompts within"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        demo.DemoConfig(**options)
