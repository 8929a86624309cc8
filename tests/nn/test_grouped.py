"""The expert operator: every back end against the naive loop, in values and in all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import BackendError, ConfigError
from anabranch.nn.grouped import BACKENDS, expert_mlp, reference_expert_mlp
from anabranch.nn.kernels import load
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import plan_dispatch

HERE = [name for name in BACKENDS if name not in ("auto", "reference") and (name != "native" or load() is not None)]
needs_kernels = pytest.mark.skipif("native" not in HERE, reason="no compiled kernels on this machine")
COMPUTED = [pytest.param(name, marks=needs_kernels if name == "native" else ()) for name in BACKENDS[1:-1]]
LACKS_FLOAT64 = ("native", "grouped_mm")
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value in the reference


def make(n=13, e=5, k=3, d=16, f=16, dtype=torch.float32, seed=0, unused=0.2, idle=()):
    """x, routing, w13, w2 with some choices unused and the experts in ``idle`` never chosen."""
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(n, e, generator=g)
    score[:, list(idle)] = -1.0
    index = score.topk(k, dim=-1).indices
    routing = Routing(index, torch.rand(n, k, generator=g, dtype=dtype).float().to(dtype), score)
    routing = routing.drop(torch.rand(n, k, generator=g) < unused)
    x, w13, w2 = (
        torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((n, d), (e, 2 * f, d), (e, d, f))
    )
    return x, routing, w13, w2


def run(function, x, routing, w13, w2, **options):
    """y and the gradients of x, weight, w13, w2 under a fixed random output gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, routing.weight_NK, w13, w2)]
    y = function(leaves[0], plan_dispatch(routing), *leaves[1:], **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_near(ours, reference, tolerance, names=("y", "dx", "dweight", "dw13", "dw2")):
    for name, a, b in zip(names, ours, reference, strict=True):
        assert a.shape == b.shape, name
        error = (a.double() - b.double()).abs().max() if a.numel() else torch.tensor(0.0)
        # dweight is dy . y of an expert: where few of these sums cancel, what rounding leaves is of the size of their terms
        sized = [b, reference[0]] if name == "dweight" else [b]
        scale = max(part.double().abs().max().clamp_min(1e-30) for part in sized) if b.numel() else torch.tensor(1.0)
        assert error <= tolerance * scale, f"{name}: relative error {(error / scale).item():.2e}"


def test_by_hand():
    """One item, width 1: gate 1, up 2 and w2 3 on x = 2 give 3 * silu(2) * 4, weighed by 0.5."""
    x, weight = torch.tensor([[2.0]]), torch.tensor([[0.5]])
    routing = Routing(torch.tensor([[1]]), weight, torch.tensor([[0.0, 1.0]]))
    w13 = torch.tensor([[[9.0], [9.0]], [[1.0], [2.0]]])
    w2 = torch.tensor([[[9.0]], [[3.0]]])
    silu = 2.0 / (1.0 + torch.tensor(-2.0).exp())
    for backend in ("torch", "bmm", "reference", "auto"):
        y = expert_mlp(x, plan_dispatch(routing), weight, w13, w2, backend=backend)
        torch.testing.assert_close(y, (0.5 * 3.0 * silu * 4.0).view(1, 1))


def test_the_reference_is_the_formula():
    x, routing, w13, w2 = make(dtype=torch.float64)
    expected = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for k in range(routing.num_choices):
            e = int(routing.index_NK[n, k])
            if e >= 0:
                gate, up = (w13[e] @ x[n]).chunk(2)
                expected[n] += routing.weight_NK[n, k] * (w2[e] @ (gate * gate.sigmoid() * up))
    torch.testing.assert_close(
        reference_expert_mlp(x, plan_dispatch(routing), routing.weight_NK, w13, w2), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", COMPUTED)
def test_equals_the_reference(backend, recompute, weight_on, dtype):
    if backend in LACKS_FLOAT64 and dtype == torch.float64:
        pytest.skip(f"{backend} takes no float64")
    case = make(n=37, e=6, k=3, d=32, f=48, dtype=dtype, idle=(2,))
    wide = [t.double() for t in (case[0], case[2], case[3])]
    routing = Routing(case[1].index_NK, case[1].weight_NK.double(), case[1].score_NE)
    reference = run(reference_expert_mlp, wide[0], routing, wide[1], wide[2], weight_on=weight_on)
    ours = run(expert_mlp, *case, weight_on=weight_on, backend=backend, recompute=recompute)
    assert all(t.dtype == dtype for t in ours)
    assert_near(ours, reference, RELATIVE[dtype])


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 20),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 10_000),
    st.sampled_from(HERE),
)
def test_any_shape_equals_the_reference(n, e, k, unused, seed, backend):
    dtype = torch.float32 if backend in LACKS_FLOAT64 else torch.float64
    case = make(n=n, e=e, k=min(k, e), d=16, f=32, dtype=dtype, seed=seed, unused=unused)
    assert_near(run(expert_mlp, *case, backend=backend), run(reference_expert_mlp, *case), RELATIVE[dtype])


