"""The catalogue of methods of parameter-efficient fine-tuning: a card of each, what it costs, what to choose, and how it is put on.

    from anabranch.adapters import catalogue
    shape = catalogue.Shape.of(model.config)
    catalogue.estimate(catalogue.find("lora"), shape, {"rank": 16}).trainable
    catalogue.recommend(shape, catalogue.Limits(max_parameters=1_000_000, merges=True)).choices[0]
    applied = catalogue.apply(model, "adapter-parallel", width=8)

After "Parameter-Efficient Fine-Tuning for Large Models: A Comprehensive Survey" (Han, Gao, Liu, Zhang and Zhang 2024, arXiv 2403.14608).
"""

from anabranch.adapters.catalogue.applied import Applied, apply, load_applied
from anabranch.adapters.catalogue.card import Card, Op, Paper, Work
from anabranch.adapters.catalogue.cost import Estimate, estimate, settings
from anabranch.adapters.catalogue.measured import MEASURED, Measurement, read_measurements
from anabranch.adapters.catalogue.recommend import Choice, Limits, Recommendation, recommend
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.catalogue.table import CARDS, find, listed
from anabranch.adapters.catalogue.through_peft import apply_peft, peft_config, put_by_peft

__all__ = [
    "CARDS",
    "MEASURED",
    "Applied",
    "Card",
    "Choice",
    "Estimate",
    "Limits",
    "Matrix",
    "Measurement",
    "Op",
    "Paper",
    "Recommendation",
    "Shape",
    "Work",
    "apply",
    "apply_peft",
    "estimate",
    "find",
    "listed",
    "load_applied",
    "peft_config",
    "put_by_peft",
    "read_measurements",
    "recommend",
    "settings",
]
