"""Which checkpoints are whole, and output directories that nobody's work is lost in."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError
from .files import write_json

COMPLETE = "complete.json"  # the last file of a checkpoint; one without it was cut off


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


@contextmanager
def saving(what: str, output_dir: str | Path) -> Iterator[None]:
    """Turns a write that failed for lack of space into one clear OSError(ENOSPC)."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors and torch.save report a failed write in words of their own.
        full = full or "os error 28" in str(error) or "PytorchStreamWriter" in str(error)
        if not full:
            raise
        last = last_checkpoint(output_dir)
        kept = f"the newest complete checkpoint is {last}" if last else "no checkpoint was complete"
        raise OSError(
            errno.ENOSPC,
            f"disk full while saving {what} in {output_dir} "
            f"({shutil.disk_usage(output_dir).free / 2**20:.0f} MiB free); what was there is "
            f"intact, {kept}; free space and go on with --resume_from_checkpoint true",
        ) from error
