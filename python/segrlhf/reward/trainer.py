"""transformers' Trainer for reward models of segments, tokens or whole responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from segkernels import segment_bradley_terry

from ..data.batch import PairBatch, Sizes, make_pair_batch, pair_example
from ..data.render import pad_token_id
from ..errors import NonFiniteError, UserError, first_line, some
from ..models.loading import is_peft
from ..models.packing import Reader, make_reader
from ..models.reward_model import response_rewards
from ..runtime.checkpoints import check_not_beyond, is_whole
from ..runtime.distributed import any_rank
from ..runtime.finite import check_weights
from ..runtime.identity import Identity
from ..runtime.metrics import Metrics
from .checkpoint import CheckpointedTrainer
from .config import RewardConfig
from .metrics import evaluation_metrics, evaluation_table, record


def _rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the dataloader gives: the rows as they are, and ``numbers`` int64 [B], those in their
    dataset. Which of them are read together is decided where the model is known."""
    return {"numbers": torch.tensor([row["row"] for row in rows]), "rows": list(rows)}


class _Shuffle(torch.utils.data.Sampler[int]):
    """A permutation per epoch that depends on seed and epoch only, so that a resumed run and any
    number of processes see the same order."""

    def __init__(self, trainer: SegmentRewardTrainer, length: int) -> None:
        self.trainer, self.length = trainer, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        args = self.trainer.args
        seed = args.seed if args.data_seed is None else args.data_seed
        epoch = int(self.trainer.state.epoch or 0)
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        yield from torch.randperm(self.length, generator=generator).tolist()


@dataclass(frozen=True)
class _MicroBatch:
    """What became of some pairs, left on the device until the whole step is looked at."""

    rows: Tensor  # int64 [B]: their numbers in the dataset
    finite: Tensor  # bool [B]: both scores, and the margin
    loss_finite: Tensor  # bool, 0-d


@dataclass(frozen=True)
class _Part:
    """A micro-batch."""

    batch: PairBatch
    numbers: np.ndarray  # of its pairs among the rows of the batch
    counts: bool  # False: a filler
    last: bool


