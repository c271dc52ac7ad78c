"""Damaged files of every kind: one line with the file's name, no traceback, nothing written."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from segrlhf import cli
from segrlhf.configs import ModelConfig
from segrlhf.data.load import load_rows
from segrlhf.errors import UserError
from segrlhf.models.loading import check_positions, check_vocabulary, load_causal_lm
from segrlhf.models.reward_model import SegmentRewardModel
from segrlhf.reward.checkpoint import RUN_FILE


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 7])  # not between two lines


def flip(path):
    """Every bit of the first kilobyte: headers of binary files, text of others."""
    data = path.read_bytes()
    path.write_bytes(bytes(255 - b for b in data[:1024]) + data[1024:])


def not_utf8(path):
    path.write_bytes(b"\xff\xfe\x80" + path.read_bytes())


def wrong_type(path):
    path.write_text("[1, 2]")


def missing(path):
    path.unlink()


def directory(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = [truncate, flip, not_utf8, wrong_type, missing, directory, dangling]
# Files that a model can be without.
OPTIONAL = {"tokenizer_config.json", RUN_FILE}


@pytest.fixture(scope="module")
def whole(tiny_lm_dir, tokenizer, pair_rows, tmp_path_factory):
    """A reward model, data in every format, a config file and a chat template."""
    root = tmp_path_factory.mktemp("whole")
    SegmentRewardModel.from_causal_lm(tiny_lm_dir, "token").save_pretrained(root / "rm")
    tokenizer.save_pretrained(root / "rm")
    (root / "rm" / RUN_FILE).write_text(json.dumps({"max_length": 64}))
    rows = Dataset.from_list(pair_rows[:4])
    rows.to_json(root / "rows.jsonl")
    rows.to_csv(root / "rows.csv")
    rows.to_parquet(root / "rows.parquet")
    with gzip.open(root / "rows.jsonl.gz", "wb") as handle:
        handle.write((root / "rows.jsonl").read_bytes())
    (root / "run.yaml").write_text("batch_size: 3\n")
    (root / "chat.jinja").write_text("{{ messages[0]['content'] }}")
    return root


FILES = {
    "rm/config.json": (),
    "rm/model.safetensors": (),
    "rm/tokenizer.json": (),
    "rm/tokenizer_config.json": (),
    f"rm/{RUN_FILE}": (),
    "rows.jsonl": (),
    "rows.csv": ("--dataset_name=rows.csv",),
    "rows.parquet": ("--dataset_name=rows.parquet",),
    "rows.jsonl.gz": ("--dataset_name=rows.jsonl.gz",),
    "run.yaml": ("--config=run.yaml",),
    "chat.jinja": ("--chat_template_path=chat.jinja",),
}


def score(*words):
    return cli.main(
        ["score", "--reward_model=rm", "--dataset_name=rows.jsonl", "--output=out.jsonl", *words]
    )


@pytest.mark.parametrize("file", FILES)
def test_damaged_files(file, whole, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    name = os.path.basename(file)
    for damage in DAMAGES:
        case = tmp_path / damage.__name__
        shutil.copytree(whole, case)
        monkeypatch.chdir(case)
        damage(case / file)
        status = score(*FILES[file])
        said = capfd.readouterr().err.strip().splitlines()
        what = f"{damage.__name__} of {file}: status {status}, {said[-1:]}"
        if damage in (missing, directory, dangling):
            may_pass = name in OPTIONAL
        else:  # a text that is short or strange may still be one
            may_pass = name in OPTIONAL | {"chat.jinja", "rows.csv", "run.yaml"}
        if status == 0:
            assert may_pass, what
            continue
        assert status in (cli.EXIT_USER, cli.EXIT_NON_FINITE), what
        assert re.match("segrlhf score: .*expected", said[-1]), what
        assert name in said[-1] or "rm" in said[-1], what
        assert not any("Traceback" in line for line in said), what
        assert not (case / "out.jsonl").exists(), what


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_language_models(file, damage, tiny_lm_dir, tmp_path):
    shutil.copytree(tiny_lm_dir, tmp_path / "lm")
    damage(tmp_path / "lm" / file)
    with pytest.raises(UserError, match=r"model: expected .*lm"):
        load_causal_lm(ModelConfig(str(tmp_path / "lm")))


def test_an_existing_name_is_that_file(tmp_path, write_jsonl, capsys):
    rows = {name: [{"prompt": name}] for name in ("x[1]", "x1")}
    for name in rows:
        write_jsonl(tmp_path / f"{name}.jsonl", rows[name])
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", rows[name])
    for path in ("x[1].jsonl", "x[1]"):
        assert load_rows(str(tmp_path / path), "train").to_list() == rows["x[1]"]
    assert capsys.readouterr().out == ""
    assert load_rows(str(tmp_path / "x?.jsonl"), "train").to_list() == rows["x1"]
    assert "is a pattern of" in capsys.readouterr().out


def test_csv_keeps_words_that_look_like_none(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen\nNA,null\n,b\n")
    rows = load_rows(str(tmp_path / "rows.csv"), "train").to_list()
    assert rows == [{"prompt": "NA", "chosen": "null"}, {"prompt": None, "chosen": "b"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": 3}, "response: expected a string .*, got int 3 in row 0"),
        ({"prompt": None, "response": "b"}, "expected at least one usable row"),
        ({"prompt": "a", "response": "b", "id": float("nan")}, "id: expected a text or a finite"),
        ({"prompt": "a", "response": "b", "id": b"\xff"}, "id: expected a text or a finite"),
    ],
)
def test_rows_that_cannot_be_scored(row, message, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(whole)
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    output = tmp_path / "out.jsonl"
    assert score(f"--dataset_name={tmp_path / 'rows.parquet'}", f"--output={output}") == 2

    assert re.search(message, capsys.readouterr().err)
    assert not output.exists()


def test_a_chat_template_that_raises(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(whole)
    (tmp_path / "raises.jinja").write_text("{{ raise_exception('no system turns') }}")
    message = [{"role": "user", "content": "a"}]
    Dataset.from_list([{"prompt": message, "response": "b"}]).to_parquet(tmp_path / "r.parquet")
    words = [f"--dataset_name={tmp_path / 'r.parquet'}", f"--output={tmp_path / 'o.jsonl'}"]
    assert score(*words, f"--chat_template_path={tmp_path / 'raises.jinja'}") == 2
    assert "chat template: expected" in (said := capsys.readouterr().err)
    assert "no system turns" in said


@pytest.mark.parametrize(
    "output",
    [
        "run.yaml/out.jsonl",
        os.fsdecode(b"\xff.jsonl"),
        "dangling.jsonl",
        "dangling/out.jsonl",
        "rm",
        f"{'a' * 300}.jsonl",
    ],
)
def test_outputs_that_cannot_be_written(output, whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path / "case")
    monkeypatch.chdir(tmp_path / "case")
    for link in ("dangling.jsonl", "dangling"):
        os.symlink("nowhere", link)
    before = sorted(os.listdir())
    assert score(f"--output={output}") == cli.EXIT_USER
    assert "output: expected a file that can be written" in capsys.readouterr().err
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("place", ["lm", "link", "rows"])
def test_outputs_that_are_inputs(place, tiny_lm_dir, pair_rows, tmp_path, monkeypatch, capsys):
    """Going on in a directory without checkpoints begins anew, and would replace what is there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_lm_dir, "lm")
    os.symlink("lm", "link")
    Dataset.from_list(pair_rows).to_json("rows/train.jsonl")
    words = ["--model_name_or_path=lm", "--dataset_name=rows", "--granularity=token"]
    before = (tmp_path / "lm" / "model.safetensors").read_bytes()
    status = cli.main(["reward", *words, f"--output_dir={place}", "--resume_from_checkpoint=true"])
    assert status == cli.EXIT_USER
    said = capsys.readouterr().err
    assert f"output_dir: expected a directory of its own, got {place}, which is also" in said
    assert (tmp_path / "lm" / "model.safetensors").read_bytes() == before


