"""What do the steps around adapters cost that learn, choose and adapt while a text goes on?

    poly       forward and backward of one layer whose rows are of several tasks: skills mixed by task (`MultiHeadRouted`) against peft's
               Poly with the same numbers, whose outputs are compared first. Once what is added alone, once with the frozen matrix on both
               sides, which is most of the work. bar of all rows: 2 times
    lora       forward and backward of queries, keys and values with LoRA beside each, in float32, and beside a frozen matrix in bfloat16,
               whose adapters are float32 as peft keeps them: ours with the fused matrix, against peft's three layers with the same
               numbers, whose outputs are compared first. no bar
    select     the adapter for a query among 10,000, by its instruction: from the query's vector (`GliderPool.retrieve` keeps vectors of
               queries that it has seen), and from a text that it has not. bar of the first: 0.4 ms
    rewire     phase 1 of Rewiring with 5 steps, against 5 times 2.2 forward passes of the context, with the guard and without. bar: 1

The texts of ``select`` are made of the words of this repository's documentation; adapters are texts alone. The model of ``rewire`` has 4
layers of 8 experts, width 256, 512 tokens. With one thread all is in the processor's time.

    python benchmarks/adapter_steps.py --threads 1 --json benchmarks/results/adapter_steps.json

peft must be installed for the rows of ``poly`` and ``lora``; without it these are left out, and said to be.
"""
# Shapes: B rows, L tokens, C inputs, O outputs

import importlib.util
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from _harness import arguments, compare, finish, start
from anabranch.adapters import LowRank
from anabranch.adapters.glider.matcher import Matcher
from anabranch.adapters.mhr import MultiHeadRouted
from anabranch.adapters.rewiring import Rerouter, Rewiring
from anabranch.adapters.tasks import told_tasks
from anabranch.lm import Decoder
from anabranch.nn import BuildContext, Dense, MoE
from anabranch.nn.linear import Added, Product, Projection, Rows
from anabranch.routing import RoutingContext

DIM, QKV = 576, {"q": 576, "k": 192, "v": 192}
ROWS, TASKS, USED, SKILLS, HEADS, RANK = 16, 48, 4, 8, 8, 16
TOLERANCE = 1e-5
ADAPTERS, LEAST_MS = 10_000, 0.4
STEPS, FORWARDS = 5, 2.2


def clock() -> Callable[[], float]:
    """The processor's time where one thread works."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


# ---- training with skills ----


class Nothing(nn.Module):
    """A matrix of zeros that costs no product, so that what is beside it is seen."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def poly_row(inputs: int, outputs: int, length: int, heads: int, *, with_matrix: bool, rounds: int) -> dict[str, Any]:
    """Against peft's layer."""
    from peft import PolyConfig
    from peft.tuners.poly.layer import Linear as PolyLinear

    torch.manual_seed(0)
    matrix = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    base: Any = matrix if with_matrix else Nothing(inputs, outputs)
    settings = PolyConfig(r=RANK, n_tasks=TASKS, n_skills=SKILLS, n_splits=heads, poly_type="poly")
    theirs = PolyLinear(matrix, "default", settings)
    theirs.base_layer = base
    config = MultiHeadRouted.Config(tasks=tuple(map(str, range(TASKS))), skills=SKILLS, heads=heads, rank=RANK)
    projection = Projection("blocks.0.attention.q", inputs, outputs, parts={"q": outputs})
    ours: Any = config.build(projection, BuildContext(inputs))
    with torch.no_grad():
        theirs.poly_lora_B["default"].normal_(std=0.05)
        theirs.poly_router["default"].module_logits.normal_()
        ours.inventory.a.copy_(theirs.poly_lora_A["default"])
        ours.inventory.b.copy_(theirs.poly_lora_B["default"])
        ours.table.z.copy_(theirs.poly_router["default"].module_logits.view_as(ours.table.z))
    task_B = torch.arange(ROWS) % USED
    x = torch.randn(ROWS, length, inputs, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dy = torch.randn(ROWS, length, outputs, generator=torch.Generator().manual_seed(2))

    def run_ours() -> Tensor:
        context = RoutingContext(state=told_tasks(task_B, length), training=ours.training)
        product = Product(x, base, lambda: (matrix.weight, None), base)
        return ours.around(Rows(product), context)

    def run_theirs() -> Tensor:
        return theirs(x, task_ids=task_B)

    added = "with the matrix" if with_matrix else "added alone"
    case = f"poly, {ROWS} rows of {USED} tasks, L={length} r={RANK} K={SKILLS} q={heads} {inputs} -> {outputs}, {added}"
    for layer in (ours, theirs):
        layer.eval()
    with torch.no_grad():
        found, wanted = run_ours(), run_theirs()
        if not float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max()):
            raise SystemExit(f"{case}: outputs differ by {float((found - wanted).abs().max()):.1e}")
    for layer in (ours, theirs):
        layer.train()

    def step(run: Callable[[], Tensor], layer: nn.Module) -> Callable[[], None]:
        def work() -> None:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            run().backward(dy)

        return work

    peers = {"peft Poly": step(run_theirs, theirs)}
    return compare(case, step(run_ours, ours), peers, rounds=rounds, clock=clock())


