"""segrlhf.data: formats, preference rows, chat templates, hold-out, collation, bad rows."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from datasets import Dataset, DatasetDict

from segrlhf import data
from segrlhf.configs import DataConfig
from segrlhf.data import PairCollator, Renderer, load_rows, load_split, tokenize_pairs
from segrlhf.errors import UserError

LIMITS = {"max_length": 64, "max_prompt_length": 32}
PAD, BOS, EOS, TURN = 256, 257, 258, 259


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pairs_of(*rows):
    return Dataset.from_list(list(rows))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# Formats


def write_json_list(path, rows):
    path.write_text(json.dumps(rows))


def write_lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as handle:
            handle.write(text)
    else:
        path.write_text(text)


def write_parquet(path, rows):
    Dataset.from_list(rows).to_parquet(path)


def write_csv(path, rows):
    Dataset.from_list(rows).to_csv(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.json", write_json_list),
        ("rows.jsonl", write_lines),
        ("rows.jsonl.gz", write_lines),
        ("rows.json.gz", write_lines),
        ("rows.parquet", write_parquet),
        ("rows.csv", write_csv),
    ],
)
def test_files(name, write, pair_rows, tmp_path):
    write(tmp_path / name, pair_rows)
    assert load_rows(str(tmp_path / name), "train").to_list() == pair_rows


def test_directories(pair_rows, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    write_lines(files / "train.jsonl.gz", pair_rows[:5])
    write_lines(files / "test.jsonl", pair_rows[5:7])
    assert load_rows(str(files), "train").to_list() == pair_rows[:5]
    assert load_rows(str(files), "test").to_list() == pair_rows[5:7]

    Dataset.from_list(pair_rows).save_to_disk(tmp_path / "saved")
    assert load_rows(str(tmp_path / "saved"), "train").to_list() == pair_rows
    splits = DatasetDict(train=pairs_of(*pair_rows[:3]), test=pairs_of(*pair_rows[3:]))
    splits.save_to_disk(tmp_path / "splits")
    assert load_rows(str(tmp_path / "splits"), "test").to_list() == pair_rows[3:]


@pytest.mark.parametrize("content", ["", "\n\n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv"])
def test_empty_file(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    with pytest.raises(UserError, match="expected rows, got the empty file"):
        load_rows(str(path), "train")


def test_file_without_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen\n")
    with pytest.raises(UserError, match=r"rows\.csv, which cannot be read: .* no data"):
        load_rows(str(tmp_path / "rows.csv"), "train")


def test_file_that_cannot_be_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"rows\.jsonl, which cannot be read: JSON parse error"):
        load_rows(str(tmp_path / "rows.jsonl"), "train")
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(UserError, match=r"expected a file ending in \.json, \.jsonl, \.parquet"):
        load_rows(str(tmp_path / "rows.txt"), "train")
    with pytest.raises(UserError, match=r"directory or a hub name, got .*nothing, which cannot be"):
        load_rows(str(tmp_path / "nothing"), "train")


def test_unknown_split(pairs_file):
    with pytest.raises(UserError, match=r"split: expected one of train of .*, got 'test'"):
        load_rows(str(pairs_file), "test")
    with pytest.raises(UserError, match="dataset_train_split: expected one of train"):
        load_split(DataConfig(str(pairs_file), dataset_train_split="learn"), "train")


# Splits


def test_hold_out_keeps_a_prompt_on_one_side(pairs_file, pair_rows):
    config = DataConfig(str(pairs_file), eval_size=0.25)
    train, held = load_split(config, "train"), load_split(config, "eval")
    assert len(set(held["prompt"])) == 2
    assert not set(train["prompt"]) & set(held["prompt"])
    assert sorted(train["chosen"][:] + held["chosen"][:]) == sorted(r["chosen"] for r in pair_rows)
    assert load_split(config, "eval").to_list() == held.to_list()


def test_hold_out_with_implicit_prompts(tmp_path):
    rows = [
        {
            "chosen": f"Human: {q}?\n\nAssistant: {a} yes",
            "rejected": f"Human: {q}?\n\nAssistant: {b}",
        }
        for q in "abcdefgh"
        for a, b in [("I think so", "I do not"), ("Sure", "No"), ("I", "I think")]
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    config = DataConfig(str(tmp_path / "rows.jsonl"), eval_size=0.5)
    questions = [
        {row["chosen"][7] for row in load_split(config, side)} for side in ("train", "eval")
    ]
    assert [len(q) for q in questions] == [4, 4]
    assert not questions[0] & questions[1]


def test_split_without_hold_out(pairs_file, pair_rows, tmp_path):
    plain = DataConfig(str(pairs_file))
    assert len(load_split(plain, "train")) == len(pair_rows)
    assert load_split(plain, "eval") is None
    assert len(load_split(DataConfig(str(pairs_file), max_samples=5), "train")) == 5
    write_lines(tmp_path / "train.jsonl", pair_rows[:5])
    write_lines(tmp_path / "test.jsonl", pair_rows[5:7])
    both = DataConfig(str(tmp_path), eval_size=0.5)
    assert len(load_split(both, "train")) == 5
    assert load_split(both, "eval").to_list() == pair_rows[5:7]


def test_bad_split_sizes(pairs_file, tmp_path):
    for size in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"eval_size: expected a share in \[0, 1\)"):
            load_split(DataConfig(str(pairs_file), eval_size=size), "train")
    with pytest.raises(UserError, match="max_samples: expected at least 1, got 0"):
        load_split(DataConfig(str(pairs_file), max_samples=0), "train")
    config = DataConfig(str(pairs_file), eval_size=0.5, max_samples=2)
    with pytest.raises(UserError, match="at least two different prompts to divide, got 1"):
        load_split(config, "train")
    write_lines(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"expected a column prompt .*, got text"):
        load_split(DataConfig(str(tmp_path / "rows.jsonl"), eval_size=0.5), "train")


# Plain rows


def test_plain_pairs(tokenizer, pair_rows):
    pairs, report = tokenize_pairs(Dataset.from_list(pair_rows), tokenizer, **LIMITS)
    assert (report.n_rows, report.n_kept, report.truncated) == (24, 24, 0)
    assert report.summary() == "24 rows: 24 kept"
    for ids, row in zip(pairs, pair_rows, strict=True):
        assert ids["prompt_ids"] == [BOS, *ids_of(tokenizer, row["prompt"])]
        assert ids["chosen_ids"] == [*ids_of(tokenizer, row["chosen"]), EOS]
        assert ids["rejected_ids"] == [*ids_of(tokenizer, row["rejected"]), EOS]
        assert ids["chosen_terminated"] is True
    assert set(pairs.column_names) == {
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "chosen_terminated",
        "rejected_terminated",
    }


def test_implicit_prompt(tokenizer):
    row = {"chosen": "Human: hi\n\nAssistant: Hello", "rejected": "Human: hi\n\nAssistant: Hey"}
    assert data.split_pair(row) == ("Human: hi\n\nAssistant:", " Hello", " Hey")
    pairs, _ = tokenize_pairs(pairs_of(row), tokenizer, **LIMITS)
    assert tokenizer.decode(pairs[0]["prompt_ids"]) == "<s>Human: hi\n\nAssistant:"
    assert tokenizer.decode(pairs[0]["chosen_ids"]) == " Hello</s>"


def test_nothing_in_common_leaves_the_bos_token(tokenizer, make_tokenizer):
    rows = pairs_of(
        {"prompt": None, "chosen": "yes", "rejected": "no"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    )
    pairs, report = tokenize_pairs(rows, tokenizer, **LIMITS)
    assert pairs[0]["prompt_ids"] == [BOS]
    _, report = tokenize_pairs(rows, make_tokenizer(bos=False), **LIMITS)
    assert (report.n_kept, report.no_prompt) == (1, 1)
    assert report.summary() == "2 rows: 1 kept; 1 dropped without a prompt token"


def test_response_ids_are_those_after_the_prompt(tokenizer):
    """Where a token would reach across the border, the response stands on its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "b": 1, "▁a": 2, "▁": 3, "ab": 4, "</s>": 5, "▁b": 6}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b"), ("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    render = Renderer(tok)
    # alone, " a" would get a second space in front
    assert render.pair("b", [" a"]) == ([6], [[2, 5]])
    assert render.pair("ba", ["b"]) == ([6, 0], [[6, 5]])


