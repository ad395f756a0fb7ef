"""``Pretrained``: adapters in folders and on the hub, written and read."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..errors import check_keywords, warn
from ..files import write_files
from ..hub import CARD_NAME, HUB_OPTIONS, push
from ..protocols import PeftConfig, method_of
from ..protocols.arguments import checked
from .adapters.adapter_set import AdapterSet
from .adapters.size_limits import limited_by_file
from .checkpoints.card import card_text
from .checkpoints.checkpoint import file_config, save_adapter
from .checkpoints.embeddings import SaveEmbeddings
from .checkpoints.loading import all_or_none, load_state, same_form
from .checkpoints.mixtures import add, gathered, ready, save_experts
from .checkpoints.stored_adapter import TRAINING_NAME, StoredAdapter, read_adapter
from .controls import AdapterControls
from .keywords import LOADING, SAVING

__all__ = ["Pretrained"]

M = TypeVar("M", bound="Pretrained")


class Pretrained(AdapterControls):
    """What a ``PeftModel`` writes and reads."""

    @checked
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: SaveEmbeddings = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **given: Any,
    ) -> None:
        """Writes adapters and their trained heads: ``default`` into the folder, others into folders of their names.

        Of the base, only embeddings are ever written; loading puts them into the base, and refuses one that differs
        otherwise.

        Args:
            safe_serialization: write safetensors; else a pickle of the tensors, without checksums and without what is
                known of the base, so that loading can check neither.
            selected_adapters: which adapters; all by default.
            save_embedding_layers: whether to write the base's input and output embeddings too; ``"auto"`` does if the
                config names them (``embed_tokens``, ``lm_head``) as targets, or if the vocabulary was resized.
            path_initial_model_for_weight_conversion: without effect: what starts in the weight is always saved as a
                plain LoRA for the untouched base.
            state_dict: a full state dict, as FSDP and DeepSpeed gather it, to take the values from.
            given: what Hugging Face PEFT also accepts and a folder of safetensors has no use for.

        Raises:
            PeanutError: a keyword is unknown, the folder cannot be written, or a value is not finite. No file is then
                half written.
        """
        check_keywords("save_pretrained", given, _named(self.save_pretrained), SAVING)
        for name in self.adapters.known(selected_adapters or list(self.peft_config)):
            if is_main_process:
                folder = _folder_of(Path(save_directory), name)
                save_adapter(folder, self.adapters, name, state_dict, save_embedding_layers, not safe_serialization)
                save_experts(folder, self.adapters, name, state_dict, save_embedding_layers, not safe_serialization)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str], tags: Sequence[str] = ()) -> None:
        """Writes the model card of the active adapter into a folder, as ``save_pretrained`` does for each."""
        self._write_card(Path(output_dir), self.active_adapter, tags)

    def _write_card(self, folder: Path, name: str, tags: Sequence[str]) -> None:
        text = card_text(self.adapters, file_config(self.adapters, name, self.peft_config[name]), folder, tags)
        if text is not None:
            write_files(folder, {CARD_NAME: lambda path: path.write_text(text, encoding="utf-8")})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """Uploads the adapters, as ``save_pretrained`` writes them, and never the base model.

        Args:
            max_shard_size: accepted for scripts, without effect.
            tags: what the model card is tagged with besides.
            options: ``commit_description``, ``private``, ``token``, ``revision``, ``create_pr``.

        Raises:
            PeanutError: the hub refuses or cannot be reached, or an adapter cannot be saved.
        """

        def save(folder: Path) -> None:
            self.save_pretrained(folder)
            for name in self.peft_config if tags else ():
                self._write_card(_folder_of(folder, name), name, tags or ())

        return push(repo_id, save, commit_message or "Upload model", options)

    @classmethod
    @checked
    def from_pretrained(
        cls: type[M],
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        check_base: bool = True,
        ignore_mismatched_sizes: bool = False,
        strict: bool = True,
        **hub: Any,
    ) -> M:
        """A model with an adapter read from a folder (or from the hub, if a hub id is given).

        Args:
            config: to be used instead of the folder's.
            autocast_adapter_dtype: store the adapter in float32 on a half-precision base.
            ephemeral_gpu_offload: accepted for scripts, without effect.
            low_cpu_mem_usage: keep the tensors as they were read, in the file's memory, and make no copy of them.
            key_mapping: regular expressions and what replaces them in the file's keys, without ``base_model.model.``.
            check_base: refuse a base whose weights differ from those that the adapter was trained on.
            ignore_mismatched_sizes: warn of tensors of another shape, and keep new ones in their place.
            strict: refuse a file that lacks tensors or has others; else warn, and keep new ones for what it lacks.
            hub: ``subfolder``, ``revision``, ``token`` and the like; and what Hugging Face PEFT also accepts and has no
                effect here, where an adapter's tensors follow the base's devices.

        Raises:
            PeanutError: a keyword is unknown, or a file is missing or broken, or does not fit the model, which is then
                unchanged.
        """
        hub = check_keywords("from_pretrained", hub, {*HUB_OPTIONS, *_named(cls.from_pretrained)}, LOADING)
        stored = gathered(read_adapter(model_id, config, key_mapping, **hub))
        stored = replace(stored, config=_config_for_use(stored, is_trainable))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        own = AdapterSet.of(model)
        try:
            with all_or_none(own), limited_by_file(stored.source, stored.state):
                folder = model_id if config is None else None  # a config that is given says where experts lie
                found = ready(own, stored.config, folder, wide=autocast_adapter_dtype, check_base=check_base)
                meta = strict and not ignore_mismatched_sizes
                made: Any = cls
                adapted: M = made(model, found, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage=meta)
                name = adapted.active_adapter
                own = adapted.adapters
                load_state(
                    own,
                    name,
                    stored,
                    check=check_base,
                    alias=low_cpu_mem_usage,
                    skip_sizes=ignore_mismatched_sizes,
                    strict=strict,
                )
        except BaseException:
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        return adapted.eval() if not is_trainable else adapted

    @checked
    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        check_base: bool = True,
        ignore_mismatched_sizes: bool = False,
        strict: bool = True,
        **hub: Any,
    ) -> _IncompatibleKeys:
        """Reads another adapter into the model, or other values and their config into one that is there.

        ``set_adapter`` makes it active. The answer names the keys that were not loaded, as ``load_state_dict`` does.

        Args and errors: see ``from_pretrained``; ``torch_device`` has no effect, tensors follow the base's devices.
        """
        hub = check_keywords("load_adapter", hub, {*HUB_OPTIONS, *_named(self.load_adapter)}, LOADING)
        stored = gathered(read_adapter(model_id, None, key_mapping, **hub))
        fresh = adapter_name not in self.peft_config
        with all_or_none(self.adapters), limited_by_file(stored.source, stored.state):
            if fresh:
                stored = replace(stored, config=_config_for_use(stored, is_trainable))
                wide = autocast_adapter_dtype
                found = ready(self.adapters, stored.config, model_id, wide=wide, check_base=check_base)
                meta = strict and not ignore_mismatched_sizes
                add(self.adapters, adapter_name, found, meta=meta, wide=wide)
            result = load_state(
                self.adapters,
                adapter_name,
                stored,
                check=check_base,
                alias=low_cpu_mem_usage,
                skip_sizes=ignore_mismatched_sizes,
                strict=strict,
            )
        if not fresh and not same_form(self.adapters, adapter_name, stored.config):
            mode = self.peft_config[adapter_name].inference_mode
            self.adapters.configure(adapter_name, replace(stored.config, inference_mode=mode))
        return result


def _folder_of(directory: Path, name: str) -> Path:
    """Where an adapter is in the folder of a model."""
    return directory if name == "default" else directory / name


def _config_for_use(stored: StoredAdapter, is_trainable: bool) -> PeftConfig:
    """The config under which a stored adapter is used: what only training needs is left out where it is not there."""
    config = replace(stored.config, inference_mode=not is_trainable)
    method = method_of(config.peft_type)
    needed = method.scaffold(config) if is_trainable else frozenset()
    if needed and not stored.passing:
        warn(
            f"'{stored.source}' has no {TRAINING_NAME}, so {method.name} is trained on without {sorted(needed)[0]} and "
            "the like: what they compute is trained itself",
        )
        return method.without_scaffold(config)  # type: ignore[no-any-return]
    return config


def _named(function: Callable[..., Any]) -> set[str]:
    """The keywords that a function takes by name."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
