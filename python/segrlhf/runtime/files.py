"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Nobody else's file is called like this, so that what a killed process left can be told for sure.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.segrlhf-(?P<kind>new|old)", re.DOTALL)


def temporary_path(path: Path, kind: str) -> Path:
    """A name beside ``path`` that nobody has used: "new" for what is being written, "old" for what
    it replaces."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.segrlhf-{kind}")


def left_behind(directory: Path, kind: str) -> Iterator[tuple[Path, Path]]:
    """(temporary path, path it stands for) of what processes that were killed left here."""
    for item in sorted(directory.iterdir()):
        match = _TEMPORARY.fullmatch(item.name)
        if match and match["kind"] == kind:
            yield item, directory / match["name"]


def remove(path: Path) -> None:
    """Removes a file, a link (not what it points to) or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that replaces it when the block succeeds.

    The temporary file is there already, created by this call and nobody else.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = temporary_path(path, "new")
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o666))
    try:
        yield new
        with open(new, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def whole_dir(path: str | Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes ``path`` when the block succeeds.

    An existing ``path`` is kept until the new one is whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = temporary_path(path, "new"), temporary_path(path, "old")
    new.mkdir()
    try:
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
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
    new = temporary_path(directory / "final", "new")
    new.mkdir()
    try:
        yield new
        for item in sorted(new.iterdir()):
            os.replace(item, directory / item.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def lock_file(path: Path) -> Iterator[int]:
    """Yields a file descriptor of ``path`` for ``fcntl.flock``; the file stays, empty.

    Raises OSError for a link, and for anything that is no regular file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path}: expected a lock file, got something else of that name")
        yield descriptor
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