def test_truncation_takes_the_end_token(tokenizer):
    rows = pairs_of({"prompt": "12345", "chosen": "abcd", "rejected": "abcdefgh"})
    pairs, report = tokenize_pairs(rows, tokenizer, max_length=11, max_prompt_length=8)
    assert pairs[0]["chosen_ids"][-1] == EOS
    assert pairs[0]["rejected_ids"] == ids_of(tokenizer, "abcde")
    assert (pairs[0]["chosen_terminated"], pairs[0]["rejected_terminated"]) == (True, False)
    assert report.summary() == "1 rows: 1 kept; 1 kept with a response cut at 11 tokens"


def test_bad_rows_are_counted(tokenizer):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = pairs_of(
        good,
        {**good, "prompt": "p" * 40},
        {**good, "chosen": "b"},
        {**good, "chosen": "b" * 80 + "x", "rejected": "b" * 80},  # equal after the cut
        {**good, "chosen": "  "},
        {**good, "rejected": None},
        {**good, "rejected": ""},
    )
    pairs, report = tokenize_pairs(rows, tokenizer, **LIMITS)
    assert len(pairs) == report.n_kept == 1
    assert report.summary() == (
        "7 rows: 1 kept; 1 dropped with a prompt over 32 tokens; 2 dropped with chosen equal to "
        "rejected; 3 dropped with an empty text"
    )


