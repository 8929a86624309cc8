"""`Form`: a model's weights in one number of bits, and what they take, without reading them."""

from dataclasses import dataclass
from functools import cached_property

import torch

from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.outline import outline, weight_bytes
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import FewBitLinear, QuantizedPool
from anabranch.serving.config import Quantize, ServingConfig
from anabranch.serving.engine.kinds import Kinds
from anabranch.serving.expertflow.pools import Pools, find_pools

__all__ = ["Form"]


@dataclass(frozen=True, eq=False)
class Form:
    """The weights of a model in one number of bits.

    Attributes:
        quantize: of `ServingConfig`, but ``auto``; ``none`` for weights as we saved them, or in the type that the model is served in.
        model: the outline, see `anabranch.lm.outline`.
    """

    quantize: Quantize
    model: Decoder

    @classmethod
    def of(cls, model: str | Decoder.Config, quantize: Quantize, dtype: torch.dtype) -> "Form":
        """Of a model by its path, or by its config. Raises CheckpointError or ConfigError where it cannot be so."""
        assert quantize != "nf4", "a config with memory to plan has none"
        bits = None if quantize == "none" or quantize == "auto" else quantize
        return cls(quantize, outline(model, bits=bits, dtype=dtype))

    @cached_property
    def pools(self) -> Pools | None:
        """The experts that may stay on disk; None for a model that has none of this kind."""
        try:
            return find_pools(self.model)
        except ConfigError:
            return None

    @cached_property
    def experts(self) -> int:
        """Bytes of all experts, but for their biases, which stay in memory."""
        known = [module for module in self.model.modules() if isinstance(module, ExpertPool | QuantizedPool)]
        biases = [bias for pool in dict.fromkeys(known) for bias in (pool.b13, pool.b2) if bias is not None]
        return sum(map(weight_bytes, dict.fromkeys(known))) - sum(bias.nbytes for bias in biases)

    @cached_property
    def rest(self) -> int:
        """Bytes of everything else."""
        return weight_bytes(self.model) - self.experts

    @property
    def bytes(self) -> int:
        """All weights."""
        return self.experts + self.rest

    @property
    def is_few_bits(self) -> bool:
        """Whether any layer is in few bits."""
        return any(isinstance(module, FewBitLinear | QuantizedPool) for module in self.model.modules())

    @property
    def least_budget(self) -> int | None:
        """The smallest ``expert_budget``; None where experts cannot stay on disk."""
        return None if self.pools is None else self.pools.layout.least_bytes()

    def kinds(self, config: ServingConfig) -> Kinds:
        """Of layers, by how far back they see."""
        return Kinds.of(self.model, config)
