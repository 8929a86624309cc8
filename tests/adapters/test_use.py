"""Which adapter served which task and layer: against the definition, in any batches, for every kind that chooses."""

import numpy as np
import pytest
import torch

from adapter_models import make_base, make_kind
from anabranch.adapters import LowRank, load_mixture, load_peft, save_peft
from anabranch.adapters.glider import GliderConfig, GliderPool
from anabranch.adapters.mhr import MultiHeadRouted
from anabranch.adapters.put_on import put_on
from anabranch.adapters.use import AdapterUse, use_of_rows, use_of_tables
from anabranch.errors import ConfigError, InputError
from anabranch.lm import load_model
from anabranch.routing import record_routing
from served_adapters import INSTRUCTIONS, LAYERS, TASKS, VOCAB, make_model, make_pool, with_layers


def rows(count=6, length=9):
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", ["routed_low_rank", "mixed_low_rank"])
def test_weights_are_the_means_of_what_is_recorded(kind):
    model, token_BL, task_B = with_layers(kind), rows(), torch.tensor([0, 1, 0, 0, 1, 1])
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[0, :4] = mask_BL[4, :7] = False
    use = use_of_rows(model, [(token_BL, mask_BL, task_B)], tasks=("a", "b"), adapters=("x", "y", "z"))
    assert use.tokens_T == (9 * 3 - 4, 9 * 3 - 7)
    with torch.no_grad(), record_routing(model) as recorder:
        model(token_BL, token_mask_BL=mask_BL)
    trace = recorder.trace()
    matrices = {name: row for row, name in enumerate(use.matrices)}
    for layer in trace.layers:
        found, (block, part) = trace.decisions(layer.layer), layer.name.split(".beside.")
        name = ".".join([*block.split(".")[:-1], part.split(".")[0]])
        task_N = task_B.numpy()[found.item_N]
        for task in range(2):
            own = task_N == task
            wanted = [found.weight_NK[own][found.index_NK[own] == expert].sum() / own.sum() for expert in range(3)]
            np.testing.assert_allclose(use.weight_TME[task, matrices[name]], wanted, atol=1e-5)
    # Matrices with one router have what it decides.
    if kind == "mixed_low_rank":
        q, k, v = (use.weight_TME[:, matrices[f"blocks.0.attention.{part}"]] for part in "qkv")
        assert np.array_equal(q, k)
        assert np.array_equal(q, v)
    # In other batches it is the same.
    parts = [(token_BL[at : at + 1], mask_BL[at : at + 1], task_B[at : at + 1]) for at in range(6)]
    again = use_of_rows(model, parts, tasks=("a", "b"), adapters=("x", "y", "z"))
    np.testing.assert_allclose(again.weight_TME, use.weight_TME, atol=1e-5)


def test_what_rows_ask_for_counts(tmp_path):
    pool = GliderPool.load(make_pool(tmp_path / "pool"), GliderConfig(weight=100.0, top_k=1))
    model = pool.onto(make_model())

    def batches():
        for task, name in enumerate(TASKS):
            with pool.answering([INSTRUCTIONS[name]]):
                yield rows(1), None, torch.tensor([task])

    use = use_of_rows(model, batches(), tasks=TASKS, adapters=pool.names)
    # Where all of them have a part.
    weight_TE = use.weight_TME[:, use.matrices.index("blocks.0.attention.q")]
    assert [pool.names[number] for number in weight_TE.argmax(1)] == list(TASKS)
    # What a matrix lacks is no adapter of it.
    lacking = np.isnan(use.weight_TME[:, use.matrices.index("blocks.0.feed_forward.gate")])
    assert lacking.tolist() == [[name != "law" for name in pool.names]] * 3
    np.testing.assert_allclose(use.share_TE.sum(1), 1)


