"""The recipe of runs that start with untrained layers beside the matrices of a trained model, which stays as it is.

anabranch train dynmole --from SmolLM2-135M --out runs/dynmole
"""

from anabranch.adapters.put_on import put_on
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.recipes import Material, recipe

__all__ = ["BESIDE"]

# What is in the names of all parameters of layers that stand beside a matrix.
BESIDE = ".beside."


@recipe(
    "added_layers",
    makes=lambda config: any(layer.is_added for layer in config.linears.values()),
    takes=lambda config: True,
    needs="a model whose matrices are plain, or that has these layers",
    learns=BESIDE,
)
def _added(model: Decoder, config: Decoder.Config, material: Material) -> Decoder:
    if model.config.linears:
        if model.config.linears != config.linears:
            raise ConfigError(
                f"linears of the model has {next(iter(model.config.linears))!r} already, and not as the design wants it; start from its "
                "base"
            )
        # What learned before goes on.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(BESIDE in name)
        return model
    made = put_on(model, config.linears, seed=material.seed)
    other = [name for name, value in made.named_parameters() if value.requires_grad and BESIDE not in name]
    if other:
        raise ConfigError(
            f"{other[0]} is beside a matrix of one of several experts, which a run that is started so cannot train; leave experts out"
        )
    return made
