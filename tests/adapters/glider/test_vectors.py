"""Arrow prototypes against the matrix that they never form, gates made comparable, mean activations by hand."""
# Shapes: C inputs, O outputs, R rank

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_models import ATTENTION, TOKENS, linear_layers, make_adapter, make_base
from anabranch.adapters.glider import activations_of_rows, arrow_prototype, mean_activations, standardised
from anabranch.adapters.low_rank import Pair
from anabranch.errors import InputError
from anabranch.lm import load_model
from anabranch.nn.linear import Added


def drawn(shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 10), st.integers(1, 10), st.integers(0, 9))
def test_the_prototype_is_the_top_right_singular_vector(rank, inputs, outputs, seed):
    """Of ranks above the widths too."""
    pair = Pair(drawn((rank, inputs), seed), drawn((outputs, rank), seed + 100), 3.0)
    v_C = arrow_prototype(pair)
    delta_OC = pair.b_OR @ pair.a_RC
    assert v_C.norm() == pytest.approx(1)
    top = torch.linalg.svdvals(delta_OC)[0]
    assert (delta_OC @ v_C).norm() == pytest.approx(float(top), rel=1e-9)
    assert v_C[v_C.abs().argmax()] > 0


def test_the_prototype_equals_that_of_the_full_svd():
    pair = Pair(drawn((5, 40), 1).float(), drawn((30, 5), 2).float(), 8.0)
    v_C = torch.linalg.svd(pair.b_OR.double() @ pair.a_RC.double()).Vh[0].float()
    v_C = v_C * v_C[v_C.abs().argmax()].sign()
    assert arrow_prototype(pair).dtype == torch.float32
    assert torch.allclose(arrow_prototype(pair), v_C, atol=1e-6)
    # Neither the scale of an adapter nor that of its halves turns it.
    other = Pair(pair.a_RC * 3, pair.b_OR * -0.25, 1.0, True)
    assert torch.allclose(arrow_prototype(other), v_C, atol=1e-6)


def test_what_adds_nothing_has_no_prototype():
    assert not arrow_prototype(Pair(drawn((2, 6), 0), torch.zeros(5, 2, dtype=torch.float64), 1.0)).any()


def test_a_standardised_gate_has_mean_0_and_variance_1():
    gate_C = torch.tensor([1.0, 2.0, 3.0, 6.0])
    expected_C = (gate_C - 3) / torch.tensor(3.5).sqrt()
    assert torch.allclose(standardised(gate_C), expected_C, atol=1e-4)
    assert torch.allclose(standardised(gate_C * 7 + 2), expected_C, atol=1e-4)
    assert not standardised(torch.zeros(4)).any()
    assert standardised(gate_C.bfloat16()).dtype == torch.float32


def test_a_gate_is_standardised_with_torchs_number_beside_its_variance():
    gate_C = drawn((64,), 3)
    for scale in (1.0, 1e-2, 1e-3):
        variance = (gate_C * scale).var(correction=0)
        assert standardised(gate_C * scale).var(correction=0) == pytest.approx(float(variance / (variance + 1e-5)))


def test_mean_activations_of_rows_count_each_token_once_and_padding_never(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    make_adapter(tmp_path / "a", linear_layers(base, ATTENTION))
    model = load_model(tmp_path / "base")[0].train()
    whole = mean_activations(tmp_path / "a", model, TOKENS)
    assert model.training
    passes = []
    for row, count in ((0, TOKENS.shape[1]), *((one, TOKENS.shape[1]) for one in range(1, len(TOKENS)))):
        padded_BL = torch.cat([TOKENS[row : row + 1], torch.full((1, row + 3), 7)], 1)
        passes.append((padded_BL, torch.arange(padded_BL.shape[1])[None] < count))
    found = activations_of_rows(tmp_path / "a", model, iter(passes))
    assert found.keys() == whole.keys()
    assert all(torch.allclose(found[name], whole[name], atol=1e-5) for name in whole)
    with pytest.raises(InputError, match="no rows"):
        activations_of_rows(tmp_path / "a", model, [])
    assert not any(isinstance(module, Added) for module in model.modules())


def test_mean_activations_are_those_of_what_goes_in(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    make_adapter(tmp_path / "a", linear_layers(base, ATTENTION))
    model = load_model(tmp_path / "base")[0].eval()
    seen = {}
    layer = model.blocks[1].attention.qkv
    hook = layer.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    with torch.no_grad():
        before = model(TOKENS).logits_BLV
        hook.remove()
        found = mean_activations(tmp_path / "a", model, TOKENS)
        assert torch.equal(model(TOKENS).logits_BLV, before)
    assert set(found) == set(linear_layers(base, ATTENTION))
    assert torch.allclose(found["model.layers.1.self_attn.k_proj"], seen["x"].flatten(0, 1).abs().mean(0))
    mask_BL = torch.ones_like(TOKENS, dtype=torch.bool)
    mask_BL[0, :2] = False
    masked = mean_activations(tmp_path / "a", model, TOKENS, mask_BL)
    assert not torch.allclose(masked["model.layers.0.self_attn.q_proj"], found["model.layers.0.self_attn.q_proj"])
