"""A patched model of transformers in the shape that our trainer knows.

patch_model(llama, max_loops=4)
run = TaskRunConfig(task=TextTask.Config(data=DataConfig()), train=TrainConfig(steps=1000))
Trainer(run, "runs/llama", model=PatchedModel(llama), tokenizer=tokenizer).fit()
"""
# Shapes: B sequences, L positions

from typing import Any

from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.experts.versatile.convert import VersatileMLP, collect_routing
from anabranch.lm.decoder import DecoderOutput, output_of

__all__ = ["PatchedModel"]


class PatchedModel(nn.Module):
    """A model of transformers that `patch_model` has changed, called like a `Decoder`: losses of its layers are part of the loss.

    Args:
        model: is used, not copied.

    Raises ConfigError if nothing in it is patched.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not any(isinstance(module, VersatileMLP) for module in model.modules()):
            raise ConfigError(f"{type(model).__name__} has no patched block; patch_model makes them")
        self.model: Any = model
        self.config: Any = self.model.config

    def forward(
        self, token_BL: Tensor, target_BL: Tensor | None = None, *, token_mask_BL: Tensor | None = None
    ) -> DecoderOutput:
        """Logits, or the losses when ``target_BL`` is given; arguments as for `Decoder.forward`."""
        with collect_routing(attention_mask=token_mask_BL) as context:
            mask_BL = None if token_mask_BL is None else token_mask_BL.long()
            logits_BLV = self.model(token_BL, attention_mask=mask_BL, use_cache=False).logits
        return output_of(logits_BLV, target_BL, context)
