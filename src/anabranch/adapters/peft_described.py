"""`described`: an adapter_config.json that says of layers what is true of their numbers."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from anabranch.adapters.dora import Decomposed
from anabranch.adapters.low_rank import Pair
from anabranch.adapters.numbers import Numbers
from anabranch.adapters.scaling import Scale
from anabranch.adapters.skills import Skills

__all__ = ["described"]


def described(table: Mapping[str, Any], layers: Mapping[str, Numbers]) -> dict[str, Any]:
    """``table`` with what it says of kind, sizes, scales and layers made true of ``layers``; the rest, known or not, stays.

    Raises ValueError for what one config cannot say: layers of several kinds, scales of which some are rank-stabilised, numbers of tasks,
    skills or splits that differ.
    """
    kinds = {type(numbers) for numbers in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"layers are {', '.join(sorted(kind.what for kind in kinds)) or 'none'}")
    # Nothing that is left over from another set of layers may take one away.
    rest = {
        name: value
        for name, value in table.items()
        if name not in ("exclude_modules", "layers_to_transform", "layers_pattern")
    }
    # Layers are named by target_modules below, and peft refuses one that both name.
    if rest.get("target_parameters"):
        stacked = [word for word in rest["target_parameters"] if word.rpartition(".")[2] != "weight"]
        rest["target_parameters"] = stacked or None
    say: Any = {Pair: _low_rank, Decomposed: _low_rank, Scale: _scales, Skills: _skills}[kinds.pop()]
    return {**rest, **say(layers), "target_modules": sorted(layers)}


def _low_rank(layers: Mapping[str, Any]) -> dict[str, Any]:
    stabilised = {pair.rslora for pair in layers.values()}
    if len(stabilised) > 1:
        raise ValueError("some scales are alpha / rank and others alpha / sqrt(rank)")
    ranks = {module: pair.rank for module, pair in layers.items()}
    alphas = {module: pair.alpha for module, pair in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    dora = {"use_dora": True} if all(isinstance(pair, Decomposed) for pair in layers.values()) else {}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: _plain(value) for module, value in alphas.items() if value != alpha},
        "use_rslora": stabilised.pop(),
        **dora,
    }


def _scales(layers: Mapping[str, Scale]) -> dict[str, Any]:
    inputs = sorted(module for module, scale in layers.items() if scale.is_input)
    return {"peft_type": "IA3", "feedforward_modules": inputs}


def _skills(layers: Mapping[str, Skills]) -> dict[str, Any]:
    sizes = {(one.rank, len(one.logit_TX), one.a_SKPR.shape[1], one.a_SKPR.shape[0]) for one in layers.values()}
    if len(sizes) > 1:
        raise ValueError(f"layers have (rank, tasks, skills, splits) {sorted(sizes)}")
    return {"peft_type": "POLY", **dict(zip(("r", "n_tasks", "n_skills", "n_splits"), sizes.pop(), strict=True))}


def _plain(value: float) -> float | int:
    """Without ``.0``: peft's lora_alpha is a whole number wherever it can be."""
    return int(value) if value == int(value) else value