class _Guard(TrainerCallback):
    """What is checked around each optimizer step, and the end of a step after a signal."""

    def __init__(self, trainer: SegmentRewardTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # Else those of the checkpoint's state would win over those of this run.
        state.compute_steps(args, state.max_steps)
        check_not_beyond(state.global_step, state.max_steps, "step")
        if state.max_steps < 1 or len(kwargs["train_dataloader"]) == 0:
            raise UserError(
                f"training: expected at least one step, got {len(self.trainer.train_dataset)} "
                f"pairs for batches of {args.train_batch_size}, and {state.max_steps} steps in "
                "all; drop --dataloader_drop_last, or lower --per_device_train_batch_size"
            )
        if args.should_save:
            self.trainer.check_room()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.check_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        step = f"step {state.global_step + 1}"
        check_weights(trainer.accelerator, trainer.model, trainer.optimizer, step, args.output_dir)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.interrupt.requested(self.trainer.accelerator):
            control.should_save = control.should_training_stop = True
        return control


class SegmentRewardTrainer(CheckpointedTrainer):
    """transformers.Trainer for a ``SegmentRewardModel`` on tokenized pairs.

    ``train_dataset`` and ``eval_dataset`` are ``entropy_cache.Pairs``: what
    ``tokenize_pairs`` gives, with an entropy cache where the granularity is "segment". A batch
    counts pairs; it is read in micro-batches of at most ``max_tokens_per_batch`` tokens, pairs of
    like length together, in the packing of ``models.packing`` that suits the model. The loss is
    ``segkernels.segment_bradley_terry``. Losses and metrics are means over pairs, exact across
    micro-batches, processes and a last partial batch.

    Logged beside Trainer's own: accuracy, margin, mean_reward, min_reward, max_reward (of response
    scores), segments/per_response, segments/tokens_per_segment; ``eval_`` versions of all of them
    and eval_longer_wins, the accuracy of "the longer response wins" on the same pairs (ties half).

    Raises NonFiniteError, naming step and rows, before a NaN or infinite loss or gradient can
    reach the weights, and when an optimizer step makes weights that are not finite;
    ``Interrupted`` after a signal, with a checkpoint of the step just finished. ``identity`` is
    saved with each checkpoint; resuming from one that has another is an error.
    """

    def __init__(
        self,
        model: Any,
        args: RewardConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        identity: Identity | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator=_rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            compute_metrics=self._evaluation_metrics,
            **kwargs,
        )
        # get_batch_samples counts pairs, compute_loss divides by them: Trainer must not divide.
        self.model_accepts_loss_kwargs = True
        self.identity = identity
        # Under peft and every wrapper, for what its config says.
        self.reward_model = model.get_base_model() if is_peft(model) else model
        self._micro_batches: list[_MicroBatch] = []  # of the current step on this process
        self._reader: Reader | None = None
        self._metrics = Metrics()  # since the last log
        self.add_callback(_Guard(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with _settings("optim", f"{self.args.optim} with optim_args {self.args.optim_args}"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        kind, given = self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs
        with _settings("lr_scheduler_kwargs", f"{kind} with {given}"):
            return super().create_scheduler(*args, **kwargs)

    # Batches

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        return _Shuffle(
            self, len(train_dataset if train_dataset is not None else self.train_dataset)
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step and the number of pairs in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            batch["pairs"] = len(batch["rows"])
        world = self.args.world_size
        if batches and world > 1 and self.accelerator.gradient_state.end_of_dataloader:
            # accelerate completes the last batch with rows of the first; they must not count twice.
            size = self._train_batch_size
            left = len(self.train_dataset) % (size * world)
            if left:
                mine = min(max(left - self.args.process_index * size, 0), size)
                rows = batches[-1]["rows"][: max(mine, 1)]
                batches[-1] = {**_rows(rows), "pairs": mine}
        self._micro_batches = []
        counted = torch.tensor(sum(b["pairs"] for b in batches), dtype=torch.float32, device=device)
        return batches, self.accelerator.reduce(counted, "sum")

    def reader(self, model: Any) -> Reader:
        """How pairs become micro-batches; found on the largest pair at the first call."""
        if self._reader is None:
            splits = [each for each in (self.train_dataset, self.eval_dataset) if each is not None]
            everything: Any = torch.utils.data.ConcatDataset(splits)
            sizes = Sizes(
                np.concatenate([each.sizes.prompts for each in splits]),
                np.concatenate([each.sizes.responses for each in splits]),
            )
            self._reader = make_reader(
                model,
                self.args,
                response_rewards,
                sizes,
                lambda pair: pair_example(everything[pair]),
                pad_token_id=pad_token_id(self.processing_class),
                mixed_precision=self.accelerator.mixed_precision != "no",
            )
        return self._reader

    def _read(self, model: Any, rows: Sequence[dict[str, Any]]) -> Iterator[_Part]:
        """The micro-batches of these rows. Where parameters are gathered in every pass, all
        processes get the same number of them, some as fillers that do not count."""
        reader, device = self.reader(model), self.args.device
        examples = [pair_example(row) for row in rows]
        plan = reader.plan(Sizes.of(examples))
        count = len(plan)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            count = max(gather_object([count]))
        for k in range(count):
            numbers = plan[k] if k < len(plan) else plan[-1][-1:]
            batch = reader.batch([examples[i] for i in numbers], device)
            pairs = make_pair_batch([rows[i] for i in numbers], batch).to(device)
            yield _Part(pairs, numbers, counts=k < len(plan), last=k == count - 1)

    # Loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Gradients of all pairs of a batch, micro-batch by micro-batch; their loss."""
        losses = []
        for part in self._read(model, inputs["rows"]):
            pairs = len(part.numbers) if part.counts and inputs["pairs"] else 0
            with nullcontext() if part.last else self._gradients_stay(model):
                micro = {"batch": part.batch, "pairs": pairs}
                losses.append(super().training_step(model, micro, num_items_in_batch))
        return torch.stack(losses).sum()

    @contextmanager
    def _gradients_stay(self, model: Any) -> Iterator[None]:
        """Processes exchange gradients after the last micro-batch only; sharded ones after each,
        since a process has no room for all of them."""
        state = self.accelerator.gradient_state
        exchanging = state.sync_gradients
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        state._set_sync_gradients(False)
        try:
            with nullcontext() if sharded else self.accelerator.no_sync(model=model):
                yield
        finally:
            state._set_sync_gradients(exchanging)

    def _forward(self, model: Any, pairs: PairBatch) -> tuple[Any, Tensor]:
        """(Loss and scores, ends of segments [N])."""
        rewards = response_rewards(model, pairs.batch, self.reader(model).packing)
        mask, cu_seqlens = pairs.batch.mask, pairs.batch.cu_seqlens
        ends = self.reward_model.segment_ends(pairs.entropy, mask, pairs.terminated, cu_seqlens)
        result = segment_bradley_terry(
            rewards,
            ends,
            mask,
            cu_seqlens=cu_seqlens,
            reduction=self.args.score_reduction,
            margin=pairs.margin,
            label_smoothing=self.args.label_smoothing_factor,
            center_coef=self.args.center_rewards_coefficient or 0.0,
        )
        return result, ends

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch, pairs = inputs["batch"], inputs["pairs"]
        result, ends = self._forward(model, batch)
        # An infinite chosen score has a finite loss, 0.
        finite = result.scores.detach().isfinite().view(2, -1).all(0)
        if batch.margin is not None:
            finite = finite & batch.margin.isfinite()
        self._micro_batches.append(_MicroBatch(batch.rows, finite, result.loss.detach().isfinite()))
        # DeepSpeed takes the optimizer step inside of the backward pass.
        if self.is_deepspeed_enabled and any_rank(self.accelerator, ~self._losses_finite()):
            self._stop_non_finite("loss", self._non_finite_rows())
        record(self._metrics, result, ends, batch.batch.cu_seqlens, pairs)
        # Gradients are averaged over processes, so this factor makes a mean over all their pairs.
        loss = result.loss * (pairs * self.args.world_size / num_items_in_batch)
        return (loss, result) if return_outputs else loss

    def floating_point_ops(self, inputs):
        tokens = sum(len(ids) for row in inputs["rows"] for ids in _ids(row))
        return 6 * tokens * self.reward_model.num_parameters(exclude_embeddings=True)

    def check_step(self) -> None:
        """Raises NonFiniteError for a NaN or infinite loss, score or gradient, before the optimizer
        uses it; the only place of a step that waits for the device."""
        losses = self._losses_finite()
        if not any_rank(self.accelerator, ~(losses & self._gradients_finite())):
            return
        if any_rank(self.accelerator, ~losses):
            self._stop_non_finite("loss", self._non_finite_rows())
        rows = [row for batch in self._micro_batches for row in batch.rows.tolist()]
        self._stop_non_finite("gradient norm", rows)

    def _losses_finite(self) -> Tensor:
        return torch.stack([b.finite.all() & b.loss_finite for b in self._micro_batches]).all()

    def _non_finite_rows(self) -> list[int]:
        """Rows whose scores are not finite; all of a micro-batch where that does not explain its
        loss."""
        found = []
        for batch in self._micro_batches:
            rows, finite = batch.rows.tolist(), batch.finite.tolist()
            bad = [row for row, ok in zip(rows, finite, strict=True) if not ok]
            found += rows if not bad and not batch.loss_finite else bad
        return found

    def _gradients_finite(self) -> Tensor:
        if self.accelerator.scaler is not None or self.is_deepspeed_enabled:
            # Their loss scalers meet infinities by design, and skip the step themselves.
            return torch.ones((), dtype=torch.bool, device=self.args.device)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).isfinite()

    def _stop_non_finite(self, what: str, rows: list[int]) -> None:
        rows = sorted(set(gather_object(rows)))
        ids = self.train_dataset[rows[0]]["prompt_ids"].tolist()
        prompt = self.processing_class.decode(ids)[-60:]
        step = self.state.global_step
        if step == 0:
            saved = "no step was taken, so there is nothing to save"
        else:
            folder = self._checkpoint_folder()
            if any_rank(self.accelerator, self.args.should_save and not is_whole(folder)):
                self._save_checkpoint(self.model_wrapped, None)
            saved = f"the last good weights are in {folder}"
        raise NonFiniteError(
            f"{what}: expected a finite number, got NaN or infinity at step {step + 1}, rows "
            f"{some(rows)} of the training pairs (the first has the prompt {prompt!r}); {saved}. "
            "Look at those rows, lower --learning_rate, or train in float32 or bf16"
        )

    # Metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._metrics.reduce(self.accelerator)}
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        numbers = inputs["numbers"].to(self.args.device)
        table = torch.zeros(len(numbers), 6, dtype=torch.float64, device=self.args.device)
        for part in self._read(model, inputs["rows"]):
            with torch.no_grad(), self.compute_loss_context_manager():
                result, ends = self._forward(model, part.batch)
            self._check_scores(result.scores, part.batch.rows)
            table[part.numbers] = evaluation_table(result, ends, part.batch)
        return None, table, numbers

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self.is_world_process_zero():
            accuracy, longer = (metrics[f"{prefix}_{name}"] for name in ("accuracy", "longer_wins"))
            tqdm.write(
                f"{prefix} accuracy {accuracy:.3f}; 'the longer response wins' is right for "
                f"{longer:.3f} of the same pairs"
            )
        return metrics

    def _evaluation_metrics(self, prediction: Any) -> dict[str, float]:
        args, table = self.args, torch.from_numpy(np.asarray(prediction.predictions)).double()
        return evaluation_metrics(
            table, args.label_smoothing_factor, args.center_rewards_coefficient or 0.0
        )

    def _check_scores(self, scores: Tensor, rows: Tensor) -> None:
        finite = scores.isfinite().view(2, -1).all(0)
        if not bool(finite.all()):
            raise NonFiniteError(
                f"reward: expected finite scores, got NaN or infinity for rows "
                f"{some(rows[~finite].tolist())} of the evaluation pairs"
            )


@contextmanager
def _settings(name: str, got: str) -> Iterator[None]:
    """What transformers raises for settings that it does not take becomes a UserError."""
    try:
        yield
    except (TypeError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(
            f"{name}: expected settings that transformers takes, got {got}: {first_line(error)}"
        ) from error


def _ids(row: dict[str, Any]) -> list[Any]:
    prompt, responses = pair_example(row)
    return [prompt, *responses]
