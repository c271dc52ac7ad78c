"""Rows of files, directories and the hub, and which of them are held out."""

from __future__ import annotations

import errno
import glob
import gzip
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs import DataConfig
from ..errors import UserError, reading
from ..runtime.distributed import say
from .render import checked_row, prompt_key

if TYPE_CHECKING:
    from datasets import Dataset


# Suffix of a file, the last ".gz" apart -> builder of `datasets`.
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# A text that reads NA or null is a text; only an empty cell holds none.
_CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}


def load_rows(name: str, split: str, config: str | None = None) -> Dataset:
    """All rows of one split.

    ``name`` is a json, jsonl, parquet or csv file (also .gz), a directory of those (split by file
    name: train, test, ...), a directory written by ``save_to_disk``, or a hub name with its
    ``config``. A single file is the split "train". Raises UserError for what cannot be read, a
    split that is not there (naming those that are) and for no rows.
    """
    splits = _open(name, config)
    if split not in splits:
        raise UserError(
            f"split: expected one of {', '.join(splits)} of {name}, got {split!r}; "
            "pass --dataset_train_split or --dataset_test_split"
        )
    return _rows_of(splits, split, name)


def load_split(data: DataConfig, split: str) -> Dataset | None:
    """The rows to train on (``split="train"``) or to evaluate on (``"eval"``).

    Evaluation rows are the split ``dataset_test_split`` where the dataset has it; else the pairs
    of ``eval_size`` of the prompts, drawn by a hash of the prompt so that every process and every
    run holds out the same ones; else None. ``max_samples`` takes the first rows before the
    hold-out. Raises UserError as ``load_rows`` does.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split: expected 'train' or 'eval', got {split!r}")
    name = data.dataset_name
    splits = _open(name, data.dataset_config)
    train, test = data.dataset_train_split, data.dataset_test_split
    if train not in splits:
        raise UserError(
            f"dataset_train_split: expected one of {', '.join(splits)} of {name}, got {train!r}"
        )
    has_test = test in splits and test != train
    rows = _rows_of(splits, test if split == "eval" and has_test else train, name)
    if data.max_samples is not None:
        rows = rows.select(range(min(data.max_samples, len(rows))))
    if has_test:
        return rows
    if data.eval_size == 0.0:
        return rows if split == "train" else None
    return rows.select(_side(rows, data.eval_size, split))


def _open(name: str, config: str | None) -> dict[str, Dataset]:
    """Every split of a dataset. What exists under that name is meant, whatever characters are in
    it; only where nothing is, it is a pattern of files or a hub name."""
    import datasets

    path = Path(name)
    remedy = "check the file, or name another"
    expected = (
        "a json, jsonl, parquet or csv file in UTF-8, a directory of those, a save_to_disk "
        "directory or a hub name"
    )
    with reading("dataset_name", expected, name, remedy):
        if path.is_symlink() and not path.exists():
            raise UserError(f"dataset_name: expected {expected}, got {name}, a link to nothing")
        if path.is_dir():
            os.listdir(path)  # PermissionError: `datasets` would say that it holds nothing
            if (path / "dataset_dict.json").is_file():
                return datasets.load_from_disk(name)
            if (path / "state.json").is_file():
                return {"train": datasets.load_from_disk(name)}
            if config is not None:
                return datasets.load_dataset(name, config)
            return _read_directory(path)
        if path.is_file():
            return _read_files(name, [path])
        if path.exists():
            raise UserError(f"dataset_name: expected a file or directory, got {name}")
        matched = sorted(Path(each) for each in glob.glob(name)) if glob.has_magic(name) else []
        if matched:
            say(f"dataset_name: {name} is a pattern of {', '.join(map(str, matched))}")
            return _read_files(name, matched)
        if _format(path) or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise FileNotFoundError(errno.ENOENT, "no such file or directory")  # no hub name
        return datasets.load_dataset(name, config)


def _read_directory(path: Path) -> dict[str, Dataset]:
    """The splits of a directory, which the names of its files tell."""
    inside = [each for each in path.rglob("*") if each.is_file() and _format(each)]
    # `datasets` takes names for patterns.
    where = {"data_dir": glob.escape(os.path.abspath(path))}
    return _read(f"directory {path}", inside, where)


def _read_files(name: str, paths: list[Path]) -> dict[str, Dataset]:
    """The rows of files of one format, as the split "train"."""
    for path in paths:
        if _format(path) is None:
            raise UserError(
                f"dataset_name: expected a file ending in {', '.join(FORMATS)} (or those with "
                f".gz), got {path}; convert it, one row per line of json"
            )
        with reading("dataset_name", "a whole file", path, "copy it again"):
            if not _holds_bytes(path):
                raise UserError(f"dataset_name: expected rows, got the empty file {path}")
    escaped = [glob.escape(os.path.abspath(path)) for path in paths]
    return _read(name, paths, {"data_files": {"train": escaped}})


def _format(path: Path) -> str | None:
    return FORMATS.get(Path(path.name.removesuffix(".gz")).suffix)


def _read(name: str, paths: list[Path], where: dict[str, Any]) -> dict[str, Dataset]:
    import datasets
    from datasets.exceptions import DatasetsError

    formats = {_format(path) for path in paths}
    if len(formats) != 1:
        raise UserError(
            f"dataset_name: expected files of one format ({', '.join(FORMATS)}), got "
            f"{', '.join(sorted(map(str, formats))) or 'none'} in {name}; name one of them"
        )
    builder = str(formats.pop())
    try:
        return datasets.load_dataset(builder, **where, **(_CSV if builder == "csv" else {}))
    except DatasetsError as error:  # says less than what caused it
        raise error.__cause__ or error from None


def _holds_bytes(path: Path) -> bool:
    """Whether a file has more than white space; a compressed one is read to its end."""
    holds = False
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            holds = holds or bool(block.strip())
            if holds and path.suffix != ".gz":
                break
    return holds


def _rows_of(splits: dict[str, Dataset], split: str, name: str) -> Dataset:
    rows = splits[split]
    if len(rows) == 0:
        raise UserError(f"dataset_name: expected rows in split {split!r} of {name}, got none")
    return rows


def _side(rows: Dataset, eval_size: float, split: str) -> list[int]:
    """Row numbers on one side of the hold-out; all rows of a prompt are on the same side."""
    if not set(rows.column_names) & {"prompt", "chosen"}:
        raise UserError(
            f"dataset_name: expected a column prompt (or chosen and rejected) to hold prompts out "
            f"with --eval_size, got {', '.join(rows.column_names)}"
        )
    keys = [prompt_key(checked_row(row, i)) for i, row in enumerate(rows)]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise UserError(
            f"eval_size: expected at least two different prompts to divide, got {len(prompts)}; "
            "drop --eval_size or bring a test split"
        )
    n_held = min(max(round(eval_size * len(prompts)), 1), len(prompts) - 1)
    held = set(prompts[:n_held])
    return [i for i, key in enumerate(keys) if (key in held) == (split == "eval")]
