"""`put_by_peft` and `apply_peft`: the methods that the package peft runs, under the ids, options and names of the catalogue."""

from collections.abc import Mapping
from typing import Any

from anabranch.adapters.attach import attach
from anabranch.adapters.attached import check_bare
from anabranch.adapters.catalogue.card import Card
from anabranch.adapters.catalogue.cost import estimate, settings
from anabranch.adapters.catalogue.shape import Shape
from anabranch.adapters.catalogue.table import find
from anabranch.adapters.tuners.build import fresh_tuned
from anabranch.adapters.tuners.encoded import put_encoded
from anabranch.adapters.tuners.moved import put_moved
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.lm.decoder import Decoder

__all__ = ["apply_peft", "peft_config", "put_by_peft"]

# Our names of options, and what peft calls them; by method where it has a name of its own.
_NAMES = {
    "rank": "r",
    "alpha": "lora_alpha",
    "tokens": "num_virtual_tokens",
    "entries": "n_frequency",
    "block": "block_size",
}
_OWN_NAMES: dict[str, dict[str, str]] = {
    "oft": {"block": "oft_block_size"},
    "boft": {"block": "boft_block_size"},
    "adalora": {"rank": "init_r"},
    "multitask-prompt-tuning": {"rank": "num_ranks", "tasks": "num_tasks"},
    "vblora": {"vectors": "num_vectors", "length": "vector_length"},
    "lily": {"number": "num_B"},
    "unilora": {"size": "theta_d_length"},
    "tinylora": {"size": "u"},
    "ia3": {"feedforward": "feedforward_modules"},
    "road": {"group": "group_size"},
    "p-tuning": {"hidden": "encoder_hidden_size"},
    "llama-adapter": {"tokens": "adapter_len", "layers": "adapter_layers"},
    "adamss": {"subspaces": "num_subspaces"},
    "frod": {"share": "sparse_rate"},
    "osf": {"kept": "effective_rank"},
    "trainable-tokens": {"ids": "token_indices"},
    "cpt": {"ids": "cpt_token_ids"},
}
# What else peft must be told for a method to be what its card says.
_TOLD: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "adalora": {"total_step": 1000},
    "boft": {"boft_n_butterfly_factor": 1},
    "oft": {"r": 0},
    "c3a": {"init_weights": True},
    "delora": {"init_weights": True},
    "hra": {"init_weights": True},
    "frod": {"progressbar": False},
    # Only layers with biases would have them.
    "glora": {"config_C": "none", "config_D_E": "none"},
    "cartridge": {"num_frozen_tokens": 1},
}
_THEIRS = {word: f"{word}_proj" for word in ("q", "k", "v", "o", "gate", "up", "down")}
# Methods that peft needs more for than a config: data, or a quantised base.
_NEEDS_MORE = {
    "eva": "batches of data, see peft.initialize_lora_eva_weights",
    "loftq": "a LoftQConfig, see peft.LoftQConfig",
}


def peft_config(id: str, options: Mapping[str, Any] | None = None) -> Any:
    """The config of the package peft for a method of the catalogue.

    Raises ConfigError for a method that peft does not run by a config alone, or not in the version that is installed, and for an option
    that its card has not; MissingExtraError where peft is not installed.
    """
    card = find(id)
    if card.peft_type is None or card.backend == "none":
        raise ConfigError(f"{card.id} is not run through peft; {_why(card)}")
    if card.id in _NEEDS_MORE:
        raise ConfigError(f"{card.id} needs {_NEEDS_MORE[card.id]}")
    require("peft", by=f"the method {card.id}")
    from peft import PeftType, TaskType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if card.peft_type not in PeftType.__members__:
        raise ConfigError(
            f"the installed peft has no {card.peft_type}; a newer one has {card.id} (0.21.2 has all of the catalogue)"
        )
    names = _NAMES | _OWN_NAMES.get(card.id, {})
    told: dict[str, Any] = dict(_TOLD.get(card.id, {}))
    for name, value in settings(card, options or {}).items():
        if name == "targets":
            told["target_modules"] = _modules(value)
        elif name == "ids":
            told[names[name]] = [int(id) for id in value]
        elif name == "feedforward":
            told[names[name]] = _modules(value)
        else:
            told[names.get(name, name)] = value
    if card.peft_type == "LN_TUNING":
        told["target_modules"] = ".*norm"
    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[card.peft_type]]
    return kind(task_type=TaskType.CAUSAL_LM, **told)


def apply_peft(model: Any, id: str, **options: Any) -> Any:
    """peft's model around a model of transformers, with a method of the catalogue on it; only what it says learns.

    Args:
        model: of transformers, for causal language modelling.
        id: of a card that peft runs, those of our own that peft has too among them.
        options: of the card.

    Raises as `peft_config`; ConfigError also where peft refuses the options.
    """
    config = peft_config(id, options)
    from peft import get_peft_model

    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"peft refuses {id}: {' '.join(str(error).split())}") from None


def put_by_peft(model: Decoder, id: str, *, seed: int = 0, **options: Any) -> Decoder:
    """Put a method that peft runs onto a model of ours, in place, and return it: peft's layers learn, and nothing else.

    Args:
        model: without adapters.
        id: of a card that peft runs.
        seed: of the first numbers.
        options: of the card.

    Raises as `peft_config` and `fresh_tuned`, ConfigError for a model that has an adapter, and for targets that name nothing.
    """
    check_bare(model)
    config = peft_config(id, options)
    parts = estimate(find(id), Shape.of(model.config), options).matched
    if config.is_prompt_learning:
        return put_encoded(model, config, seed=seed)
    if config.peft_type == "LORA":
        return put_moved(model, config, parts, seed=seed)
    adapter, names = fresh_tuned(model, config, parts, seed=seed)
    return attach(adapter, model, names, trainable=True)


def _modules(targets: Any) -> Any:
    """Targets as peft knows them."""
    if tuple(targets) == ("all",):
        return "all-linear"
    return [_THEIRS.get(target, target) for target in targets]


def _why(card: Card) -> str:
    if card.backend == "own":
        return "apply puts it onto a model of ours"
    return card.limits or "its card tells what it is"