@pytest.mark.parametrize("backend", COMPUTED)
class TestEdges:
    def test_no_items(self, backend):
        y, dx, dweight, dw13, dw2 = run(expert_mlp, *make(n=0), backend=backend)
        assert y.shape == dx.shape == (0, 16)
        assert dweight.shape == (0, 3)
        assert not dw13.any()
        assert not dw2.any()

    def test_every_choice_unused_gives_zero(self, backend):
        assert not any(t.any() for t in run(expert_mlp, *make(unused=1.1), backend=backend))

    def test_idle_expert_gets_an_exactly_zero_gradient(self, backend):
        *_, dw13, dw2 = run(expert_mlp, *make(idle=(0, 3)), backend=backend)
        for gradient in (dw13, dw2):
            assert gradient.flatten(1).any(1).tolist() == [False, True, True, False, True]

    def test_unused_rows_do_not_reach_a_nan(self, backend):
        x, routing, w13, w2 = make(n=6, unused=0.0)
        dropped = torch.zeros(6, 3, dtype=torch.bool)
        dropped[2] = True
        x[2] = torch.nan  # a padding item that goes nowhere
        y, dx, dweight, dw13, dw2 = run(expert_mlp, x, routing.drop(dropped), w13, w2, backend=backend)
        assert not y[2].any()
        assert all(t.isfinite().all() for t in (y, dx, dweight, dw13, dw2))

    def test_all_experts_at_once_is_the_dense_mixture(self, backend):
        case = make(n=7, e=4, k=4, unused=0.0)
        assert_near(run(expert_mlp, *case, backend=backend), run(reference_expert_mlp, *case), 1e-5)

    def test_non_contiguous_input(self, backend):
        x, routing, w13, w2 = make(d=16, f=32)
        strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, w13, w2)]
        weight_on_grad = run(expert_mlp, strided[0], routing, *strided[1:], backend=backend)
        assert_near(weight_on_grad, run(reference_expert_mlp, x, routing, w13, w2), 1e-5)

    def test_expanded_output_gradient(self, backend):
        x, routing, w13, w2 = make()
        for leaf in (w13, w2):
            leaf.requires_grad_()
        expert_mlp(x, plan_dispatch(routing), routing.weight_NK, w13, w2, backend=backend).sum().backward()
        ours = w13.grad, w2.grad
        w13.grad = w2.grad = None
        reference_expert_mlp(x, plan_dispatch(routing), routing.weight_NK, w13, w2).sum().backward()
        assert_near(ours, (w13.grad, w2.grad), 1e-5, ("dw13", "dw2"))

    def test_frozen_experts_still_differentiate_x(self, backend):
        x, routing, w13, w2 = make()
        x.requires_grad_()
        expert_mlp(x, plan_dispatch(routing), routing.weight_NK, w13, w2, backend=backend).square().sum().backward()
        ours, x.grad = x.grad, None
        reference_expert_mlp(x, plan_dispatch(routing), routing.weight_NK, w13, w2).square().sum().backward()
        assert_near([ours], [x.grad], 1e-5, ["dx"])

    def test_permuting_items_permutes_outputs(self, backend):
        x, routing, w13, w2 = make(n=9)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
        y = expert_mlp(x, plan_dispatch(routing), routing.weight_NK, w13, w2, backend=backend)
        moved = Routing(routing.index_NK[order], routing.weight_NK[order], routing.score_NE[order])
        y_moved = expert_mlp(x[order], plan_dispatch(moved), moved.weight_NK, w13, w2, backend=backend)
        torch.testing.assert_close(y_moved, y[order], rtol=1e-5, atol=1e-5)

    def test_autocast_computes_in_its_dtype_and_keeps_fp32_gradients(self, backend):
        x, routing, w13, w2 = make(n=20, d=32, f=16)
        reference = run(reference_expert_mlp, x, routing, w13, w2)
        with torch.autocast("cpu", torch.bfloat16):
            ours = run(expert_mlp, x, routing, w13, w2, backend=backend)
        assert ours[0].dtype == torch.bfloat16
        assert all(t.dtype == torch.float32 for t in ours[1:])
        assert_near(ours, reference, 2e-2)

    def test_same_result_every_time_and_for_any_number_of_threads(self, backend):
        case = make(n=64, e=8, d=32, f=16)
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 2):
                torch.set_num_threads(count)
                results.append(run(expert_mlp, *case, backend=backend))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_compiles_whole_and_gives_the_same():
    case = make(n=24)

    def layer(x, plan, weight, w13, w2):
        return expert_mlp(x * 1.0, plan, weight.softmax(-1), w13, w2).square()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(run(compiled, *case), run(layer, *case), 1e-6)


