"""Adapting a frozen model to tasks: methods by name, one task of the trainer, and what the command `anabranch adapt` does.

config = TaskRunConfig(task=AdaptTask.Config(model="SmolLM2-135M", data="rows.jsonl", method=Lora.Config()), train=TrainConfig())
Trainer(config, "runs/mine").fit()
"""

from anabranch.adapters.adapt.answers import Answers
from anabranch.adapters.adapt.catalogued import Catalogued, method_named, method_names, methods_with
from anabranch.adapters.adapt.lora import Lora
from anabranch.adapters.adapt.measuring import Score, Scores, measure_rows, rouge_l
from anabranch.adapters.adapt.method import Method, Written
from anabranch.adapters.adapt.rows import Row, read_rows
from anabranch.adapters.adapt.task import AdaptTask

__all__ = [
    "AdaptTask",
    "Answers",
    "Catalogued",
    "Lora",
    "Method",
    "Row",
    "Score",
    "Scores",
    "Written",
    "measure_rows",
    "method_named",
    "method_names",
    "methods_with",
    "read_rows",
    "rouge_l",
]
