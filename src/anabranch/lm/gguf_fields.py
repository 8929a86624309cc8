"""Which fields of a GGUF file are read. One that says what attention, positions or scales are and is not read is refused by its name.

Names and what llama.cpp computes of them: gguf-py/gguf/constants.py and src/llama-hparams.h of llama.cpp.
"""

import math
from collections.abc import Collection
from typing import Any

from anabranch.bounds import shown
from anabranch.errors import CheckpointError
from anabranch.lm.gguf_file import Fields

__all__ = ["check_fields"]

# Of all architectures.
_READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
}
# These change nothing: a note of how it was trained, a constant of norms that there are none of, and what goes with a temperature.
_IDLE = {"rope.scaling.finetuned", "attention.layer_norm_epsilon", "attention.temperature_length"}
# What says no more than that all is as usual.
_USUAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (1.0, 0.0),
    "expert_weights_scale": (1.0, 0.0),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0, 0.0),
    "residual_scale": (1.0, 0.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    # Negative stands for the usual.
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
}


def check_fields(fields: Fields, prefix: str, *, head_dim: int, read: Collection[str] = ()) -> None:
    """Refuse fields behind ``prefix`` that ask for what is not computed; an architecture has those it alone ``read``.

    Raises:
        CheckpointError: the first of them, with its value and what is supported.
    """
    for name, value in fields.under(prefix):
        tells = name.startswith(("attention.", "rope.")) or name.endswith(("_scale", "_softcapping"))
        if not tells or name in _READ or name in _IDLE or name in read:
            continue
        allowed = _USUAL.get(name)
        if name == "attention.value_length":
            allowed = (head_dim,)
        if name == "attention.scale":
            usual = head_dim**-0.5
            # Stored in single precision.
            is_usual = type(value) is float and math.isclose(value, usual, rel_tol=1e-6)
            allowed = (value if is_usual else usual, 0.0)
        if allowed is None:
            raise CheckpointError(f"{prefix}.{name} in {fields.path} is {shown(value)}, a field that is not supported")
        if value not in allowed:
            raise CheckpointError(
                f"{prefix}.{name} in {fields.path} is {shown(value)}, which is not supported; supported: {allowed[0]}"
            )
