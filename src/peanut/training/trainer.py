"""transformers' ``Trainer`` for adapted models; checkpoints hold the adapter and the trained head, never the base."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Sized
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.generic import can_return_loss, find_labels

from ..errors import PeanutError
from ..files import as_one_line
from ..model.peft_model import PeftModel
from ..protocols import method_of
from .checkpoints import (
    check_complete,
    check_optimizer,
    check_scheduler,
    is_whole,
    reading,
    refused,
    restore_best,
    whole_checkpoints,
)

__all__ = ["AdapterTrainerMixin", "Trainer", "is_whole", "whole_checkpoints"]

if TYPE_CHECKING:
    _Base: TypeAlias = transformers.Trainer
else:
    _Base = object


class AdapterTrainerMixin(_Base):
    """What a Trainer must know about an adapted model; to be put before any subclass of transformers' Trainer.

    ``class MyTrainer(AdapterTrainerMixin, Seq2SeqTrainer): ...``. transformers recognises adapters only by the classes
    of Hugging Face PEFT; here its hooks for labels, columns, saving and loading look at the base model and at our
    files. A model that is no ``PeftModel`` of ours is treated as transformers always does.

    Args:
        args, kwargs: those of the Trainer; ``tokenizer``, the name that ``processing_class`` had before transformers 5,
            is taken too.
        head_learning_rate: learning rate of the modules trained whole (``modules_to_save``, the classifier); the
            adapter's, ``TrainingArguments.learning_rate``, if not given.
    """

    def __init__(self, *args: Any, head_learning_rate: float | None = None, **kwargs: Any) -> None:
        self.head_learning_rate = head_learning_rate
        if "tokenizer" in kwargs:
            kwargs.setdefault("processing_class", kwargs.pop("tokenizer"))
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, PeftModel):
            # By this mark transformers accepts a quantised base for training: adapters are attached to it.
            model.__dict__["_hf_peft_config_loaded"] = True
        super().__init__(*args, **kwargs)
        adapted = self._adapted()
        if adapted is None:
            return
        self.add_callback(_Plan(self))
        base = adapted.get_base_model()
        if self.args.label_names is None:
            self.label_names = find_labels(type(base))
        self.can_return_loss = can_return_loss(type(base))
        accepts = getattr(base, "accepts_loss_kwargs", None)
        parameters = inspect.signature(base.forward).parameters.values()
        self.model_accepts_loss_kwargs = (
            any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters) if accepts is None else accepts
        )
        if self.label_smoother is not None:
            self._smooth(adapted, base)

    def _smooth(self, adapted: PeftModel, base: Any) -> None:
        """Lets label smoothing compare each label with the logits that predict it.

        Raises:
            PeanutError: an adapter has a loss of its own, in place of which it would come.
        """
        factor = self.args.label_smoothing_factor
        for name in adapted.active_adapters:
            if getattr(method_of(adapted.peft_config[name].peft_type), "own_loss", False):
                raise PeanutError(f"label_smoothing_factor={factor} for {name!r}, which has a loss of its own", "0")
        shifts = base._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        shifts = shifts or LOSS_MAPPING.get(getattr(base, "loss_type", "")) is ForCausalLMLoss
        if shifts and not getattr(base.config, "is_encoder_decoder", False):
            self.label_smoother = partial(_smoothed, self.label_smoother)  # type: ignore[assignment]

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss; where it is not the model's own, the active adapters' penalties are added here."""
        adapted = self._adapted()
        if adapted is None or (self.label_smoother is None and self.compute_loss_func is None):
            return super().compute_loss(model, inputs, *args, **kwargs)
        with adapted.adapters.state.during(penalising=False):
            found = super().compute_loss(model, inputs, *args, **kwargs)
        penalty = adapted.adapters.penalty() if model.training else None
        if penalty is None:
            return found
        return (found[0] + penalty, *found[1:]) if isinstance(found, tuple) else found + penalty

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluation and prediction; what is computed from the adapters is cached until they end."""
        adapted = self._adapted()
        with nullcontext() if adapted is None else adapted.inference():
            return super().evaluation_loop(*args, **kwargs)

    def _adapted(self) -> PeftModel | None:
        """The model without what accelerate and ``torch.compile`` put around it, if it is one of ours."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model if isinstance(model, PeftModel) else None

    def _set_signature_columns_if_needed(self) -> None:
        adapted = self._adapted()
        if adapted is None:
            super()._set_signature_columns_if_needed()
        else:
            names = inspect.signature(adapted.get_base_model().forward).parameters
            columns = [*names, "label", "label_ids", *self.label_names]
            self._signature_columns = list(dict.fromkeys(columns))  # type: ignore[assignment]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser that the arguments ask for, with groups for the adapter and for the head."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        adapted = self._adapted()
        if adapted is not None and self.head_learning_rate is not None:
            heads = {id(p) for _, saved in adapted.adapters.saved_modules() for p in saved.parameters()}
            groups = [
                {**group, "params": [p for p in group["params"] if id(p) not in heads]}
                for group in optimizer.param_groups
            ]
            groups += [
                {**group, "params": [p for p in group["params"] if id(p) in heads], "lr": self.head_learning_rate}
                for group in optimizer.param_groups
            ]
            optimizer.param_groups[:] = groups
        # A fused step with no tensor in a group is an error in some optimisers.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        adapted = self._adapted()
        if adapted is None:
            super()._save(output_dir, state_dict)
            return
        folder = str(output_dir or self.args.output_dir)
        adapted.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None and self.args.should_save:
            with as_one_line(f"cannot write the checkpoint '{folder}'"):
                processor.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint that is whole, or none: a full disk leaves no half of one behind."""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError, PeanutError) as error:
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            if not (isinstance(error, (OSError, SafetensorError, PeanutError)) or _is_failed_write(error)):
                raise
            if self.args.should_save and not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, PeanutError):
                raise
            raise PeanutError(
                f"cannot write the checkpoint '{folder}': {error}", do="free some space and run again to continue"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted = self._adapted()
        if adapted is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if not self._sharded:
            check_complete(
                Path(resume_from_checkpoint), processes=self.args.world_size, model_only=self.args.save_only_model
            )
        _load_adapters(adapted, resume_from_checkpoint)

    @property
    def _sharded(self) -> bool:
        """Whether checkpoints have the files of DeepSpeed or FSDP for the optimiser."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _init_training_state(self, *args: Any) -> Any:
        if args[3] is None or self._adapted() is None:
            return super()._init_training_state(*args)
        checkpoint = Path(args[3])
        with reading(checkpoint, "trainer_state.json"):
            found = super()._init_training_state(*args)
        restore_best(self.state, checkpoint, Path(str(self.args.output_dir)))
        return found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or ""), "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
            read = checkpoint is not None and all(
                Path(checkpoint, name).is_file() for name in ("optimizer.pt", "scheduler.pt")
            )
            if read and not self._sharded and self._adapted() is not None:
                assert self.optimizer is not None
                check_optimizer(self.optimizer)
                check_scheduler(self.lr_scheduler, self.state.global_step, len(self.optimizer.param_groups))

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or ""), "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or ""), "its random state"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        adapted, best = self._adapted(), self.state.best_model_checkpoint
        if adapted is None or best is None:
            super()._load_best_model()
        else:
            _load_adapters(adapted, best)


