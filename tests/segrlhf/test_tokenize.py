"""Rows as ids: plain text, conversations, prompts, rows that are dropped."""

import pytest
import torch
from datasets import Dataset

from segrlhf.configs import DataConfig
from segrlhf.data import tokenize
from segrlhf.data.batch import make_batch, make_pair_batch, pair_example
from segrlhf.data.load import load_rows, load_split
from segrlhf.data.render import Renderer, split_pair
from segrlhf.data.tokenize import tokenize_pairs, tokenize_prompts, tokenizer_key
from segrlhf.entropy_cache import Pairs
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
    assert split_pair(row) == ("Human: hi\n\nAssistant:", " Hello", " Hey")
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


def test_truncation_takes_the_end_token(tokenizer):
    rows = pairs_of({"prompt": "12345", "chosen": "abcd", "rejected": "abcdefgh"})
    pairs, report = tokenize_pairs(rows, tokenizer, max_length=11, max_prompt_length=8)
    assert pairs[0]["chosen_ids"][-1] == EOS
    assert pairs[0]["rejected_ids"] == ids_of(tokenizer, "abcde")
    assert (pairs[0]["chosen_terminated"], pairs[0]["rejected_terminated"]) == (True, False)
    assert report.summary() == "1 rows: 1 kept; 1 kept with a response cut at 11 tokens"


def test_prompts_cut_on_the_left(tokenizer):
    pairs, report = tokenize_pairs(
        pairs_of(
            # With BOS 8 + 5, of which 12 fit: the last 6 of the prompt, with the longer response.
            {"prompt": "abcdefg", "chosen": "wxyz", "rejected": "wx"},
            # 8 + 4 fit, though the prompt is longer than the 6 to which others are cut.
            {"prompt": "abcdefg", "chosen": "xyz", "rejected": "z"},
            # 8 + 9: what the cut prompt leaves is 6 tokens for the response.
            {"prompt": "abcdefg", "chosen": "01234567", "rejected": "x"},
        ),
        tokenizer,
        max_length=12,
        max_prompt_length=6,
        truncation_side="left",
    )
    texts = [
        [tokenizer.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")]
        for row in pairs
    ]
    assert texts == [
        ["bcdefg", "wxyz</s>", "wx</s>"],
        ["<s>abcdefg", "xyz</s>", "z</s>"],
        ["bcdefg", "012345", "x</s>"],
    ]
    assert pairs["chosen_terminated"][:] == [True, True, False]
    assert (report.n_kept, report.prompt_truncated, report.truncated) == (3, 2, 1)
    assert report.summary() == (
        "3 rows: 3 kept; 1 kept with a response cut at 12 tokens; 2 kept with the last 6 tokens of "
        "the prompt"
    )


def test_end_token_forced_onto_what_is_cut(tokenizer, chat_tokenizer):
    row = {"prompt": "ab", "chosen": "01234567", "rejected": "x"}
    limits = {"max_length": 8, "max_prompt_length": 6, "force_eos": True}
    ((got,), report) = tokenize_pairs(pairs_of(row), tokenizer, **limits)
    assert tokenizer.decode(got["chosen_ids"]) == "0123</s>"
    assert tokenizer.decode(got["rejected_ids"]) == "x</s>"
    assert got["chosen_terminated"] is True
    assert report.truncated == 1
    row = {"prompt": [user("a")], "chosen": [assistant("0123456789")], "rejected": [assistant("x")]}
    limits = {"max_length": 32, "max_prompt_length": 30, "force_eos": True}
    ((got,), _) = tokenize_pairs(pairs_of(row), chat_tokenizer, **limits)
    assert len(got["prompt_ids"]) + len(got["chosen_ids"]) == 32
    assert got["chosen_ids"][-1] == TURN


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
        tokenize_prompts(pairs_of({"text": "p"}), tokenizer, max_prompt_length=8)


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
    both = [{**pairs[i], "row": i} for i in range(2)]
    batch = make_pair_batch(both, make_batch([pair_example(row) for row in both]))
    assert torch.equal(batch.margin, torch.tensor([2.0, 0.0]))
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


# Prompts


def test_prompts(tokenizer, chat_tokenizer, prompts_file, pairs_file):
    for path in (prompts_file, pairs_file):
        rows = load_rows(str(path), "train")
        prompts, report = tokenize_prompts(rows, tokenizer, max_prompt_length=32)
        assert prompts[0]["prompt"] == "Tell me about tea:"
        assert prompts[0]["prompt_ids"] == [BOS, *ids_of(tokenizer, "Tell me about tea:")]
        assert report.n_kept == len(rows)
    chat = pairs_of({"prompt": [user("hi")]})
    prompts, _ = tokenize_prompts(chat, chat_tokenizer, max_prompt_length=32)
    assert prompts[0]["prompt"] == "<s><|user|>hi<|end|>\n<|assistant|>"
    assert prompts[0]["prompt_ids"].count(BOS) == 1
    assert prompts[0]["conversational"] is True


def test_bad_prompts_are_counted(tokenizer):
    rows = pairs_of({"prompt": "p"}, {"prompt": ""}, {"prompt": "p" * 40})
    _, report = tokenize_prompts(rows, tokenizer, max_prompt_length=32)
    assert (report.n_kept, report.empty, report.prompt_too_long) == (1, 1, 1)


# Repeating


def test_prompts_of_ppo_cut_on_the_left(tokenizer):
    rows = Dataset.from_list([{"prompt": "abcdefg"}, {"prompt": "ab"}])
    prompts, report = tokenize_prompts(rows, tokenizer, max_prompt_length=3, truncation_side="left")
    assert [tokenizer.decode(ids) for ids in prompts["prompt_ids"][:]] == ["efg", "<s>ab"]
    assert (report.n_kept, report.prompt_truncated) == (2, 1)


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
        tokenizer_key(make_tokenizer(**changes))
        for changes in ({}, {"bos": False}, {"pad": False}, {"chat_template": "x"}, {})
    }
    assert len(keys) == 4


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
    batch = make_batch([pair_example(row) for row in pairs.select(range(8))])
    assert (batch.cu_seqlens.diff() > 0).all()


def test_rows_are_tokenized_in_pieces(tokenizer, pair_rows, pairs_file, monkeypatch, capfd):
    """Which do not change what comes out, and are not made again."""
    rows = load_split(DataConfig(str(pairs_file)), "train")
    whole, report = tokenize_pairs(rows, tokenizer, **LIMITS)
    monkeypatch.setattr(tokenize, "PIECE", 7)
    capfd.readouterr()
    pieces, same = tokenize_pairs(rows, tokenizer, **LIMITS)
    assert capfd.readouterr().err.count("100%") >= 4
    assert same == report
    assert pieces.column_names == whole.column_names
    assert pieces[:] == whole[:]
    tokenize_pairs(rows, tokenizer, **LIMITS)
    assert "tokenizing" not in capfd.readouterr().err
    bad = [{**row, "margin": 1.0} for row in pair_rows]
    bad[17]["margin"] = float("nan")
    with pytest.raises(UserError, match=r"margin: expected a finite number, got nan in row 17"):
        tokenize_pairs(pairs_of(*bad), tokenizer, **LIMITS)


def test_the_longest_pair(pairs):
    lengths = [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in pairs
    ]
    assert Pairs(pairs).sizes.widths("none").max() == max(lengths)
