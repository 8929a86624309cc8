"""Which positions attention sees and how it knows them, in the spelling of Hugging Face: windows and rotary angles."""

from collections.abc import Iterable
from typing import Any

from anabranch.errors import CheckpointError
from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.foreign import Foreign
from anabranch.nn import Rotary
from anabranch.nn.attention import Attention
from anabranch.nn.rotary import yarn_factor

__all__ = [
    "local_layers",
    "read_rotary",
    "read_windows",
    "rotary_of",
    "rotary_table",
    "window_of",
    "write_rotary",
    "write_windows",
]

# In ``layer_types``.
FULL, LOCAL = "full_attention", "sliding_attention"


def read_windows(
    foreign: Foreign, attention: Attention.Config, local: Iterable[int] | None, *, switch: bool = False
) -> dict[str, Any]:
    """``attention``, ``local_attention`` and ``local_layers`` of a model whose layers ``local`` see a window alone, if it has one.

    In families with a ``switch``, ``use_sliding_window``, there is none unless that is on, and then one of 4096 where no width is given, as
    in transformers; others have no such field. A window narrower than the context is refused where ``local`` is None, for families that
    have none.
    """
    if local is None:
        _refuse_windows(foreign)
        return {"attention": attention}
    window = foreign.table.get("sliding_window", 4096 if switch else None)
    if switch and not foreign.get("use_sliding_window", False):
        window = None
    layers = tuple(sorted(local)) if window else ()
    if len(layers) == foreign.num_layers:
        return {"attention": attention.replace(window=window)}
    if not layers:
        return {"attention": attention}
    return {"attention": attention, "local_attention": attention.replace(window=window), "local_layers": layers}


def _refuse_windows(foreign: Foreign) -> None:
    """Raise CheckpointError for a window in a family that has none; a wide one, or one that is said to be off, changes nothing."""
    window, on = foreign.get("sliding_window"), foreign.get("use_sliding_window", True)
    if window and on and window < foreign.get("max_position_embeddings", 2048):
        foreign.refuse("sliding_window", window, "none (full attention)")
    other = [kind for kind in foreign.get("layer_types", ()) if kind != FULL]
    if other:
        foreign.refuse("layer_types", other[0], repr(FULL))


def local_layers(foreign: Foreign, otherwise: Iterable[int] = ()) -> list[int]:
    """The layers that ``layer_types`` says have a window; ``otherwise`` where it says nothing."""
    kinds = foreign.get("layer_types")
    if kinds is None:
        return list(otherwise)
    other = [kind for kind in kinds if kind not in (FULL, LOCAL)]
    if other:
        foreign.refuse("layer_types", other[0], f"{FULL!r} or {LOCAL!r}")
    if len(kinds) != foreign.num_layers:
        raise CheckpointError(
            f"layer_types in {foreign.path} are {len(kinds)}, and num_hidden_layers is {foreign.num_layers}"
        )
    return [layer for layer, kind in enumerate(kinds) if kind == LOCAL]


def window_of(config: Decoder.Config) -> int | None:
    """The window of the layers that have one."""
    windows = [getattr(config.attention_of(layer), "window", None) for layer in range(config.num_layers)]
    return next((window for window in windows if window is not None), None)


def write_windows(config: Decoder.Config) -> dict[str, Any]:
    """``sliding_window``, and which layers have it."""
    windows = [getattr(config.attention_of(layer), "window", None) for layer in range(config.num_layers)]
    return {
        "sliding_window": window_of(config),
        "layer_types": [FULL if window is None else LOCAL for window in windows],
    }


def read_rotary(foreign: Foreign, default_theta: float, default_fraction: float | None = None) -> Rotary.Config:
    """From ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (before).

    ``default_fraction`` is of families that may rotate a part of a head; others, where it is None, rotate all.
    """
    name = "rope_parameters" if foreign.get("rope_parameters") else "rope_scaling"
    table = foreign.get(name, {})
    theta = table.get("rope_theta") or foreign.get("rope_theta", default_theta)
    fraction = table.get("partial_rotary_factor") or foreign.get("partial_rotary_factor", default_fraction or 1.0)
    if default_fraction is None and fraction != 1.0:
        foreign.refuse("partial_rotary_factor", fraction, "1.0")
    return rotary_of(foreign, name, table, float(theta), fraction=float(fraction))


def rotary_of(
    foreign: Foreign, name: str, table: dict[str, Any], theta: float, *, fraction: float = 1.0
) -> Rotary.Config:
    """What the table ``name`` of a foreign config says of rotary positions."""
    kind = table.get("rope_type", table.get("type", "default"))
    scaling = Foreign(table, foreign.path)
    plain = Rotary.Config(theta=theta, fraction=fraction)
    if kind == "default":
        return plain
    original = scaling.get("original_max_position_embeddings", foreign.get("max_position_embeddings"))
    if kind == "linear":
        return plain.replace(scaling="linear", factor=float(scaling["factor"]))
    if kind == "llama3":
        return plain.replace(
            scaling="llama3",
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_positions=original,
        )
    if kind == "yarn":
        factor = float(scaling.get("factor") or foreign["max_position_embeddings"] / original)
        return plain.replace(
            scaling="yarn",
            factor=factor,
            original_positions=original,
            beta_fast=float(scaling.get("beta_fast") or 32),
            beta_slow=float(scaling.get("beta_slow") or 1),
            truncate=scaling.get("truncate", True),
            attention_factor=_attention_factor(scaling, factor),
        )
    foreign.refuse(f"{name}.rope_type", kind, "'default', 'linear', 'llama3' or 'yarn'")
    raise AssertionError("refused")


def _attention_factor(scaling: Foreign, factor: float) -> float | None:
    """YaRN's factor on what is rotated, as it is given, or the ratio of DeepSeek's two; None for the usual."""
    given, mscale, of_all = (scaling.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is None and mscale and of_all:
        return yarn_factor(factor, mscale) / yarn_factor(factor, of_all)
    return None if given is None else float(given)


def rotary_table(rotary: Rotary.Config) -> dict[str, Any]:
    """As ``rope_parameters`` of transformers 5, of one kind of layers."""
    table = write_rotary(rotary)
    return {"rope_type": "default", **(table["rope_scaling"] or {}), "rope_theta": rotary.theta}


def write_rotary(rotary: Rotary.Config) -> dict[str, Any]:
    """In the older spelling, which every version of transformers reads."""
    scaling: dict[str, Any] | None = None
    if rotary.scaling != "none":
        scaling = {"rope_type": rotary.scaling, "factor": rotary.factor}
    if rotary.scaling == "llama3":
        scaling = {
            **(scaling or {}),
            "low_freq_factor": rotary.low_freq_factor,
            "high_freq_factor": rotary.high_freq_factor,
            "original_max_position_embeddings": rotary.original_positions,
        }
    if rotary.scaling == "yarn":
        scaling = {
            **(scaling or {}),
            "original_max_position_embeddings": rotary.original_positions,
            "beta_fast": rotary.beta_fast,
            "beta_slow": rotary.beta_slow,
            "truncate": rotary.truncate,
            **({} if rotary.attention_factor is None else {"attention_factor": rotary.attention_factor}),
        }
    fraction = {} if rotary.fraction == 1.0 else {"partial_rotary_factor": rotary.fraction}
    return {"rope_theta": rotary.theta, "rope_scaling": scaling, **fraction}