# ---- training LoRA ----


def lora_row(length: int, dtype: torch.dtype, *, rounds: int) -> dict[str, Any]:
    """Against peft's layers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    holder = nn.ModuleDict({name: nn.Linear(DIM, size, bias=False) for name, size in QKV.items()}).to(dtype)
    # A model of peft's has a config.
    holder.config = {}  # type: ignore[assignment]
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(QKV))
    theirs: Any = get_peft_model(holder, settings).base_model.model
    context = BuildContext(DIM)
    projection = Projection("blocks.0.attention.qkv", DIM, sum(QKV.values()), parts=QKV)
    layers = {name: LowRank.Config(rank=RANK, alpha=2.0 * RANK).build(projection.part(name), context) for name in QKV}
    matrix = Dense(Dense.Config(), projection, context).requires_grad_(False).to(dtype)
    with torch.no_grad():
        matrix.weight.copy_(torch.cat([theirs[name].base_layer.weight for name in QKV]))
        for name, layer in layers.items():
            layer.b.normal_(std=0.05)
            theirs[name].lora_A["default"].weight.copy_(layer.a)
            theirs[name].lora_B["default"].weight.copy_(layer.b)
    ours = Added(matrix, layers, QKV)
    x = torch.randn(ROWS, length, DIM, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    dy = torch.randn(ROWS, length, sum(QKV.values()), generator=torch.Generator().manual_seed(2)).to(dtype)

    def run_theirs() -> Tensor:
        return torch.cat([theirs[name](x) for name in QKV], -1)

    kind = str(dtype).removeprefix("torch.")
    case = f"lora, beside queries, keys and values in {kind}, {ROWS} rows, L={length} r={RANK} {DIM} -> {sum(QKV.values())}"
    found, wanted = ours(x).detach(), run_theirs().detach()
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= {torch.float32: TOLERANCE, torch.bfloat16: 2**-7}[dtype]:
        raise SystemExit(f"{case}: outputs differ by {error:.1e} of the greatest")

    def step(run: Callable[[], Tensor], layer: nn.Module) -> Callable[[], None]:
        def work() -> None:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            run().backward(dy)

        return work

    peers = {"peft LoRA": step(run_theirs, theirs)}
    return compare(case, step(lambda: ours(x), ours), peers, rounds=rounds, clock=clock())


# ---- choosing an adapter ----


def texts(count: int) -> list[str]:
    """Sentences of 12 to 40 words, drawn as often as the documentation has them."""
    pages = (Path(__file__).resolve().parents[1] / "docs").glob("**/*.md")
    words = np.array(re.findall(r"[A-Za-z]{2,}", " ".join(page.read_text() for page in sorted(pages))))
    random = np.random.default_rng(0)
    return [" ".join(random.choice(words, random.integers(12, 41))) for _ in range(count)]


def selection_rows(rounds: int) -> list[dict[str, Any]]:
    """In milliseconds against the bar."""
    made = texts(ADAPTERS + 512)
    matcher = Matcher()
    for number, text in enumerate(made[:ADAPTERS]):
        matcher.add(f"adapter_{number}", (text,))
    matcher.fit()
    rows = []
    for case, is_seen in (("from its vector", True), ("from a text", False)):
        queries = made[ADAPTERS:] if not is_seen else made[ADAPTERS : ADAPTERS + 32]
        for query in queries if is_seen else queries[:1]:
            best = matcher.retrieve(query)[0]
            cosines = matcher.cosines(query)
            if cosines[best.name] < max(cosines.values()):
                raise SystemExit(f"select, {case}: another adapter is nearer than the one that was chosen")
        times = []
        for turn in range(rounds):
            begin = clock()()
            for query in queries if is_seen else queries[1 + turn :: rounds]:
                matcher.retrieve(query)
            times.append(1e3 * (clock()() - begin) / len(queries if is_seen else queries[1 + turn :: rounds]))
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
        row = {"case": f"select, the nearest of {ADAPTERS:,} adapters {case}", "ours": round(middle, 4), "unit": "ms"}
        ratios = {
            "peer": LEAST_MS,
            "ratio": round(LEAST_MS / middle, 3),
            "spread": round(LEAST_MS / low - LEAST_MS / high, 3),
        }
        rows.append({**row, **ratios, "peer_name": "the bar"})
        print(f"{row['case']:<60} {middle:.3f} ms, bar {LEAST_MS} ms", file=sys.stderr, flush=True)
    return rows


# ---- adapting routers to a text ----


def rewiring_row(*, guard: bool, rounds: int) -> dict[str, Any]:
    """Against as many forward passes as it may take."""
    experts = MoE.Config(num_experts=8, hidden_dim=256)
    model = Decoder.Config(num_layers=4, dim=256, feed_forward=experts).build(seed=0).eval()
    token_BL = torch.randint(257, (1, 512), generator=torch.Generator().manual_seed(0))
    rerouter = Rerouter(model, Rewiring(guard=guard, steps=STEPS, select="all"))
    context = [token_BL[0].tolist()]

    def phase() -> None:
        state = rerouter.new_state()
        [report] = rerouter.adapt(context, [state])
        if report.steps != STEPS:
            raise SystemExit(f"rewire: {report.steps} steps were taken, not {STEPS}")

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                model(token_BL)

    case = f"rewire, phase 1 of {STEPS} steps, 512 tokens, {'guard' if guard else 'no guard'}"
    row = compare(case, phase, {f"{STEPS} forward passes": forwards}, rounds=rounds, clock=clock())
    # Of what it may take: forward passes, 2.2 for each step.
    return {
        **row,
        "peer": round(FORWARDS * row["peer"], 4),
        "per_round": {**row["per_round"], "peer": [FORWARDS * each for each in row["per_round"]["peer"]]},
        "ratio": round(FORWARDS * row["ratio"], 3),
        "spread": round(FORWARDS * row["spread"], 3),
        "peer_name": f"{STEPS} x {FORWARDS} forward passes",
    }


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    start(options)
    has_peft = importlib.util.find_spec("peft") is not None
    if not has_peft:
        print("peft is not installed: the rows of Poly and LoRA are left out", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    shapes = [(576, 576, 64), (576, 1536, 64), (576, 1536, 256), (1536, 576, 256)]
    if has_peft and options.only in "poly":
        rows += [
            poly_row(*shape, heads, with_matrix=with_matrix, rounds=options.rounds)
            for shape in shapes[: 1 if options.quick else None]
            for heads in (1, HEADS)
            for with_matrix in (False, True)
        ]
    if has_peft and options.only in "lora":
        rows += [
            lora_row(length, dtype, rounds=options.rounds)
            for length in (64, 256)[: 1 if options.quick else None]
            for dtype in (torch.float32, torch.bfloat16)
        ]
    if options.only in "select":
        rows += selection_rows(options.rounds)
    if options.only in "rewire":
        rows += [rewiring_row(guard=guard, rounds=options.rounds) for guard in (True, False)]
    finish("adapter_steps", rows, options, ["torch", "anabranch", *(["peft"] if has_peft else [])])


if __name__ == "__main__":
    main()
