"""Whether what a command will write can be written, known before its work begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from .errors import UserError, first_line


def check_writable(name: str, path: str | Path, kind: Literal["file", "directory"]) -> None:
    """UserError of flag ``name`` unless ``path`` is, or can become, a file or directory to write.

    Creates nothing: the directories above may be missing, the nearest one that is there decides.
    """

    def refuse(got: str) -> UserError:
        return UserError(
            f"{name}: expected a {kind} that can be written, got {_shown(path)}{got}; choose "
            "another name"
        )

    place = Path(path)
    try:
        str(place).encode()
    except UnicodeEncodeError as error:  # bytes of another encoding
        raise refuse(", whose name is not UTF-8, as safetensors and json need it") from error
    try:
        place.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name too long, a file in place of a directory, no permission
        raise refuse(f" ({first_line(error)})") from error
    if place.is_symlink() and not place.exists():
        raise refuse(", a link to nothing")
    if place.exists() and place.is_dir() != (kind == "directory"):
        raise refuse(f", which is a {'directory' if place.is_dir() else 'file'}")
    there = place if place.is_dir() else place.parent
    while not there.exists():
        if there.is_symlink():
            raise refuse(f", below {there}, a link to nothing")
        there = there.parent
    if not there.is_dir():
        raise refuse(f", below {there}, which is a file")
    if not os.access(there, os.W_OK | os.X_OK) or (
        place.is_file() and not os.access(place, os.W_OK)
    ):
        raise refuse(" without permission to write it")


# Flags that name what is read; the value of one may also be a hub name or a word.
_INPUTS = (
    "model_name_or_path", "tokenizer_name_or_path", "dataset_name", "reward_model",
    "entropy_model", "value_model",
)  # fmt: skip


def check_apart(output_dir: str | Path, *configs: Any) -> None:
    """UserError where ``output_dir`` is a directory that ``configs`` name as an input: what is
    saved there would replace what was read."""
    place = Path(output_dir)
    for name, path in ((name, getattr(c, name, None)) for c in configs for name in _INPUTS):
        if path and place.exists() and os.path.exists(path) and place.samefile(path):
            raise UserError(
                f"output_dir: expected a directory of its own, got {place}, which is also "
                f"{name} {path} and would be overwritten; choose another name"
            )


def _shown(path: str | Path) -> str:
    return str(path).encode(errors="backslashreplace").decode()
