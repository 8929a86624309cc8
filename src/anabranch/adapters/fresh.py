"""`add_layers`: untrained layers beside the matrices of a model that is trained, in place; and the recipe of runs that start so.

add_layers(model, {"blocks.*.attention.q": RoutedLowRank.Config(ranks=(8, 8))})     # they learn, the model does not
anabranch train dynmole --from SmolLM2-135M --out runs/dynmole
"""

from collections.abc import Mapping

from anabranch.adapters.graft import check_pools, graft
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.recipes import Material, recipe
from anabranch.nn import Linear

__all__ = ["add_layers"]

# What is in the names of all parameters of layers that stand beside a matrix.
BESIDE = ".beside."


def add_layers(model: Decoder, linears: Mapping[str, Linear.Config], *, seed: int = 0) -> Decoder:
    """Put new layers beside matrices of ``model``, freeze the rest, and return the model. It computes what it did, where they start so.

    Args:
        model: with plain matrices alone. While layers are made there is a second one of its size.
        linears: as of `Decoder.Config`; all stand beside their matrix.
        seed: of what is drawn.

    Raises ConfigError for a model that has such layers, none that are to be added, some that would take a matrix's place, and patterns
    that fit nothing.
    """
    if model.config.linears:
        raise ConfigError(
            f"linears of the model has {next(iter(model.config.linears))!r} already; layers are added to plain matrices"
        )
    if not linears:
        raise ConfigError("there are no layers to add; linears is empty")
    replacing = [pattern for pattern, config in linears.items() if not config.is_added]
    if replacing:
        raise ConfigError(
            f"linears has {replacing[0]!r}, a {linears[replacing[0]].owner.kind!r} layer that takes the place of its matrix; "
            "layers that are added stand beside"
        )
    made = model.config.replace(linears=dict(linears)).build(seed=seed)
    check_pools(model, made)
    device = model.embedding.weight.device
    model.requires_grad_(False)
    graft(model, made, lambda part, layer: layer.to(device))
    return model


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
    made = add_layers(model, config.linears, seed=material.seed)
    other = [name for name, value in made.named_parameters() if value.requires_grad and BESIDE not in name]
    if other:
        raise ConfigError(
            f"{other[0]} is beside a matrix of one of several experts, which a run that is started so cannot train; leave experts out"
        )
    return made
