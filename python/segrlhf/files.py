"""Files that are written whole or not at all, and directories that nobody's work is lost in."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

COMPLETE = "complete.json"  # the last file of a checkpoint; one without it was cut off


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that replaces it when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_dir(path: str | Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes ``path`` when the block succeeds.

    An existing ``path`` is kept until the new one is whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        yield part
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def files_into(directory: str | Path) -> Iterator[Path]:
    """Yields a temporary directory whose files move into ``directory`` when the block succeeds.

    For a final save beside checkpoints that must stay: each file is replaced whole, and none is
    touched before all have been written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f".saving.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for item in sorted(part.iterdir()):
            os.replace(item, directory / item.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def mark_complete(checkpoint: str | Path, step: int) -> None:
    """Call when everything else of a checkpoint is on disk."""
    write_json(Path(checkpoint) / COMPLETE, {"step": step})


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest ``checkpoint-<step>`` that was written to its end, or None."""
    found = []
    for item in Path(output_dir).glob("checkpoint-*"):
        step = item.name.rpartition("-")[2]
        if step.isdigit() and (item / COMPLETE).is_file():
            found.append((int(step), item))
    return max(found)[1] if found else None


def claim_output_dir(output_dir: str | Path, resume: bool) -> None:
    """Creates ``output_dir``; one that already holds files is an error unless resuming."""
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(
            f"output_dir: expected a directory, got the file {path}; choose another name"
        )
    if not resume and path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"output_dir: expected a new or empty directory, got {path} with "
            f"{len(list(path.iterdir()))} entries; choose another name, or go on with "
            "--resume_from_checkpoint true"
        )
    path.mkdir(parents=True, exist_ok=True)
    _mend(path)


def _mend(directory: Path) -> None:
    """Clears away what a killed process was writing, and puts back what it had set aside."""
    for item in directory.glob(".*.old"):
        place = directory / re.sub(r"(\.\d+)?\.old$", "", item.name[1:])
        cut_off = (item / COMPLETE).is_file() and not (place / COMPLETE).is_file()
        if cut_off and place.is_dir():
            shutil.rmtree(place)
        if not place.exists():
            os.replace(item, place)
    for item in (*directory.glob(".*.part"), *directory.glob(".*.old")):
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()


def resolve_resume(output_dir: str | Path, resume: str | bool | None) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` names: true, or a path.

    ``true`` with no complete checkpoint starts from the beginning, so that one command line can be
    repeated until it has finished.
    """
    if resume is None or str(resume).lower() in ("", "false", "no", "none"):
        return None
    if str(resume).lower() in ("true", "yes"):
        return last_checkpoint(output_dir)
    path = Path(str(resume))
    if not (path / COMPLETE).is_file():
        raise UserError(
            f"resume_from_checkpoint: expected a complete checkpoint directory, got {path} "
            f"without {COMPLETE}; pass 'true' for the newest complete one"
        )
    return path
