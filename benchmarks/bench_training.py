"""Reward training, ours beside TRL's: ``python benchmarks/bench_training.py``.

With ``--model DIR --pairs FILE`` a language model and preference pairs of your own, else a Llama of
random weights on generated pairs. Each trainer has a process of its own, is given the same weights
and the same pairs in the same order, as token ids, and trains them as a user would: in float32 with
activation checkpointing and the optimizer of its defaults. The learning rate is 0, so that every
step can be compared with that of padded rows. A first batch is not timed; it pays for what happens
once, the choice of a packing among it. Then all take turns, one pass over the pairs each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import instruction_sets  # noqa: F401  (before torch computes)
import machine
import memory
import numpy as np
import result_file
import tables
import torch
from compare import Wrong
from timing import spread

OURS, PADDED, TRL = "segrlhf", "segrlhf, padded rows", "TRL"
ROLES = {OURS: "ours", PADDED: "definition", TRL: "peer"}

# How far losses may be from those of padded rows, as a share of them, and the gradient of the first
# batch, as a share of its norm.
LOSS_ERROR, GRADIENT_ERROR = 1e-5, 1e-4

# Logarithms of lengths in tokens, mean and deviation, of 2,000 preference pairs by people under the
# tokenizer of SmolLM2, and the correlation of the two responses' logarithms.
PROMPT, RESPONSES, CORRELATION = (4.79, 1.29), ((4.13, 1.10), (3.95, 1.12)), 0.61

PAD, BOS, EOS = range(3)  # of the generated pairs


@dataclass(frozen=True)
class Workload:
    """What is trained on what; ``None`` is made here."""

    model: str | None = None  # directory of a language model
    pairs: str | None = None  # a file of preference pairs
    count: int = 24  # pairs
    max_length: int = 2048
    max_prompt_length: int = 1728
    hidden: int = 192  # of the random model
    layers: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.model is None) != (self.pairs is None):
            raise ValueError("expected --model and --pairs, or none of them; give the other one")


# ---- what everybody reads ----------------------------------------------------------------------


def random_model(workload: Workload, folder: Path) -> None:
    """A Llama of random weights, and a tokenizer that knows special tokens alone."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names.values())}))
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=workload.hidden,
        intermediate_size=8 * workload.hidden // 3,
        num_hidden_layers=workload.layers,
        num_attention_heads=max(1, workload.hidden // 64),
        num_key_value_heads=1,
        max_position_embeddings=workload.max_length,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(workload.seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)


def generated_pairs(workload: Workload) -> Any:
    """Random tokens in lengths as real pairs have them, as ``tokenize_pairs`` gives them: prompts
    that are too long are drawn again, responses cut."""
    from datasets import Dataset

    draw = np.random.default_rng(workload.seed)

    def length(normal: float, mean: float, deviation: float) -> int:
        return max(1, round(float(np.exp(mean + deviation * normal))))

    def ids(count: int) -> list[int]:
        return draw.integers(EOS + 1, 4096, count).tolist()

    rows: list[dict[str, Any]] = []
    while len(rows) < workload.count:
        prompt = length(draw.normal(), *PROMPT)
        if prompt > workload.max_prompt_length:
            continue
        row: dict[str, Any] = {"prompt_ids": ids(prompt)}
        normals = draw.multivariate_normal([0, 0], [[1, CORRELATION], [CORRELATION, 1]])
        room = workload.max_length - prompt
        for side, normal, logarithm in zip(("chosen", "rejected"), normals, RESPONSES, strict=True):
            whole = [*ids(length(normal, *logarithm)), EOS]
            row |= {f"{side}_ids": whole[:room], f"{side}_terminated": len(whole) <= room}
        rows.append(row)
    return Dataset.from_list(rows)


def real_pairs(workload: Workload, tokenizer: Any) -> Any:
    """Some of the file's, drawn at random, without margins."""
    from segrlhf.configs import DataConfig
    from segrlhf.data.load import load_split
    from segrlhf.data.tokenize import tokenize_pairs

    rows = load_split(DataConfig(dataset_name=str(workload.pairs)), "train")
    assert rows is not None
    some = rows.shuffle(seed=workload.seed).select(range(min(4 * workload.count, len(rows))))
    lengths = {name: getattr(workload, name) for name in ("max_length", "max_prompt_length")}
    pairs, _ = tokenize_pairs(
        some.select_columns([x for x in ("prompt", "chosen", "rejected") if x in some.features]),
        tokenizer,
        **lengths,
    )
    if len(pairs) < workload.count:
        raise ValueError(f"expected {workload.count} usable pairs, got {len(pairs)}; lower --count")
    return pairs.select(range(workload.count))


def prepare(workload: Workload, folder: Path) -> dict[str, Any]:
    """Writes the reward model that everybody starts from and the pairs; what a result says of them.

    TRL takes a response's score from transformers' sequence classifier, which reads it at the last
    token that is not the pad token. Where that is the end token as well, as SmolLM2's is, it reads
    the token before the end. Ours reads the end; so here padding gets a token that ends nothing.
    """
    from transformers import AutoTokenizer

    from segrlhf.models.reward_model import SegmentRewardModel

    source = workload.model
    if source is None:
        source = str(folder / "lm")
        random_model(workload, Path(source))
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        others = (tokenizer.unk_token, tokenizer.bos_token)
        [tokenizer.pad_token, *_] = [x for x in others if x not in (None, tokenizer.eos_token)]
    model = SegmentRewardModel.from_causal_lm(
        source, "bandit", seed=workload.seed, tokenizer=tokenizer, dtype="float32"
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    real = workload.pairs is not None
    pairs = real_pairs(workload, tokenizer) if real else generated_pairs(workload)
    pairs.save_to_disk(folder / "pairs")
    return {
        "model": model.config.model_type,
        "parameters": model.num_parameters(),
        "data": Path(workload.pairs).name if workload.pairs else "generated",
        "pairs": workload.count,
        "longest": workload.max_length,
    }


# ---- a process of its own ----------------------------------------------------------------------


def trainer_of(name: str, folder: Path, options: Mapping[str, Any], callbacks: list[Any]) -> Any:
    """The trainer, as its users make it."""
    from datasets import load_from_disk

    pairs = load_from_disk(str(folder / "pairs"))
    path = str(folder / "model")
    if name == TRL:
        from transformers import AutoTokenizer
        from trl import RewardConfig as Config
        from trl import RewardTrainer

        def joined(row: dict[str, Any]) -> dict[str, Any]:
            return {
                f"{side}_ids": [*row["prompt_ids"], *row[f"{side}_ids"]]
                for side in ("chosen", "rejected")
            }

        return RewardTrainer(
            path,
            Config(**options, model_init_kwargs={"dtype": "float32"}, max_length=None),
            train_dataset=pairs.map(joined, remove_columns=pairs.column_names),
            processing_class=AutoTokenizer.from_pretrained(path),
            callbacks=callbacks,
        )
    from transformers import AutoTokenizer

    from segrlhf.entropy_cache import Pairs
    from segrlhf.models.reward_model import SegmentRewardModel
    from segrlhf.reward.config import RewardConfig
    from segrlhf.reward.trainer import SegmentRewardTrainer

    return SegmentRewardTrainer(
        SegmentRewardModel.from_pretrained(path, dtype="float32"),
        RewardConfig(**options, granularity="bandit", packing="none" if name == PADDED else "auto"),
        train_dataset=Pairs(pairs),
        processing_class=AutoTokenizer.from_pretrained(path),
        callbacks=callbacks,
    )


def gradients_file(folder: Path, name: str) -> Path:
    return folder / f"gradients of {name}"


def work(name: str, folder: Path, batch: int, passes: int, seed: int) -> None:
    """Trains one batch, then a pass for every line of the standard input; says, in lines of json,
    how long each took, and at the end what came of it."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print

    def say(**facts: Any) -> None:
        print(json.dumps(facts), file=out, flush=True)

    from transformers import TrainerCallback

    class Passes(TrainerCallback):
        begin = 0.0

        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.global_step > 0 and not sys.stdin.readline():
                raise SystemExit("the benchmark has ended")
            self.begin = time.perf_counter()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step > 0:
                return
            # One by one: a copy of all would count as the trainer's memory.
            with gradients_file(folder, name).open("wb") as file:
                for _, parameter in sorted(model.named_parameters()):
                    file.write(memoryview(parameter.grad.contiguous().numpy()).cast("B"))

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                control.should_epoch_stop = True
            return control

        def on_epoch_end(self, args, state, control, **kwargs):
            say(seconds=time.perf_counter() - self.begin)

    options = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1 + passes,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,  # the gradients that are compared are not clipped
        "gradient_checkpointing": True,
        "bf16": False,
        "use_cpu": True,
        "seed": seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = trainer_of(name, folder, options, [Passes()])
    losses: list[float] = []
    tokens: list[int] = []
    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        tokens.append(0)
        loss = step(*args, **kwargs)
        losses.append(float(loss))
        return loss

    def count(module: Any, args: Any, kwargs: Any) -> None:
        if tokens and module.training:
            tokens[-1] += kwargs["input_ids"].numel()

    trainer.training_step = recorded
    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    pass_ = slice(1, 1 + (len(losses) - 1) // passes)
    peak = memory.status("VmHWM") if sys.platform == "linux" else None
    say(losses=losses[pass_], tokens=sum(tokens[pass_]), peak_bytes=peak)


class Ended(RuntimeError):
    """A process of a trainer that ended early, and why."""


class Process:
    """One that trains, as ``work`` does."""

    def __init__(self, name: str, folder: Path, batch: int, passes: int, seed: int) -> None:
        self.log = folder / f"log of {name}"
        arguments = [name, folder, batch, passes, seed]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker", json.dumps(arguments, default=str)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder)},
            )

    def reply(self) -> dict[str, Any]:
        """The next line that it says. Ended where there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        lines = [x.strip() for x in self.log.read_text().splitlines() if x.strip()]
        raise Ended(f"ended with status {status}: {(lines or ['without a word'])[-1][:300]}")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


# ---- side by side ------------------------------------------------------------------------------


def gradient_error(found: Path, expected: Path) -> float:
    """Euclidean norm of the difference, as a share of the norm of the expected one."""
    a, b = (np.memmap(path, np.float32, mode="r") for path in (found, expected))
    if len(a) != len(b):
        return float("inf")
    difference = norm = 0.0
    for start in range(0, len(a), 1 << 22):
        x, y = (part[start : start + (1 << 22)].astype(np.float64) for part in (a, b))
        difference += float(np.square(x - y).sum())
        norm += float(np.square(y).sum())
    return (difference / norm) ** 0.5


def loss_error(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest difference of a step's loss, as a share of it."""
    return max(abs(x - y) / abs(y) for x, y in zip(found, expected, strict=True))


def told(name: str, seconds: float) -> float:
    """``seconds``, said to whoever waits: a pass of a real model takes minutes."""
    print(f"{name}: {seconds:.2f} s, load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return seconds


def check(result: Mapping[str, Any]) -> None:
    """Wrong for losses or gradients that are not those of padded rows."""
    for what, bound in (("loss", LOSS_ERROR), ("gradient", GRADIENT_ERROR)):
        error = result[f"{what}_error"]
        if not error <= bound:
            raise Wrong(f"{what} error {error:.1e}, allowed {bound:.0e}")


def side_by_side(
    shape: Mapping[str, Any], folder: Path, batch: int, repeats: int, seed: int = 0
) -> dict[str, Any]:
    """A line of a result file: everybody on what ``prepare`` wrote, which returned ``shape``.

    An error of ours, losses and gradients that are not those of padded rows among them, is an
    error; one of TRL's is its reason for having no time.
    """
    results = {name: {"name": name, "role": role} for name, role in ROLES.items()}
    running: dict[str, Process] = {}
    samples: dict[str, list[float]] = {}

    def left_out(name: str, error: Exception) -> None:
        if ROLES[name] != "peer":
            raise error
        results[name]["reason"] = f"{type(error).__name__}: {error}"
        running.pop(name).close()

    try:
        for name in (PADDED, OURS, TRL):
            if name == TRL and importlib.util.find_spec("trl") is None:
                results[name]["reason"] = "not installed"
                continue
            running[name] = Process(name, folder, batch, repeats, seed)
            try:
                results[name]["first_batch"] = told(name, running[name].reply()["seconds"])
                if name != PADDED:
                    files = (gradients_file(folder, each) for each in (name, PADDED))
                    results[name]["gradient_error"] = gradient_error(*files)
                samples[name] = []
            except Ended as error:
                left_out(name, error)
        for turn in range(repeats):
            names = list(running)
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                try:
                    running[name].go()
                    samples[name].append(told(name, running[name].reply()["seconds"]))
                except (Ended, OSError) as error:
                    left_out(name, error)
        for name in list(running):
            try:
                results[name] |= running[name].reply()
                if name != PADDED:
                    losses = (results[each]["losses"] for each in (name, PADDED))
                    results[name]["loss_error"] = loss_error(*losses)
                    check(results[name])
                results[name] |= spread(samples[name])
            except (Ended, Wrong) as error:
                left_out(name, error)
    finally:
        for process in running.values():
            process.close()
    return {
        "op": "reward training",
        "pass": "forward + backward",
        "shape": {**shape, "batch": batch},
        "dtype": "float32",
        "contenders": list(results.values()),
    }


def result_path(folder: Path, facts: Mapping[str, Any], workload: Workload) -> Path:
    """One name per kind of machine, for the generated workload and for others."""
    kind = "generated" if workload.model is None else "real"
    return folder / f"training-{kind}-{result_file.file_name(facts)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    defaults = asdict(Workload())
    parser.add_argument("--model", help="directory of a causal language model (default: random)")
    parser.add_argument("--pairs", help="file of preference pairs (default: generated)")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16], help="pairs a step")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each trainer")
    parser.add_argument("--results", type=Path, help="folder for the results of this run")
    for name in ("count", "max_length", "max_prompt_length", "hidden", "layers", "seed"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=defaults[name], help="default %(default)s")
    options = parser.parse_args(arguments)
    try:
        workload = Workload(**{name: getattr(options, name) for name in defaults})
    except ValueError as error:
        parser.error(str(error))
    if min(options.repeats, options.count, *options.batch) < 1:
        parser.error("--repeats, --count, --batch: expected at least 1; raise it")
    load = [os.getloadavg()[0]]
    lines = []
    for batch in options.batch:
        with tempfile.TemporaryDirectory(prefix="bench-training-") as name:
            shape = prepare(workload, Path(name))
            lines.append(side_by_side(shape, Path(name), batch, options.repeats, workload.seed))
    facts = machine.header("cpu") | {"read_bandwidth": machine.read_bandwidth()}
    facts["load_average"] = [*load, os.getloadavg()[0]]
    print(tables.text(result_file.File(facts, lines)))
    print("load average before and after: {:.2f}, {:.2f}".format(*facts["load_average"]))
    if options.results is not None:
        path = result_path(options.results, facts, workload)
        result_file.write(path, facts, lines)
        print(f"results: {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, folder, *numbers = json.loads(sys.argv[2])
        work(name, Path(folder), *numbers)
    else:
        main()
