"""Trains what a JSON config describes and dies by SIGKILL at a step: the process that the resume test interrupts."""

import json
import os
import signal
import sys

import torch
import transformers as hf

from peanut.training import run

torch.set_num_threads(1)
config, step = json.loads(sys.argv[1]), int(sys.argv[2])
log = run.RunLog.on_log


def die(self: run.RunLog, args: hf.TrainingArguments, state: hf.TrainerState, *rest: object, **more: object) -> None:
    log(self, args, state, *rest, **more)  # type: ignore[arg-type]
    if state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)


run.RunLog.on_log = die  # type: ignore[method-assign, assignment]
run.train(config, quiet=True)
