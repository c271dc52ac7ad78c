"""Entropies of a frozen LM over preference pairs, computed once and kept on disk.

Every response runs through the LM once; training, other thresholds and other epochs read the file
and need no second model.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from .configs import ModelConfig
from .data.batch import SIDES, Example, Sizes, pair_example, responses_of
from .data.tokenize import tokenizer_key
from .errors import NonFiniteError, UserError
from .models.lm_head import response_entropy, response_states
from .models.loading import check_positions, check_vocabulary, load_causal_lm, load_config
from .models.packing import PackingConfig, make_reader
from .runtime import files
from .runtime.checkpoints import saving
from .runtime.distributed import processes

if TYPE_CHECKING:
    from datasets import Dataset


FORMAT = 2  # part of the key: raise it when what is stored changes meaning


def default_cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "segrlhf" / "entropy"


class EntropyCache:
    """Entropies of the responses of a pair dataset: one fp32 number, in nats, per response token.

    ``directory`` holds ``meta.json``, ``offsets.npy`` (int64, [2 pairs + 1]), ``entropy.npy``
    (fp32, memory-mapped) and ``checksums.npy`` (int64, [2 pairs]). Response 2i is the chosen one of
    pair i, response 2i + 1 the rejected one. Number t is the entropy of the distribution that token
    t was drawn from ("current" in ``segkernels.segment_ends``). A checksum is 0 until its response
    is written, so that a build that was cut off resumes, and several processes fill disjoint
    responses of one file.

    Opening it checks format, types and sizes; ``check`` reads every number. Raises UserError for a
    directory that holds no such cache.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        try:
            meta = json.loads((self.directory / "meta.json").read_text(encoding="utf-8"))
            _expect("format in meta.json", FORMAT, meta["format"])
            self._offsets = np.load(self.directory / "offsets.npy")
            self._entropy = np.load(self.directory / "entropy.npy", mmap_mode="r")
            self._checksums = np.load(self.directory / "checksums.npy", mmap_mode="r")
            for name, array, kind, length in (
                ("offsets.npy", self._offsets, np.int64, 2 * meta["pairs"] + 1),
                ("entropy.npy", self._entropy, np.float32, int(self._offsets[-1])),
                ("checksums.npy", self._checksums, np.int64, 2 * meta["pairs"]),
            ):
                _expect(f"type and shape of {name}", (kind, (length,)), (array.dtype, array.shape))
            if self._offsets[0] != 0 or (np.diff(self._offsets) < 0).any():
                raise ValueError("offsets.npy does not rise from 0")
        except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError) as error:
            raise UserError(
                f"entropy cache: expected meta.json, offsets.npy, entropy.npy and checksums.npy of "
                f"one cache in {self.directory}, got {error!r}; delete the directory, and build it "
                "again"
            ) from error

    def __len__(self) -> int:
        """Number of pairs."""
        return (len(self._offsets) - 1) // 2

    def __getitem__(self, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """(chosen, rejected) entropies of a pair, fp32 [tokens of the response]."""
        return self.response(2 * pair), self.response(2 * pair + 1)

    def response(self, index: int) -> np.ndarray:
        return self._entropy[self._offsets[index] : self._offsets[index + 1]]

    def stream(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Responses start..stop as one flat stream: (entropies fp32 [T], cu_seqlens int32)."""
        offsets = self._offsets[start : stop + 1]
        entropy = torch.from_numpy(np.array(self._entropy[offsets[0] : offsets[-1]]))
        return entropy, torch.from_numpy((offsets - offsets[0]).astype(np.int32))

    def check(self, lengths: np.ndarray) -> list[int]:
        """Responses that are not computed yet; reads the whole file.

        Raises UserError where responses have other numbers of tokens than ``lengths``, or numbers
        that are not those which were written.
        """
        if not np.array_equal(np.diff(self._offsets), lengths):
            raise UserError("entropy cache: expected the lengths of the responses, got others")
        numbers, places = memoryview(self._entropy).cast("B"), (4 * self._offsets).tolist()
        todo, damaged = [], []
        for index, written in enumerate(self._checksums.tolist()):
            if not written:
                todo.append(index)
            elif written != _checksum(index, numbers[places[index] : places[index + 1]]):
                damaged.append(index)
        if damaged:
            raise UserError(
                f"entropy cache: expected the numbers that were written, got others in "
                f"{len(damaged)} responses, first {describe(damaged[0])}"
            )
        return todo

    @staticmethod
    def create(directory: Path, lengths: np.ndarray) -> None:
        """Writes an empty cache for responses of these lengths, int [2 pairs].

        Raises DiskFullError, and leaves nothing, where the disk has no room for it.
        """
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        total = int(offsets[-1])
        where, remedy = directory.parent, "free space or choose another directory for the cache"
        with saving("the entropy cache", where, remedy), files.whole_dir(directory) as new:
            np.save(new / "offsets.npy", offsets)
            # Written, not mapped: a mapped page that the disk has no room for ends the process.
            with open(new / "entropy.npy", "wb") as handle:
                header = {"descr": "<f4", "fortran_order": False, "shape": (total,)}
                np.lib.format.write_array_header_1_0(handle, header)
                handle.flush()
                os.posix_fallocate(handle.fileno(), handle.tell(), 4 * total)
                block = np.full(min(total, 1 << 20), np.nan, np.float32)
                for start in range(0, total, 1 << 20):
                    handle.write(block[: total - start].tobytes())
            np.save(new / "checksums.npy", np.zeros(len(lengths), np.int64))
            files.write_json(new / "meta.json", {"format": FORMAT, "pairs": len(lengths) // 2})

    @contextmanager
    def writer(self) -> Iterator[Callable[[int, np.ndarray], None]]:
        """Yields ``write(response, entropies)``; the checksum comes last, so that a kill leaves a
        response whole or not computed."""
        first, first_checksum = self._entropy.offset, self._checksums.offset
        with (
            open(self.directory / "entropy.npy", "r+b", buffering=0) as numbers,
            open(self.directory / "checksums.npy", "r+b", buffering=0) as checksums,
        ):

            def write(index: int, entropy: np.ndarray) -> None:
                written = np.ascontiguousarray(entropy, dtype=np.float32).tobytes()
                numbers.seek(first + 4 * int(self._offsets[index]))
                numbers.write(written)
                checksums.seek(first_checksum + 8 * index)
                checksums.write(np.int64(_checksum(index, written)).tobytes())

            yield write


def _checksum(index: int, numbers: bytes | memoryview) -> int:
    """Never 0; that of a response which stands in another one's place is wrong."""
    return 1 + zlib.crc32(numbers, index)


def _expect(what: str, expected: Any, got: Any) -> None:
    if got != expected:
        raise ValueError(f"{what}: {got} instead of {expected}")


def describe(response: int) -> str:
    """Name of a response of the cache for a person."""
    return f"row {response // 2} ({SIDES[response % 2]})"


def model_fingerprint(name_or_path: str, revision: str = "main") -> str:
    """Hash of a model's config and of every byte of its weights, without loading it."""
    directory = Path(name_or_path)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        directory = Path(
            snapshot_download(name_or_path, revision=revision, allow_patterns=patterns)
        )
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"entropy model: expected *.safetensors weights, got none in {directory}; save the "
            "model with save_pretrained"
        )
    digest = hashlib.sha256()
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for volatile in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in weights:
        stat = path.stat()
        digest.update(path.name.encode())
        digest.update(_file_digest(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@functools.cache
def _file_digest(path: Path, size: int, mtime_ns: int) -> bytes:
    """Hash of a file's bytes; read once while its size and time stay the same."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 24):
            digest.update(block)
    return digest.digest()


def _tables(pairs: Dataset) -> Iterator[Any]:
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    yield from pairs.select_columns(columns).with_format("arrow").iter(batch_size=1000)


def pair_sizes(pairs: Dataset) -> Sizes:
    """Lengths of every prompt and response, read without the ids."""
    found: dict[str, list[np.ndarray]] = {"prompt": [], "chosen": [], "rejected": []}
    for table in _tables(pairs):
        for name, parts in found.items():
            parts.append(table[f"{name}_ids"].combine_chunks().value_lengths().to_numpy())
    prompts, *responses = (np.concatenate(parts).astype(np.int64) for parts in found.values())
    return Sizes(prompts, np.stack(responses, axis=1))


def pairs_digest(pairs: Dataset) -> str:
    """Hash of every token id."""
    digest = hashlib.sha256()
    for table in _tables(pairs):
        for name in table.column_names:
            column = table[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy().astype(np.int32).tobytes())
            digest.update(column.flatten().to_numpy().astype(np.int32).tobytes())
    return digest.hexdigest()


def cache_key(fingerprint: str, tokenizer: Any, pairs: Dataset) -> str:
    """Hash of the model, the tokenizer with its chat template and the data."""
    parts = (str(FORMAT), fingerprint, tokenizer_key(tokenizer), pairs_digest(pairs))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


@contextmanager
def _building(directory: Path) -> Iterator[None]:
    """One build at a time; the lock dies with the process that holds it."""
    with files.lock_file(directory.with_name(f"{directory.name}.lock")) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process builds {directory}; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for item, place in files.left_behind(directory.parent, "new"):
            if place == directory:  # of a build that was killed: we hold its lock
                files.remove(item)
        yield


def cache_directory(
    model_name_or_path: str,
    tokenizer: Any,
    pairs: Dataset,
    *,
    cache_dir: str | Path | None = None,
    revision: str = "main",
) -> Path:
    """Where the cache of ``pairs`` under this LM stands, whether or not it was built."""
    key = cache_key(model_fingerprint(model_name_or_path, revision), tokenizer, pairs)
    return Path(cache_dir or default_cache_dir()) / key


def build_entropy_cache(
    model_name_or_path: str,
    tokenizer: Any,
    pairs: Dataset,
    *,
    cache_dir: str | Path | None = None,
    options: PackingConfig | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> EntropyCache:
    """The complete cache of ``pairs`` under the frozen LM; computes what is missing.

    ``pairs`` is what ``tokenize_pairs`` gives. The LM runs in the dtype of its checkpoint and
    is loaded only if something is missing; its batches depend on the pairs alone, so that a build
    which was cut off ends with the same numbers. A cache that is damaged is set aside, under a name
    that is printed, and built again. Under torchrun or accelerate every process must call this;
    they share the work. Raises NonFiniteError naming the row when an entropy is NaN.
    """
    state = processes()
    sizes = pair_sizes(pairs)
    lengths = sizes.responses.reshape(-1)
    found: list[Any] = [None]
    if state.is_main_process:
        found[0] = cache_directory(
            model_name_or_path, tokenizer, pairs, cache_dir=cache_dir, revision=revision
        )
        config = load_config(model_name_or_path, {"revision": revision}, trust_remote_code)
        check_vocabulary(config, tokenizer)
    directory = Path(broadcast_object_list(found)[0])
    lock = _building(directory) if state.is_main_process else nullcontext()
    with lock:
        left: list[Any] = [None]
        if state.is_main_process:
            left[0] = _todo(directory, lengths)
        todo = set(broadcast_object_list(left)[0])
        cache = EntropyCache(directory)
        if not todo:
            return cache
        model = load_entropy_model(model_name_or_path, revision, trust_remote_code)
        computed = entropies(
            model,
            sizes,
            lambda pair: pair_example(pairs[pair]),
            lambda pair, side: describe(2 * pair + side),
            options,
            {response // 2 for response in todo},
        )
        with cache.writer() as write:
            for pair, side, values in computed:
                if 2 * pair + side in todo:
                    write(2 * pair + side, values)
        state.wait_for_everyone()
    return cache


def _todo(directory: Path, lengths: np.ndarray) -> list[int]:
    """What is to be computed of the cache in ``directory``, which is made where there is none, or
    none that is sound."""
    if directory.exists():
        try:
            return EntropyCache(directory).check(lengths)
        except UserError as damage:
            aside = next(
                path
                for number in itertools.count(1)
                if not (path := directory.with_name(f"{directory.name}.damaged-{number}")).exists()
            )
            os.replace(directory, aside)
            print(f"{damage}. It was set aside as {aside} and is built again", flush=True)
    EntropyCache.create(directory, lengths)
    return EntropyCache(directory).check(lengths)


def find_entropy_cache(
    model_name_or_path: str,
    tokenizer: Any,
    pairs: Dataset,
    *,
    cache_dir: str | Path | None = None,
) -> EntropyCache | None:
    """The complete and sound cache that ``build_entropy_cache`` has left, or None."""
    directory = cache_directory(model_name_or_path, tokenizer, pairs, cache_dir=cache_dir)
    if not directory.exists():
        return None
    try:
        cache = EntropyCache(directory)
        return None if cache.check(pair_sizes(pairs).responses.reshape(-1)) else cache
    except UserError as damage:
        print(f"{damage}. It is not used", flush=True)
        return None


def load_entropy_model(
    name_or_path: str, revision: str = "main", trust_remote_code: bool = False
) -> Any:
    """A frozen causal LM in the dtype of its checkpoint, on this process's device."""
    config = ModelConfig(name_or_path, model_revision=revision, trust_remote_code=trust_remote_code)
    return load_causal_lm(config).to(processes().device).eval().requires_grad_(False)


@torch.inference_mode()
def entropies(
    model: Any,
    sizes: Sizes,
    example: Callable[[int], Example],
    name: Callable[[int, int], str],
    options: PackingConfig | None = None,
    wanted: Container[int] | None = None,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(Example, place of the response in it, entropies in nats, fp32 [tokens]) of this process's
    share of the examples.

    ``example`` gives one by number, ``name`` a response's for messages. Batches depend on ``sizes``
    alone; those without a ``wanted`` example are left out. Raises NonFiniteError with the name of a
    response whose entropy is NaN or infinite.
    """
    state = processes()
    widths = sizes.widths("none")
    check_positions(model, int(widths.max()), f"row {int(widths.argmax())}")
    reader = make_reader(model, options or PackingConfig(), response_states, sizes, example)
    plan = reader.plan(sizes)
    if wanted is not None:
        plan = [batch for batch in plan if any(index in wanted for index in batch.tolist())]
    plan = plan[state.process_index :: state.num_processes]
    for numbers in tqdm(plan, desc="entropies", disable=not state.is_main_process):
        examples = [example(index) for index in numbers.tolist()]
        batch = reader.batch(examples, model.device)
        values = response_entropy(model, batch, reader.packing).float().cpu().numpy()
        for (index, place), (start, stop) in zip(
            responses_of(examples), itertools.pairwise(batch.cu_seqlens.tolist()), strict=True
        ):
            of_response, number = values[start:stop], int(numbers[index])
            bad = np.flatnonzero(~np.isfinite(of_response))
            if len(bad):
                raise NonFiniteError(
                    f"entropy: expected finite numbers, got {of_response[bad[0]]} at token "
                    f"{bad[0]} of the response of {name(number, place)}; the entropy model gives "
                    "NaN or infinite logits there: check its weights and dtype"
                )
            yield number, place, of_response


class Pairs(torch.utils.data.Dataset):
    """Rows of ``tokenize_pairs`` with their number as ``row`` and, from a cache,
    ``chosen_entropy`` and ``rejected_entropy``."""

    def __init__(self, pairs: Dataset, cache: EntropyCache | None = None) -> None:
        self.pairs, self.cache = pairs, cache

    def __len__(self) -> int:
        return len(self.pairs)

    @functools.cached_property
    def sizes(self) -> Sizes:
        return pair_sizes(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {**self.pairs[index], "row": index}
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            row[name] = np.asarray(row[name])
        if self.cache is not None:
            row["chosen_entropy"], row["rejected_entropy"] = self.cache[index]
        return row
