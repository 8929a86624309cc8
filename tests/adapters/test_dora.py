"""`Dora`: how it starts, learns and drops out; what it computes is in test_kinds."""

import pytest
import torch

from adapter_kinds import close, put_on
from adapter_models import CONFIGS, TOKENS, logits
from anabranch.adapters.dora import Dora


def test_dora_starts_as_the_matrix_and_follows_it():
    """Built from a config: lengths are those of the rows, also of single experts, so that nothing is changed at first."""
    for family, pattern in (("llama", "*.down"), ("olmoe", "*.experts.*.up"), ("llama", "*.attention.*")):
        config = CONFIGS[family]()
        plain, model = config.build(), config.replace(linears={pattern: Dora.Config(rank=2)}).build()
        found = {name.replace(".matrix", ""): value for name, value in model.state_dict().items()}
        plain.load_state_dict({name: found[name] for name in plain.state_dict()})
        close(logits(model), logits(plain), 1e-6)


def test_gradients_of_dora_may_go_through_the_length(places):
    """As the function has them; as in peft they do not."""
    model = put_on(places, "dora", trainable=True)
    layer = model.blocks[0].attention.qkv.beside["q"]
    assert layer.config.constant_norm
    made = {}
    for constant in (True, False):
        layer.config = layer.config.replace(constant_norm=constant)
        model.zero_grad()
        model(TOKENS, TOKENS.roll(-1, 1)).loss.backward()
        made[constant] = layer.b.grad.clone()
    assert not torch.allclose(made[True], made[False], rtol=1e-3)
    step, loss = 1e-3, []
    way = made[False] / made[False].norm()
    for sign in (1, -1):
        with torch.no_grad():
            layer.b += sign * step * way
            loss.append(float(model(TOKENS, TOKENS.roll(-1, 1)).loss))
            layer.b -= sign * step * way
    assert (loss[0] - loss[1]) / (2 * step) == pytest.approx(float(made[False].norm()), rel=1e-2)


def test_dropout_of_dora_is_of_the_matrix_too(places):
    """As in peft: what is beside the matrix, m / length - 1 times its product, sees the same x as the adapter."""
    model = put_on(places, "dora", trainable=True).train()
    layer = model.blocks[0].attention.out.beside["o"]
    matrix, x = model.blocks[0].attention.out.matrix, torch.randn(4, 32)
    torch.manual_seed(0)
    found = model.blocks[0].attention.out(x)
    torch.manual_seed(0)
    dropped = layer.dropped(x)
    assert (dropped == 0).any()
    turned = matrix.weight + layer.scale * layer.b @ layer.a
    gain = layer.magnitude / turned.norm(dim=1)
    wanted = (
        matrix(x) + (gain - 1) * (dropped @ matrix.weight.T) + gain * layer.scale * (dropped @ layer.a.T @ layer.b.T)
    )
    close(found, wanted)