class _Plan(transformers.TrainerCallback):
    """Tells the methods with a schedule, when training begins, how long it will be."""

    def __init__(self, trainer: AdapterTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        adapted, rows = self.trainer._adapted(), self.trainer.train_dataset
        if adapted is not None:
            adapted.adapters.plan(state.max_steps, len(rows) if isinstance(rows, Sized) else 0)


class Trainer(AdapterTrainerMixin, transformers.Trainer):
    """transformers' Trainer for a ``PeftModel``: same arguments, and ``head_learning_rate``.

    Checkpoints hold the adapter and the trained head and resume exactly; ``load_best_model_at_end`` works.
    """


def _smoothed(
    smoother: Any, outputs: Any, labels: torch.Tensor, shift_labels: bool = True, **more: Any
) -> torch.Tensor:
    """The smoothed loss of a causal model, also if it is compiled or has virtual tokens, which have no labels."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    labels = nn.functional.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=smoother.ignore_index)
    loss: torch.Tensor = smoother(outputs, labels, shift_labels=True, **more)
    return loss


def _load_adapters(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Gives every adapter of the model the values in ``folder``, where ``save_pretrained`` put them."""
    for name in model.peft_config:
        source = Path(folder) if name == "default" else Path(folder) / name
        try:
            model.load_adapter(source, name, is_trainable=True)
        except PeanutError as error:
            raise refused(Path(folder), error.found) from error


def _is_failed_write(error: BaseException) -> bool:
    """Whether torch.save failed on the disk; it says so in a plain RuntimeError."""
    return "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
