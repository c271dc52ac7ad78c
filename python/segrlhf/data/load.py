"""Rows of files, directories and the hub, and which of them are held out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..configs import DataConfig
from ..errors import UserError
from .render import checked_row, prompt_key

if TYPE_CHECKING:
    from datasets import Dataset


# Suffix of a file, the last ".gz" apart -> builder of `datasets`.
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


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
    """Every split of a dataset."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(name)
    try:
        if path.is_file():
            builder = FORMATS.get(Path(name.removesuffix(".gz")).suffix)
            if builder is None:
                raise UserError(
                    f"dataset_name: expected a file ending in {', '.join(FORMATS)} (or those with "
                    f".gz), got {name}; convert it, one row per line of json"
                )
            if not _holds_bytes(path):
                raise UserError(f"dataset_name: expected rows, got the empty file {name}")
            return datasets.load_dataset(builder, data_files={"train": name})
        if path.is_dir() and (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)
        if path.is_dir() and (path / "state.json").is_file():
            return {"train": datasets.load_from_disk(name)}
        if path.exists() and not path.is_dir():
            raise UserError(f"dataset_name: expected a file or directory, got {name}")
        return datasets.load_dataset(name, config)
    except (DatasetsError, OSError, ValueError, RuntimeError, StopIteration) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"dataset_name: expected a json, jsonl, parquet or csv file, a directory of those, a "
            f"save_to_disk directory or a hub name, got {name}, which cannot be read: "
            f"{_first_line(error.__cause__ or error)}"
        ) from error


def _holds_bytes(path: Path) -> bool:
    import gzip

    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as handle:
        while block := handle.read(1 << 16):
            if block.strip():
                return True
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
