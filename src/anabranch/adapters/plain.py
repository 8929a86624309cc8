"""Pairs beside our parts as a plain LoRA adapter by the names of transformers, which is what peft's folders hold."""

from collections.abc import Mapping

from torch import nn

from anabranch.adapters.low_rank import Pair
from anabranch.adapters.names import names_of
from anabranch.adapters.peft_folder import Adapter, described
from anabranch.errors import CheckpointError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import some

__all__ = ["peft_adapter"]

_TABLE = {
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "bias": "none",
    "inference_mode": True,
    "lora_dropout": 0.0,
}


def peft_adapter(model: nn.Module, pairs: Mapping[str, Pair], family: str | None = None) -> Adapter:
    """``pairs`` as an adapter.

    Args:
        model: what they are beside: one of ours, or any other, whose own names are peft's.
        pairs: by the names of the parts.
        family: the ``model_type`` of Hugging Face whose names are used, where several could be the model's.

    Raises CheckpointError where no family of Hugging Face's has such a model, or the family has no linear layer for a part.
    """
    if not isinstance(model, Decoder):
        return Adapter(described(_TABLE, pairs), pairs)
    names = names_of(model.config.replace(linears={}), (), family)
    homeless = [part for part in pairs if part not in {place.part for place in names.places.values()}]
    if homeless:
        raise CheckpointError(f"Hugging Face's {names.family} has no linear layer for {some(homeless)}")
    theirs = {module: place.theirs(pairs[place.part]) for module, place in names.places.items() if place.part in pairs}
    return Adapter(described(_TABLE, theirs), theirs)
