"""The tasks, by their name in a run's config."""

from __future__ import annotations

from .image import ImageClassification
from .instruction import Instruction
from .language import CausalLM, LanguageTask
from .sentences import TextClassification, TextRegression
from .task import Task, TextTask, positions

__all__ = ["TASKS", "CausalLM", "Instruction", "LanguageTask", "Task", "TextClassification", "TextTask", "positions"]

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (TextClassification, TextRegression, CausalLM, Instruction, ImageClassification)
}
