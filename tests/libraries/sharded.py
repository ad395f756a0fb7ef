"""Two gloo processes that train with accelerate, save and load; what each saw goes to a file for test_accelerate.py."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import transformers as hf
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, load_fsdp_model, save_fsdp_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

import peanut

Found = dict[str, Any]

IDS = torch.randint(3, 101, (4, 9), generator=torch.Generator().manual_seed(0))
TARGETS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


def llama() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=101, num_key_value_heads=2, **sizes))


def adapted(method: str) -> Any:
    torch.manual_seed(1)
    config: Any = {"LORA": peanut.LoraConfig, "PEANUT": peanut.PeanutConfig}[method]
    return peanut.get_peft_model(llama(), config(r=4, **TARGETS))


def plugin_of(mode: str, kind: str = "FULL_STATE_DICT") -> FullyShardedDataParallelPlugin | None:
    if not mode.startswith("FSDP"):
        return None
    version = int(mode[-1])
    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        use_orig_params=True if version == 1 else None,
        cpu_ram_efficient_loading=False,
        state_dict_type=kind,
    )


@dataclass
class Training:
    """A model of a method after three steps, as accelerate runs it in a mode."""

    method: str
    mode: str
    rank: int

    def __post_init__(self) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator, plugin = Accelerator(cpu=True), plugin_of(self.mode)
        if plugin is not None:  # which accelerate leaves out on the CPU
            PartialState().distributed_type = self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = plugin
        self.inner = adapted(self.method)
        self.ids = IDS if self.mode == "one" else IDS[2 * self.rank : 2 * self.rank + 2]
        optimizer: Any = torch.optim.SGD([each for each in self.inner.parameters() if each.requires_grad], lr=0.5)
        self.model: Any = self.inner
        if self.mode == "FSDP1":  # accelerate names a device cpu:0, which torch refuses
            options: Any = {"auto_wrap_policy": fsdp_auto_wrap_policy(self.inner), "use_orig_params": True}
            self.model = FullyShardedDataParallel(self.inner, device_id=torch.device("cpu"), **options)
        elif self.mode != "one":
            self.model, optimizer = self.accelerator.prepare(self.inner, optimizer)
        self.losses = []
        for _ in range(3):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
            self.accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(self.mean(loss))

    def mean(self, loss: Tensor) -> float:
        found: Tensor = self.accelerator.gather(loss.detach().reshape(1))
        return found.mean().item()

    def loss(self) -> float:
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()  # else FSDP2 leaves some parameters gathered
        self.model.zero_grad()
        return self.mean(loss)

    def full(self) -> dict[str, Tensor]:
        if self.mode == "FSDP1":  # accelerate offloads it to the CPU, which crashes torch where it is there already
            with FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT):
                return dict(self.model.state_dict())
        return dict(self.accelerator.get_state_dict(self.model))

    def told(self, kind: str) -> Any:
        """What accelerate's functions are told of the processes: of one, so that FSDP1 offloads nothing; see above."""
        own = self.accelerator
        if self.mode != "FSDP1" or kind != "FULL_STATE_DICT":
            return own
        return SimpleNamespace(
            num_processes=1,
            process_index=self.rank,
            is_main_process=self.rank == 0,
            is_fsdp2=False,
            wait_for_everyone=own.wait_for_everyone,
        )

    def saved_and_loaded(self, folder: Path, kind: str, only: bool) -> str:
        """What accelerate's save and load of a sharded model give back: "same", or what went wrong."""
        plugin, told = plugin_of(self.mode, kind), self.told(kind)
        save_fsdp_model(plugin, told, self.model, str(folder), adapter_only=only)
        dist.barrier()
        before, loss = self.trained(), self.loss()
        with torch.no_grad():
            for value in self.model.parameters():
                if value.requires_grad and value.numel():
                    value.zero_()
        assert self.loss() != loss
        load_fsdp_model(plugin, told, self.model, str(folder), adapter_only=only)
        after = self.trained()
        assert self.loss() == loss
        return "same" if all(torch.equal(after[name], value) for name, value in before.items()) else "other values"

    def loaded(self, whole: dict[str, Tensor]) -> str:
        """Whether whole tensors that every process has, as files hold them, can be put into sharded parameters."""
        before = self.trained()
        with torch.no_grad():
            for value in self.inner.parameters():
                if value.requires_grad:
                    value.zero_()
        peanut.set_peft_model_state_dict(self.inner, whole)
        after = self.trained()
        return "same" if all(torch.equal(after[name], value) for name, value in before.items()) else "other values"

    def trained(self) -> dict[str, Tensor]:
        """This process' part of what is trained."""
        found = {name: value.detach() for name, value in self.model.named_parameters() if value.requires_grad}
        return {name: getattr(value, "to_local", lambda own=value: own)().clone() for name, value in found.items()}


def answer(call: Callable[[], object]) -> str:
    try:
        return str(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def seen(method: str, mode: str, rank: int, folder: Path) -> Found:
    training = Training(method, mode, rank)
    found: Found = {"losses": training.losses}
    if mode == "one":
        return found
    full, model = training.full(), training.accelerator.unwrap_model(training.model)
    found["own"] = training.loss()
    if rank == 0:
        # Alone: a collective here would wait for the other process for ever.
        model.save_pretrained(folder / "gathered", state_dict=full)
        again = peanut.PeftModel.from_pretrained(llama(), folder / "gathered")
        found["loaded"] = again(input_ids=IDS, labels=IDS).loss.item()
        found["alone"] = answer(lambda: model.save_pretrained(folder / "alone"))
        found["written"] = sorted(path.name for path in (folder / "alone").glob("*"))
    dist.barrier()
    if mode.startswith("FSDP"):
        found["states"] = {
            (kind, only): answer(partial(training.saved_and_loaded, folder / f"{kind}{only}", kind, only))
            for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
            for only in (False, True)
        }
        if mode == "FSDP2":
            given = safetensors.torch.load_file(folder / "gathered" / "adapter_model.safetensors")
            found["whole"] = answer(partial(training.loaded, given))
        held = torch.load(folder / "FULL_STATE_DICTTrue" / "pytorch_model_fsdp.bin")
        whole = peanut.get_peft_model_state_dict(adapted(method))
        found |= {
            "held": {key: tuple(value.shape) for key, value in held.items()},
            "shapes": {key: tuple(value.shape) for key, value in whole.items()},
        }
    return found


def work(rank: int, folder: Path, cases: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for; the file below is used
    store, patience = dist.FileStore(str(folder / "store"), 2), timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    peanut.install()
    found = {case: seen(*case, rank, folder / "-".join(case)) for case in cases}
    torch.save(found, folder / f"seen{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    place, *named = sys.argv[1:]
    # A process that has imported everything and has no threads forks the two.
    forked = multiprocessing.get_context("fork")
    processes = [
        forked.Process(target=work, args=(rank, Path(place), [tuple(each.split()) for each in named]))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
