"""`FAMILIES`: the Hugging Face families by their ``model_type``, each imported when it is asked for.

A family of a design lies with the design, which this layer knows by its path alone. A package adds one by an entry point in the group
``anabranch.huggingface`` whose name is the ``model_type`` and whose value is ``module:object``; see `anabranch.lm.formats.common` for what
it has.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from anabranch.registry import kinds, resolve

__all__ = ["FAMILIES"]

# In order of preference. transformers has no class for DeepSeekMoE's first version nor for ParScale, so these come last.
_MODULES = {
    "llama": "anabranch.lm.formats.llama",
    "qwen2": "anabranch.lm.formats.qwen2",
    "qwen3": "anabranch.lm.formats.qwen3",
    "mistral": "anabranch.lm.formats.mistral",
    "olmoe": "anabranch.lm.formats.olmoe",
    "qwen3_moe": "anabranch.lm.formats.qwen3_moe",
    "mixtral": "anabranch.lm.formats.mixtral",
    "qwen2_moe": "anabranch.lm.formats.qwen2_moe",
    "glm4_moe": "anabranch.lm.formats.glm4_moe",
    "ministral3": "anabranch.lm.formats.ministral3",
    "gemma3_text": "anabranch.lm.formats.gemma3_text",
    "gpt_oss": "anabranch.lm.formats.gpt_oss",
    "deepseek_v2": "anabranch.lm.formats.deepseek_v2",
    "deepseek_v3": "anabranch.lm.formats.deepseek_v3",
    "deepseek": "anabranch.lm.formats.deepseek",
    "qwen2_parscale": "anabranch.experts.parscale.formats",
}


class _Families(Mapping[str, Any]):
    def __getitem__(self, name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(_MODULES[name])
        if name in kinds("huggingface"):
            return resolve("huggingface", name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*_MODULES, *kinds("huggingface")))

    def __len__(self) -> int:
        return len(list(iter(self)))


FAMILIES = _Families()