def test_no_row_left(tokenizer):
    rows = pairs_of({"prompt": "p", "chosen": "same", "rejected": "same"})
    with pytest.raises(
        UserError, match="at least one usable row, got 1 rows: 0 kept; 1 dropped with chosen equal"
    ):
        tokenize_pairs(rows, tokenizer, **LIMITS)


def test_missing_columns(tokenizer):
    with pytest.raises(
        UserError,
        match=r"expected the columns chosen and rejected .*, got prompt; these are prompts",
    ):
        tokenize_pairs(pairs_of({"prompt": "p"}), tokenizer, **LIMITS)
    with pytest.raises(UserError, match=r"expected the columns .*, got chosen, question; rename"):
        tokenize_pairs(pairs_of({"chosen": "p", "question": "q"}), tokenizer, **LIMITS)
    with pytest.raises(UserError, match="expected a column prompt, got text"):
        data.tokenize_prompts(pairs_of({"text": "p"}), tokenizer, max_prompt_length=8)


def test_columns_of_another_type(tokenizer):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match=r"chosen: expected a string .*, got int 3 in row 0"):
        tokenize_pairs(pairs_of({**row, "chosen": 3}), tokenizer, **LIMITS)
    with pytest.raises(UserError, match="expected two strings or two lists of messages, got str"):
        tokenize_pairs(pairs_of({**row, "rejected": [assistant("b")]}), tokenizer, **LIMITS)


def test_margin(tokenizer):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = pairs_of({**row, "margin": 2}, {**row, "margin": None})
    pairs, _ = tokenize_pairs(rows, tokenizer, **LIMITS)
    assert pairs["margin"][:] == [2.0, 0.0]
    batch = PairCollator(PAD)([pairs[0], pairs[1]])
    assert torch.equal(batch["margin"], torch.tensor([2.0, 0.0]))
    for bad in (float("nan"), "wide"):
        with pytest.raises(UserError, match=r"margin: expected a finite number, got .* in row 0"):
            tokenize_pairs(pairs_of({**row, "margin": bad}), tokenizer, **LIMITS)


def test_limits(tokenizer, pair_rows):
    with pytest.raises(UserError, match="max_length: expected at least 1 token, got 0"):
        tokenize_pairs(Dataset.from_list(pair_rows), tokenizer, max_length=0, max_prompt_length=8)


# Conversations


