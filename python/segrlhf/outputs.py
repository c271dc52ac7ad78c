"""Whether what a command will write can be written, known before its work begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from .errors import UserError, first_line


def check_writable(name: str, path: str | Path, kind: Literal["file", "directory"]) -> None:
    """UserError of flag ``name`` unless ``path`` is, or can become, a file or directory to write.

    Creates nothing: the directories above may be missing, the nearest one that is there decides.
    """

    def refuse(got: str) -> UserError:
        return UserError(
            f"{name}: expected a {kind} that can be written, got {path}{got}; choose another name"
        )

    place = Path(path)
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
