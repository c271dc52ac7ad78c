"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