@pytest.mark.parametrize("explicit", [True, False])
def test_conversations(explicit, chat_tokenizer):
    prompt, a, b = [user("hi")], [assistant("Hello")], [assistant("Hey")]
    row = {"prompt": prompt, "chosen": a, "rejected": b}
    if not explicit:
        row = {"chosen": prompt + a, "rejected": prompt + b}
    pairs, _ = tokenize_pairs(pairs_of(row), chat_tokenizer, **LIMITS)
    (got,) = pairs
    assert chat_tokenizer.decode(got["prompt_ids"]) == "<s><|user|>hi<|end|>\n<|assistant|>"
    assert got["prompt_ids"][:2] != [BOS, BOS]
    assert got["chosen_ids"] == [*ids_of(chat_tokenizer, "Hello"), TURN]
    assert got["rejected_ids"] == [*ids_of(chat_tokenizer, "Hey"), TURN]
    assert got["chosen_terminated"] is True


def test_text_and_messages_mixed(chat_tokenizer):
    render = Renderer(chat_tokenizer)
    assert render.pair([user("hi")], ["Hello"]) == render.pair([user("hi")], [[assistant("Hello")]])
    with pytest.raises(UserError, match="expected a string after a prompt that is a string"):
        render.pair("hi", [[assistant("Hello")]])


def test_text_prompt_beside_whole_conversations(chat_tokenizer):
    row = {
        "prompt": "hi",
        "chosen": [user("hi"), assistant("Hello")],
        "rejected": [user("hi"), assistant("Hey")],
    }
    pairs, _ = tokenize_pairs(pairs_of(row), chat_tokenizer, **LIMITS)
    assert chat_tokenizer.decode(pairs[0]["prompt_ids"]) == "<s><|user|>hi<|end|>\n<|assistant|>"


def test_conversations_that_are_dropped(chat_tokenizer):
    good = {"chosen": [user("hi"), assistant("Hello")], "rejected": [user("hi"), assistant("Hey")]}
    rows = pairs_of(
        good,
        {**good, "rejected": good["chosen"]},
        {**good, "rejected": [user("hi"), assistant("")]},
        {**good, "rejected": [user("hi"), assistant("Hey"), user("so"), assistant("what")]},
        {"chosen": [assistant("Hello")], "rejected": [assistant("Hey")]},
    )
    _, report = tokenize_pairs(rows, chat_tokenizer, **LIMITS)
    assert (report.n_kept, report.equal, report.empty) == (1, 1, 1)
    assert (report.malformed, report.no_prompt) == (1, 1)
    assert "1 dropped whose answer is not one assistant message" in report.summary()


def test_tokenizer_without_chat_template(tokenizer):
    row = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    with pytest.raises(UserError, match=r"expected a chat template .* pass --chat_template_path"):
        tokenize_pairs(pairs_of(row), tokenizer, **LIMITS)


def test_chat_template_that_rewrites_the_prompt(make_tokenizer):
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    row = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    with pytest.raises(UserError, match="begin like that of the prompt, got '2"):
        tokenize_pairs(pairs_of(row), make_tokenizer(chat_template=template), **LIMITS)


def test_chat_template_with_another_ending(make_tokenizer):
    template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['content'] != 'odd' %}<|end|>{% endif %}{% endfor %}"
    )
    row = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("odd")]}
    with pytest.raises(UserError, match=r"expected every answer to end with '<.end.>', got 'odd'"):
        tokenize_pairs(pairs_of(row), make_tokenizer(chat_template=template), **LIMITS)


def test_chat_template_without_end_token_gets_eos(make_tokenizer):
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tok = make_tokenizer(chat_template=template)
    row = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    pairs, _ = tokenize_pairs(pairs_of(row), tok, **LIMITS)
    assert pairs[0]["chosen_ids"] == [*ids_of(tok, "a"), EOS]


def test_end_tokens(tokenizer, chat_tokenizer, make_tokenizer):
    assert data.stop_token_ids(tokenizer, conversational=False) == [EOS]
    assert data.stop_token_ids(chat_tokenizer, conversational=True) == [EOS, TURN]
    assert data.pad_token_id(tokenizer) == PAD
    assert data.pad_token_id(make_tokenizer(pad=False)) == EOS
    with pytest.raises(UserError, match=r"expected one with an EOS token.*set eos_token"):
        Renderer(make_tokenizer(eos=False))


# Prompts