def test_tokens_and_rows_that_a_model_has_no_place_for(make_tokenizer):
    tokenizer = make_tokenizer()
    with pytest.raises(UserError, match=r"expected token ids below 258, .* got 259"):
        check_vocabulary(GPT2Config(vocab_size=258), tokenizer)
    sizes = {"vocab_size": 260, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    check_positions(model, 8, "row 0")
    with pytest.raises(UserError, match=r"rows of at most 8 tokens, .* got row 0 of 9"):
        check_positions(model, 9, "row 0")


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "x"), ("RANK", "-1"), ("SEGKERNELS_BACKEND", "fast"), ("OMP_NUM_THREADS", "0")],
)
def test_bad_environment(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert cli.main(["score", "--reward_model=rm", "--dataset_name=rows"]) == cli.EXIT_USER
    assert f"{name}: expected" in capsys.readouterr().err


def test_a_reader_that_leaves():
    code = "import sys; from segrlhf.cli import main; sys.exit(main(['--help']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (cli.EXIT_PIPE, b"")


def test_closed_outputs():
    code = "import sys; from segrlhf.cli import main; sys.exit(main(['--help']))"
    closed = ["bash", "-c", '"$@" >&- 2>&-', "bash", sys.executable, "-c", code]
    assert subprocess.run(closed).returncode == 0


def test_letters_that_an_output_has_no_place_for():
    code = "import sys; from segrlhf import cli; cli.main([]); print('tée')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, b"t\\xe9e")
