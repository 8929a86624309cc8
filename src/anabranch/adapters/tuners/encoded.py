"""`EncodedFront`: virtual tokens that a network of peft's makes while they are learned (P-tuning, Liu et al. 2021, arXiv 2103.10385)."""
# Shapes: M virtual tokens, W numbers of each

from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.around import put_around
from anabranch.adapters.front import Front
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder

__all__ = ["EncodedFront", "put_encoded"]


class EncodedFront(Front):
    """The virtual tokens of ``front``, each what ``encoder`` makes of its number."""

    def __init__(self, front: Front, encoder: nn.Module) -> None:
        nn.Module.__init__(self)
        self.config, self.num_layers, self.places, self.heads = (
            front.config,
            front.num_layers,
            front.places,
            front.heads,
        )
        self.encoder = encoder

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """weight_MW, as the network makes it now."""
        device = next(self.encoder.parameters()).device
        made: Tensor = self.encoder(torch.arange(self.config.num_tokens, device=device))
        return made

    def described(self, config: Decoder.Config) -> dict[str, Any]:
        """As of P-tuning, whose network is left out."""
        return {**super().described(config), "peft_type": "P_TUNING", "encoder_hidden_size": self.encoder.hidden_size}


def put_encoded(model: Decoder, config: Any, *, seed: int) -> Decoder:
    """Put virtual tokens in front of ``model``, in place, that peft's network of ``config`` makes, which learns.

    Raises ConfigError for a model that multiplies its embeddings, since whether virtual tokens too depends on who trains them.
    """
    from peft import PromptEncoder

    if model.config.embedding_scale != 1:
        raise ConfigError(
            f"the model multiplies embeddings by {model.config.embedding_scale:g}, and peft does not multiply virtual tokens; they cannot "
            "be learned in front of it"
        )
    model.requires_grad_(False)
    put_around(model, front=Front.Config(num_tokens=config.num_virtual_tokens), seed=seed)
    config.token_dim, config.num_transformer_submodules, config.inference_mode = model.config.dim, 1, False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = PromptEncoder(config)
    front = model.streams
    assert isinstance(front, Front)
    model.streams = EncodedFront(front, encoder.to(model.embedding.weight.device)).train(model.training)
    return model