def test_prompts(tokenizer, chat_tokenizer, prompts_file, pairs_file):
    for path in (prompts_file, pairs_file):
        rows = load_rows(str(path), "train")
        prompts, report = data.tokenize_prompts(rows, tokenizer, max_prompt_length=32)
        assert prompts[0]["prompt"] == "Tell me about tea:"
        assert prompts[0]["prompt_ids"] == [BOS, *ids_of(tokenizer, "Tell me about tea:")]
        assert report.n_kept == len(rows)
    chat = pairs_of({"prompt": [user("hi")]})
    prompts, _ = data.tokenize_prompts(chat, chat_tokenizer, max_prompt_length=32)
    assert prompts[0]["prompt"] == "<s><|user|>hi<|end|>\n<|assistant|>"
    assert prompts[0]["prompt_ids"].count(BOS) == 1
    assert prompts[0]["conversational"] is True


def test_bad_prompts_are_counted(tokenizer):
    rows = pairs_of({"prompt": "p"}, {"prompt": ""}, {"prompt": "p" * 40})
    _, report = data.tokenize_prompts(rows, tokenizer, max_prompt_length=32)
    assert (report.n_kept, report.empty, report.prompt_too_long) == (1, 1, 1)


# Repeating


def test_tokenizing_again_reads_the_same_result(pairs_file, tokenizer, make_tokenizer):
    rows = load_rows(str(pairs_file), "train")
    first, _ = tokenize_pairs(rows, tokenizer, **LIMITS)
    tokenizer("x", padding="max_length", max_length=9, truncation=True)
    second, _ = tokenize_pairs(rows, tokenizer, **LIMITS)
    assert first.to_list() == second.to_list()
    assert first._fingerprint == second._fingerprint
    without_bos, _ = tokenize_pairs(rows, make_tokenizer(bos=False), **LIMITS)
    assert without_bos[0]["prompt_ids"] == first[0]["prompt_ids"][1:]
    shorter, _ = tokenize_pairs(rows, tokenizer, max_length=30, max_prompt_length=25)
    assert shorter[0]["chosen_ids"] != first[0]["chosen_ids"]


def test_tokenizer_key(make_tokenizer):
    keys = {
        data.tokenizer_key(make_tokenizer(**changes))
        for changes in ({}, {"bos": False}, {"pad": False}, {"chat_template": "x"}, {})
    }
    assert len(keys) == 4


# Batches


def test_collator():
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10]},
    ]
    for row in rows:
        row |= {"chosen_terminated": True, "rejected_terminated": False}
    batch = PairCollator(0)(rows)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 0, 0, 0],
        [1, 2, 6, 0, 0],
        [7, 9, 10, 0, 0],
    ]
    assert batch["attention_mask"].sum(-1).tolist() == [5, 2, 3, 3]
    assert batch["action_mask"].int().tolist() == [
        [0, 0, 1, 1, 1],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 1, 1, 0, 0],
    ]
    assert batch["terminated"].tolist() == [True, True, False, False]
    assert batch["margin"] is None
    assert "entropy" not in batch
    assert PairCollator(0, pad_to_multiple_of=4)(rows)["input_ids"].shape == (4, 8)

    for row in rows:
        row["chosen_entropy"] = [0.5] * len(row["chosen_ids"])
        row["rejected_entropy"] = [1.5] * len(row["rejected_ids"])
    entropy = PairCollator(0)(rows)["entropy"]
    assert entropy[0].tolist() == [0.0, 0.0, 0.5, 0.5, 0.5]
    assert entropy[3].tolist() == [0.0, 1.5, 1.5, 0.0, 0.0]


@pytest.mark.real_data
def test_real_pairs(real_data, tokenizer):
    config = DataConfig(str(real_data / "pairs_human.jsonl.gz"), max_samples=600, eval_size=0.1)
    train, held = load_split(config, "train"), load_split(config, "eval")
    assert len(train) + len(held) == 600
    assert not set(train["prompt"]) & set(held["prompt"])
    pairs, report = tokenize_pairs(held, tokenizer, max_length=1024, max_prompt_length=512)
    assert report.n_rows == len(held)
    assert report.n_kept == len(pairs) > 20
    assert report.prompt_too_long > 0
    batch = PairCollator(PAD)(list(pairs.select(range(8))))
    assert batch["action_mask"].any(-1).all()
