"""The scripts of examples/ that no other test runs."""

import json
import runpy
import sys
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

from segrlhf.configs import ModelConfig
from segrlhf.models.loading import load_causal_lm, load_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_small_lm_writes_a_language_model(tmp_path, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "Say it. ", "chosen": "It is said.", "rejected": "No, I will not say it."}
    pairs.write_text(f"{json.dumps(row)}\n" * 8)
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    out = tmp_path / "lm"
    flags = {"dataset_name": pairs, "vocab": tmp_path / "vocab.json", "output_dir": out}
    flags |= {"merges": tmp_path / "merges.txt", "steps": 2, "hidden_size": 16, "layers": 1}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["small_lm.py", *words])
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as for a script that is started there
    runpy.run_path(str(EXAMPLES / "small_lm.py"), run_name="__main__")
    assert load_causal_lm(ModelConfig(str(out))).config.vocab_size == len(tokens)
    assert load_tokenizer(out).eos_token == "<|endoftext|>"
