"""What the trainer gives to stages is what a plan says of them."""

import itertools

import pytest
import torch

from anabranch import presets
from anabranch.cluster import plan
from anabranch.lm.layers import layer_costs
from anabranch.lm.tensors import build_empty
from anabranch.train.pipeline_layers import layers_of, stages_of

# Models that are cut into stages; those with parallel streams are not.
NAMES = [name for name in presets.names() if presets.find(name)("tiny").model.streams is None]


@pytest.mark.parametrize("is_tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_has_the_parameters_of_the_trainer_s_stages(name, is_tied):
    """On each rank, for all cuts there are; a layer of the trainer may be several of a plan, which stay together."""
    config = presets.find(name)("tiny").model.replace(tie_embeddings=is_tied)
    model = build_empty(config)
    layers, _ = layers_of(model, 1)
    counts = [len(getattr(layer, "part", [0])) for layer in layers]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    costs = layer_costs(config, tokens=1, sequence_length=8, dtype=torch.float32)
    for chunks in range(1, len(layers) + 1):
        for bounds in itertools.combinations(range(1, len(layers)), chunks - 1):
            parts = [range(*ends) for ends in itertools.pairwise((0, *bounds, len(layers)))]
            balance = [sum(counts[number] for number in part) for part in parts]
            for visits in (1, 2):
                if chunks % visits:
                    continue
                stages = chunks // visits
                where = stages_of(model, layers, parts, stages)
                made = plan(
                    costs,
                    ranks=stages,
                    schedule_name="1f1b" if visits == 1 else "interleaved",
                    visits=visits,
                    micro_batches=stages,
                    flops_s=1e12,
                    balance=balance,
                )
                wanted = [sum(sizes[one] for one in sizes if stage in where[one]) for stage in range(stages)]
                assert [made.parameters_of(stage) for stage in range(stages)] == wanted, balance
                assert list(made.state_bytes_K) == [16 * count for count in wanted]
