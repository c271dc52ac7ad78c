"""Files, directories and splits; which rows are held out."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from segrlhf.configs import DataConfig
from segrlhf.data.load import load_rows, load_split
from segrlhf.errors import UserError

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
    splits = DatasetDict(
        train=Dataset.from_list(pair_rows[:3]), test=Dataset.from_list(pair_rows[3:])
    )
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
        with pytest.raises(
            UserError, match=r"eval_size: expected a finite number, at least 0 and below 1"
        ):
            load_split(DataConfig(str(pairs_file), eval_size=size), "train")
    with pytest.raises(UserError, match=r"max_samples: expected a whole number, at least 1, got 0"):
        load_split(DataConfig(str(pairs_file), max_samples=0), "train")
    config = DataConfig(str(pairs_file), eval_size=0.5, max_samples=2)
    with pytest.raises(UserError, match="at least two different prompts to divide, got 1"):
        load_split(config, "train")
    write_lines(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"expected a column prompt .*, got text"):
        load_split(DataConfig(str(tmp_path / "rows.jsonl"), eval_size=0.5), "train")
