"""What makes a resumed run the run that was cut off."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from . import files

IDENTITY = "identity.json"


@dataclass(frozen=True)
class Identity:
    """Settings and inputs of a run, by the names that a person knows them under.

    ``kept``: with others its continuation would be another run. ``free``: may be changed when it is
    resumed, and then apply from there on.
    """

    kept: dict[str, Any]
    free: dict[str, Any]

    def write(self, checkpoint: Path) -> None:
        files.write_json(checkpoint / IDENTITY, asdict(self))

    def check(self, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
        """What was changed of ``free`` since ``checkpoint``, as (then, now).

        Raises UserError for a checkpoint of another run, saying what differs.
        """
        require_files(checkpoint, [IDENTITY])
        try:
            saved = Identity(**json.loads((checkpoint / IDENTITY).read_text(encoding="utf-8")))
            other = dict(_changes(saved.kept, self.kept))
            changed = dict(_changes(saved.free, self.free))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{checkpoint / IDENTITY}: expected the settings of a run as json, got something "
                f"else ({error}); resume from another checkpoint"
            ) from error
        if other:
            raise UserError(
                f"resume_from_checkpoint: expected the run of {checkpoint}, got another one: "
                f"{_told(other)}; repeat the first command line, or start in a new output_dir. "
                f"These may be changed: {', '.join(sorted(self.free))}"
            )
        return changed


def changes_told(changed: dict[str, tuple[Any, Any]]) -> str:
    """What a resumed run says of settings that were changed."""
    return f"resumed with other settings from here on: {_told(changed)}"


def _changes(then: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    now = json.loads(json.dumps(now))  # tuples are lists, as in the file
    for name in sorted(then.keys() | now.keys()):
        if (pair := (then.get(name), now.get(name)))[0] != pair[1]:
            yield name, pair


def _told(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {then} (now {now})" for name, (then, now) in changes.items())


def require_files(checkpoint: Path, names: Iterable[str]) -> None:
    """UserError naming the first that is not there."""
    for name in names:
        if not (checkpoint / name).is_file():
            raise UserError(
                f"resume_from_checkpoint: expected {name} in {checkpoint}, got none; without it "
                "the run would go on as another one: resume from another checkpoint"
            )


def digest(parts: Iterable[Any]) -> str:
    """Hash of json values."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return whole.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Hash of every weight of a model, as it is in memory."""

    def checksums() -> Iterator[Any]:
        for name, tensor in model.state_dict().items():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield name, str(tensor.dtype), list(tensor.shape), zlib.crc32(memoryview(data))

    return digest(checksums())