def test_what_one_matrix_of_a_group_lacks_is_no_adapter_of_it(tmp_path):
    """q has the first adapter and k has not, and one router chooses for both."""
    for name, parts in (("law", "q"), ("sql", "qkv")):
        layers = {f"*.attention.{part}": LowRank.Config(rank=2) for part in parts}
        save_peft(tmp_path / name, put_on(make_model(), layers, seed=1))
    model = load_mixture({name: tmp_path / name for name in ("law", "sql")}, make_model())
    use = use_of_rows(model, [(rows(2), None, torch.tensor([0, 0]))], tasks=("a",), adapters=("law", "sql"))
    q, k, v = (use.weight_TME[0, use.matrices.index(f"blocks.0.attention.{part}")] for part in "qkv")
    assert q.sum() == pytest.approx(1, abs=1e-5)
    assert 0 < q[0] < 1
    for other in (k, v):
        assert np.isnan(other[0])
        assert other[1] == q[1]


def test_tables_say_who_serves_a_task():
    layers = {
        "*.attention.*": MultiHeadRouted.Config(tasks=TASKS, skills=3, heads=2, rank=2),
        "*.feed_forward.down": MultiHeadRouted.Config(tasks=TASKS, skills=2, heads=1, rank=2),
    }
    model = put_on(make_model(), layers, seed=0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MultiHeadRouted):
                module.table.z.copy_(
                    torch.randn(module.table.z.shape, generator=torch.Generator().manual_seed(len(module.name)))
                )
    use = use_of_tables(model.train())
    assert (use.tasks, use.adapters, use.tokens_T) == (TASKS, ("skill 0", "skill 1", "skill 2"), (0, 0, 0))
    assert len(use.matrices) == 5 * LAYERS
    layer = model.blocks[1].attention.out.beside["o"]
    wanted_TK = layer.table.weights.of(layer.table.z, training=False).mean(1)
    np.testing.assert_allclose(
        use.weight_TME[:, use.matrices.index("blocks.1.attention.o")], wanted_TK.detach().numpy(), atol=1e-6
    )
    # A matrix without a third skill says so.
    assert np.isnan(use.weight_TME[:, use.matrices.index("blocks.0.feed_forward.down"), 2]).all()
    assert use.to_dict()["weights"][0][use.matrices.index("blocks.0.feed_forward.down")][2] is None
    assert all(module.training for module in model.modules())


def test_a_poly_of_pefts(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    make_kind(tmp_path / "poly", "poly", base)
    model = load_peft(tmp_path / "poly", load_model(tmp_path / "base")[0].eval())
    use = use_of_tables(model)
    assert use.tasks == ("0", "1", "2")
    np.testing.assert_allclose(use.weight_TME.sum(-1), 1, atol=1e-5)


def test_what_cannot_be_told():
    model = with_layers("routed_low_rank")
    batch = (rows(2), None, torch.tensor([0, 0]))
    with pytest.raises(ConfigError, match="chooses among 3 adapters, and 2 are named"):
        use_of_rows(model, [batch], tasks=("a",), adapters=("x", "y"))
    with pytest.raises(InputError, match="task 'b' has no tokens"):
        use_of_rows(model, [batch], tasks=("a", "b"), adapters=("x", "y", "z"))
    with pytest.raises(ConfigError, match="no routers beside its matrices"):
        use_of_rows(make_model(), [batch], tasks=("a",), adapters=("x",))
    with pytest.raises(ConfigError, match="no layer that goes by task"):
        use_of_tables(model)
    with pytest.raises(ConfigError, match=r"weights have shape \(1, 1, 1\); names are of \(2, 1, 1\)"):
        AdapterUse(("a", "b"), ("m",), ("x",), np.zeros((1, 1, 1)), (1, 1))


def test_what_is_taken_away_counts_as_what_is_added():
    """Weights may be negative: -3 beside one matrix and 1 beside another are not -2."""
    weights = np.array([[[-3.0, 1.0], [1.0, np.nan]]])
    use = AdapterUse(("a",), ("m", "n"), ("x", "y"), weights, (3,))
    np.testing.assert_allclose(use.share_TE, [[0.8, 0.2]])


def test_nothing_is_shared_out_where_nobody_is_used():
    use = AdapterUse(("a",), ("m",), ("x", "y"), np.zeros((1, 1, 2)), (3,))
    assert use.share_TE.tolist() == [[0, 0]]
