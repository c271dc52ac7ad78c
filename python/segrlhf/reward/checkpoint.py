"""Checkpoints of a Trainer that are whole, of one run, and there after a signal."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..errors import UserError, some
from ..models.loading import is_peft
from ..runtime import files
from ..runtime.checkpoints import (
    check_contents,
    check_newest,
    check_room,
    drop_old_checkpoints,
    mark_complete,
    saving,
)
from ..runtime.identity import Identity, changes_told, require_files
from ..runtime.interrupt import Interrupt

RUN_FILE = "reward_run.json"  # beside the final model: how its data was tokenized and scored


class CheckpointedTrainer(Trainer):
    """transformers.Trainer whose checkpoints appear whole or not at all, and carry an ``identity``
    by which a resumed run is known to be the same one."""

    identity: Identity | None = None
    reward_model: Any  # under every wrapper

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As Trainer.train; SIGINT, SIGTERM or SIGHUP end it after the current step, with a
        checkpoint.

        Raises Interrupted then; its message says how to go on. UserError for a checkpoint of
        another run, and for one that lacks a file.
        """
        if resume_from_checkpoint is not None:
            self._check_checkpoint(Path(resume_from_checkpoint))
        with Interrupt(self.args.output_dir) as self.interrupt:
            output = super().train(resume_from_checkpoint, **kwargs)
            stop = self.interrupt.requested(self.accelerator)
            if stop and self.state.global_step < self.state.max_steps:
                raise self.interrupt.stopped(
                    f"stopped after step {self.state.global_step}; saved "
                    f"{self._checkpoint_folder()}; go on with --resume_from_checkpoint true"
                )
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer would add a step to a run that has done all of them amid an epoch.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _check_checkpoint(self, checkpoint: Path) -> None:
        if self.args.should_save:
            check_contents(checkpoint)
        if self.identity is not None:
            changed = self.identity.check(checkpoint)
            if changed and self.is_world_process_zero():
                check_newest(self.args.output_dir, checkpoint)
                tqdm.write(changes_told(changed))
        # Trainer goes on without them, as another run. Sharded ones have other files.
        require_files(checkpoint, ["trainer_state.json"])
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
            require_files(checkpoint, ["optimizer.pt", "scheduler.pt", f"rng_state{rank}.pth"])

    def check_room(self) -> None:
        """DiskFullError, or a warning, where the checkpoints ahead and the model do not fit."""
        args, state = self.args, self.state
        if args.save_strategy == SaveStrategy.NO:
            n_checkpoints = 0
        elif args.save_strategy == SaveStrategy.EPOCH:
            n_checkpoints = math.ceil(args.num_train_epochs - (state.epoch or 0))
        else:
            n_checkpoints = math.ceil((state.max_steps - state.global_step) / state.save_steps)
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        final = sum(p.nbytes for p in self.model.parameters())
        checkpoint = trained if is_peft(self.model) else final
        if not args.save_only_model and args.optim.startswith("adamw_torch"):
            checkpoint += 2 * trained  # Adam's moments
        warning = check_room(
            args.output_dir, checkpoint, final, n_checkpoints, args.save_total_limit
        )
        if warning:
            tqdm.write(warning)

    def _checkpoint_folder(self) -> Path:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        return Path(self._get_output_dir(None)) / name

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, limit = self._checkpoint_folder(), self.args.save_total_limit
        aside = files.temporary_path(folder, "old")
        if self.args.should_save and folder.exists():
            os.replace(folder, aside)
        self.accelerator.wait_for_everyone()
        self.args.save_total_limit = None  # older checkpoints go only once this one is complete
        try:
            with saving(folder.name, folder.parent):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    if self.identity is not None:
                        self.identity.write(folder)
                    mark_complete(folder, self.state.global_step)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
                if aside.exists():
                    os.replace(aside, folder)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            drop_old_checkpoints(folder.parent, limit, keep=self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        wrong = sorted((*load_result.missing_keys, *load_result.unexpected_keys))
        if wrong:
            raise UserError(
                f"checkpoint: expected exactly the weights of {type(self.reward_model).__name__}, "
                f"got one in which {some(wrong)} are missing or too many; go on from another one"
            )

    def save_final(self, output_dir: str | Path, run: dict[str, Any]) -> None:
        """Writes the reward model (LoRA merged), the tokenizer and ``run`` into ``output_dir``.

        All processes must call it. What stands there is replaced file by file, after everything is
        written.
        """
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model_wrapped)
        if is_peft(model):
            model, state = model.merge_and_unload(), None
        with saving("the final model", output_dir), files.files_into(output_dir) as part:
            model.save_pretrained(part, state_dict=state)
            self.processing_class.save_pretrained(part)
            files.write_json(part / RUN_FILE, run)