@pytest.mark.parametrize("learns", [False, True])
def test_meta_tensors_have_shapes_and_no_work(learns):
    x, routing, w13, w2 = make(n=6)
    plan = plan_dispatch(Routing(*(t.to("meta") for t in (routing.index_NK, routing.weight_NK, routing.score_NE))))
    x, weight, w13, w2 = (t.to("meta").requires_grad_(learns) for t in (x, routing.weight_NK, w13, w2))
    y = expert_mlp(x, plan, weight, w13, w2)
    assert y.is_meta
    assert y.shape == x.shape


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("keep", [False, True])
def test_operator_registration_is_sound(backend, keep):
    x, routing, w13, w2 = make(n=6)
    plan = plan_dispatch(routing)
    leaves = [t.requires_grad_() for t in (x, routing.weight_NK.clone(), w13, w2)]
    arguments = (leaves[0], plan.choice_R, plan.offset_E, *leaves[1:], False, torch.float32, backend, "swiglu", keep)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    found = torch.library.opcheck(torch.ops.anabranch.expert_mlp, arguments, test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")


@needs_kernels
class TestNative:
    """What only the compiled kernels can get wrong: blocking of rows, long rows, many rows, threads."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("weight_on", ["output", "input"])
    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize(
        "sizes",
        [
            {"n": 700, "e": 1, "k": 1, "d": 32, "f": 16},  # several row blocks and gradient steps for one expert
            {"n": 1100, "e": 2, "k": 1, "d": 16, "f": 16, "unused": 0.3},  # an odd number of rows in a step
            {"n": 25, "e": 2, "k": 2, "d": 1104, "f": 16},  # items longer than a lane, and not a multiple of a tile
            {"n": 3, "e": 2, "k": 2, "d": 1104, "f": 560},  # the same where weights are read in place
            {"n": 9, "e": 3, "k": 1, "d": 16, "f": 1040},  # hidden rows longer than a lane, few and more rows mixed
        ],
        ids=lambda sizes: "-".join(map(str, sizes.values())),
    )
    def test_every_blocking_equals_the_reference(self, sizes, recompute, weight_on, dtype):
        x, routing, w13, w2 = make(**sizes, dtype=dtype)
        w13, w2 = w13 * sizes["d"] ** -0.5, w2 * sizes["f"] ** -0.5
        wide = Routing(routing.index_NK, routing.weight_NK.double(), routing.score_NE)
        reference = run(reference_expert_mlp, x.double(), wide, w13.double(), w2.double(), weight_on=weight_on)
        ours = run(expert_mlp, x, routing, w13, w2, weight_on=weight_on, recompute=recompute, backend="native")
        assert_near(ours, reference, RELATIVE[dtype])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("rows", [*range(1, 27), *range(31, 35), 48, 49])
    def test_every_number_of_rows(self, rows, dtype):
        x, routing, w13, w2 = make(n=rows, e=1, k=1, d=48, f=16, unused=0.0, dtype=dtype)
        wide = Routing(routing.index_NK, routing.weight_NK.double(), routing.score_NE)
        reference = run(reference_expert_mlp, x.double(), wide, w13.double(), w2.double())
        assert_near(run(expert_mlp, x, routing, w13, w2, backend="native"), reference, RELATIVE[dtype])

    def test_extreme_pre_activations_saturate(self):
        x, routing, w13, w2 = make()
        ours = run(expert_mlp, 1e3 * x, routing, w13, w2, backend="native")
        assert_near(ours, run(reference_expert_mlp, 1e3 * x, routing, w13, w2), 1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_not_finite_comes_out_where_it_went_in(self, bad, dtype):
        x, routing, w13, w2 = make(n=40, unused=0.0, dtype=dtype)
        x[3, 0] = bad
        y = expert_mlp(x, plan_dispatch(routing), routing.weight_NK, w13, w2, backend="native")
        assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [3]

    def test_gradient_memory_is_not_shared_between_living_gradients(self):
        """Gradients above 8 MB lie in recycled memory: a second backward pass must not write into the first one's."""
        x, routing, w13, w2 = make(n=8, e=8, k=2, d=512, f=512)
        first = run(expert_mlp, x, routing, w13, w2, backend="native")
        before = [t.clone() for t in first]
        second = run(expert_mlp, 2 * x, routing, w13, w2, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True))
        del first
        third = run(expert_mlp, 2 * x, routing, w13, w2, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))

    def test_says_why_it_cannot(self):
        x, routing, w13, w2 = make(d=16, f=24)
        with pytest.raises(
            BackendError, match="need a hidden_dim that is a multiple of 16; it is 24; use backend 'auto'"
        ):
            expert_mlp(x, plan_dispatch(routing), routing.weight_NK, w13, w2, backend="native")
        auto = run(expert_mlp, x, routing, w13, w2)
        assert_near(auto, run(reference_expert_mlp, x, routing, w13, w2), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 16)}, r"x has shape \[3, 16\]; this plan needs \[13, D\]"),
        ({"weight": torch.zeros(13, 2)}, r"weight has shape \[13, 2\]; it must be \[13, 3\]"),
        ({"w13": torch.zeros(5, 31, 16)}, r"w13 has shape \[5, 31, 16\]; it must be \[5, 2 F, 16\]"),
        ({"w2": torch.zeros(5, 8, 16)}, r"w2 has shape \[5, 8, 16\]; it must be \[5, 16, 16\]"),
        ({"backend": "fast"}, "backend is 'fast'; use one of auto, "),
        ({"weight_on": "gate"}, "weight_on is 'gate'; use 'output' or 'input'"),
    ],
)
def test_says_what_does_not_fit(change, message):
    x, routing, w13, w2 = make()
    arguments = {"x": x, "weight": routing.weight_NK, "w13": w13, "w2": w2, **change}
    options = {name: arguments[name] for name in ("backend", "weight_on") if name in arguments}
    with pytest.raises(ConfigError, match=message):
        expert_mlp(
            arguments["x"], plan_dispatch(routing), arguments["weight"], arguments["w13"], arguments["w2"], **options
        )
