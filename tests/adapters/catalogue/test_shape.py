"""The sizes of a model, and which of its layers targets name."""

import pytest

from adapter_models import CONFIGS
from anabranch.adapters.catalogue import Shape
from anabranch.errors import ConfigError

LLAMA, OLMOE = (Shape.of(CONFIGS[family]()) for family in ("llama", "olmoe"))


def test_sizes_are_those_of_the_model_that_is_built():
    for family in ("llama", "qwen2", "qwen3", "olmoe", "deepseek_v2"):
        shape, model = Shape.of(CONFIGS[family]()), CONFIGS[family]().build()
        named = dict(model.named_parameters())
        assert shape.parameters == sum(parameter.numel() for parameter in named.values())
        assert shape.biases == sum(one.numel() for name, one in named.items() if name.endswith("bias"))
        assert shape.norms == sum(one.numel() for name, one in named.items() if "norm" in name)
        matrices = shape.parameters - shape.biases - shape.norms - named["embedding.weight"].numel()
        routers = sum(one.numel() for name, one in named.items() if ".router." in name)
        assert sum(matrix.size for matrix in shape.matrices) == matrices - routers, family


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("q", "v"), ["q", "v"] * 2),
        (("v_proj", "q_proj"), ["q", "v"] * 2),
        (("attention",), ["q", "k", "v", "o"] * 2),
        (("mlp",), ["gate", "up", "down"] * 2),
        (("all",), ["q", "k", "v", "o", "gate", "up", "down"] * 2),
        (("lm_head",), ["head"]),
        (("blocks.1.*",), ["q", "k", "v", "o", "gate", "up", "down"]),
        (("q", "blocks.0.attention.q"), ["q", "q"]),
    ],
)
def test_targets(targets, words):
    assert [matrix.word for matrix in LLAMA.chosen(targets)] == words


def test_experts_are_named_one_by_one():
    assert len(OLMOE.chosen(("down",))) == 2 * 4
    assert {matrix.share for matrix in OLMOE.chosen(("mlp",))} == {0.5}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("qq",), "targets has 'qq', which names no linear layer of this model; did you mean 'q'"),
        (("blocks.9.*",), "which names no linear layer"),
        (("experts",), "which names no linear layer"),
        ((), "targets is empty; name linear layers"),
    ],
)
def test_targets_that_name_nothing(targets, message):
    with pytest.raises(ConfigError, match=message):
        LLAMA.chosen(targets)
