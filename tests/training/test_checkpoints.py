"""Checkpoints that lack something or are damaged are refused in one line, and what a killed run left is removed."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from peanut import PeanutConfig, PeanutError, PeftModel, get_peft_model
from peanut.training.folder import RunFolder
from peanut.training.trainer import Trainer

from .test_trainer import Rows, arguments, trained

Builder = Callable[..., hf.PreTrainedModel]
Damage = Callable[[Path], object]


def build(tiny_llama: Builder) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), PeanutConfig(task_type="CAUSAL_LM", r=4))


@pytest.fixture(scope="module")
def run(tiny_llama: Builder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, with a checkpoint after the second and the fourth."""
    folder = tmp_path_factory.mktemp("run")
    rows = Rows(language=True)
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    Trainer(build(tiny_llama), arguments(folder, **options), train_dataset=rows, eval_dataset=rows).train()
    return folder


def resumed(tiny_llama: Builder, checkpoint: Path, **options: Any) -> Trainer:
    trainer = Trainer(
        build(tiny_llama), arguments(checkpoint.parent, max_steps=4, **options), train_dataset=Rows(language=True)
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def copied(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run/checkpoint-2"


def optimizer(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(checkpoint: Path) -> None:
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        for each in state["state"].values():
            change(each)
        torch.save(state, checkpoint / "optimizer.pt")

    return damage


def scheduler(**values: object) -> Damage:
    def damage(checkpoint: Path) -> None:
        state = torch.load(checkpoint / "scheduler.pt", weights_only=True)
        torch.save(state | values, checkpoint / "scheduler.pt")

    return damage


def state(**values: object) -> Damage:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / "trainer_state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def removed(name: str) -> Damage:
    return lambda checkpoint: (checkpoint / name).unlink()


def cut(name: str) -> Damage:
    return lambda checkpoint: (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:50])


def junk(name: str) -> Damage:
    return lambda checkpoint: (checkpoint / name).write_text("junk\n")


DAMAGE: dict[str, tuple[Damage, str]] = {
    **{
        f"no {name}": (removed(name), f"it lacks {name};") for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    },
    **{
        f"{what} {name}": (damage(name), f"{name} ({size} bytes) is no archive of torch's; ")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        for what, damage, size in (("half", cut, 50), ("junk", junk, 5))
    },
    "no trainer_state.json": (lambda folder: (folder / "trainer_state.json").unlink(), "it lacks trainer_state.json; "),
    "half trainer_state.json": (cut("trainer_state.json"), "trainer_state.json is damaged or of another run: "),
    "another archive": (
        lambda path: zipfile.ZipFile(path / "optimizer.pt", "w").close(),
        "optimizer.pt or scheduler.pt is damaged or of another run: ",
    ),
    "half adapter": (cut("adapter_model.safetensors"), "cannot read"),
    "moments that broadcast": (optimizer(lambda own: own.update(exp_avg=torch.zeros(1))), "exp_avg is (1,)"),
    "moments of text": (optimizer(lambda own: own.update(exp_avg_sq="x")), "exp_avg_sq is str"),
    "no moments": (
        lambda path: torch.save(
            torch.load(path / "optimizer.pt", weights_only=True) | {"state": {}}, path / "optimizer.pt"
        ),
        "the optimiser's state is empty",
    ),
    "a list for an optimiser": (lambda path: torch.save([1], path / "optimizer.pt"), "damaged or of another run"),
    "a schedule of another run": (
        scheduler(last_epoch=500),
        "the schedule stands at step 500, and the checkpoint at 2",
    ),
    "a schedule without rates": (scheduler(base_lrs=[]), "base_lrs are no 1 learning rates"),
    "random state of another kind": (
        lambda path: torch.save({"python": 1}, path / "rng_state.pth"),
        "its random state is damaged",
    ),
    "an unknown key": (state(foo=1), "unexpected keyword argument 'foo'"),
    "a history of text": (state(log_history="abc"), "log_history is no list of entries"),
    "a history without steps": (state(log_history=[{"loss": 1.0}]), "log_history is no list of entries"),
    "steps of text": (state(max_steps="many"), "is no number"),
    "a flag for a metric": (state(best_metric="high"), "is no number"),
    "callbacks of another kind": (state(stateful_callbacks={"TrainerControl": 3}), "trainer_state.json is damaged"),
    "a best checkpoint of another kind": (state(best_model_checkpoint=3), "is of another type"),
}


@pytest.mark.filterwarnings("ignore:.*pickle")  # torch's
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(name: str, run: Path, tiny_llama: Builder, tmp_path: Path) -> None:
    damage, reason = DAMAGE[name]
    checkpoint = copied(run, tmp_path)
    damage(checkpoint)
    with pytest.raises(PeanutError) as caught:
        resumed(tiny_llama, checkpoint, restore_callback_states_from_checkpoint=True)
    line = str(caught.value)
    assert line.startswith(f"cannot go on from '{checkpoint}': ")
    assert reason in line
    assert line.endswith("delete it to go on from the one before, or begin anew")
    assert "\n" not in line


def test_without_an_optimiser_by_choice_it_says_what_begins_anew(
    run: Path, tiny_llama: Builder, tmp_path: Path
) -> None:
    checkpoint = copied(run, tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
    with pytest.warns(UserWarning, match=r"lacks optimizer.pt, scheduler.pt, rng_state.pth \(save_only_model\)"):
        assert resumed(tiny_llama, checkpoint, save_only_model=True).state.global_step == 4


def test_with_another_number_of_processes_it_says_that_random_states_begin_anew(
    run: Path, tiny_llama: Builder, tmp_path: Path
) -> None:
    checkpoint = copied(run, tmp_path)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    with pytest.warns(UserWarning, match=r"another number of processes: random states begin anew"):
        resumed(tiny_llama, checkpoint)


def test_the_best_checkpoint_is_found_where_the_folder_is_now(run: Path, tiny_llama: Builder, tmp_path: Path) -> None:
    """A copy of the run goes on with its own best checkpoint, whatever became of the first folder's."""
    checkpoint = copied(run, tmp_path)
    state(best_model_checkpoint=str(run / "checkpoint-2"), best_metric=0.0, best_global_step=2)(checkpoint)
    best = trained(PeftModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True))
    rows = Rows(language=True)
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    model = build(tiny_llama)
    trainer = Trainer(model, arguments(checkpoint.parent, **options), train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.best_model_checkpoint == str(checkpoint)
    for name, value in trained(model).items():
        assert torch.equal(value, best[name]), name

    # Where it is gone, the best of the steps to come is kept.
    state(best_model_checkpoint="elsewhere/checkpoint-1")(checkpoint)
    trainer = Trainer(model, arguments(checkpoint.parent, **options), train_dataset=rows, eval_dataset=rows)
    with pytest.warns(UserWarning, match="the best checkpoint 'elsewhere/checkpoint-1' is gone"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.best_global_step == 4


def test_what_killed_runs_left_is_removed_and_nothing_else(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path).parent
    for name in (".adapter.123/half", "checkpoint-7/adapter_model.safetensors", "tmp-checkpoint-9/x", ".mine/x"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("half")
    for name in (".run.yaml.abcd_123", ".log.jsonl.abcdefgh", ".run.yaml.swp", ".notes", "checkpoint-mine"):
        (folder / name).write_text("")
    (folder / "checkpoint-4/trainer_state.json").write_text("{" * 100_000)
    (folder / "run.yaml").write_text("kept")
    with (
        pytest.warns(UserWarning, match=r"checkpoint-4' is damaged \(trainer_state.json\) and is removed"),
        pytest.warns(
            UserWarning, match=r"checkpoint-7' lacks trainer_state.json and is removed: training goes on from"
        ),
    ):
        found = RunFolder(folder).begin(None, overwrite=False)  # type: ignore[arg-type]
    assert found == folder / "checkpoint-2"
    assert {path.name for path in folder.iterdir()} == {
        ".mine",
        ".notes",
        ".run.yaml.swp",
        "checkpoint-2",
        "checkpoint-mine",
        "run.yaml",
    }
