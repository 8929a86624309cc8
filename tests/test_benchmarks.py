"""What benchmarks promise: one precision on both sides, memory in any order of contestants, records that say what was asked."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# Precision


def test_products_are_counted_as_they_are_computed(benchmark):
    peer = benchmark("_transformers")
    a, b = torch.ones(2, 3, 4), torch.ones(2, 4, 5)

    def cast():
        with torch.autocast("cpu", torch.bfloat16):
            torch.bmm(a, b)
            torch.nn.functional.linear(a[0], b[0].T)

    assert peer.products(cast) == {("aten::bmm", "bfloat16"): 1, ("aten::mm", "bfloat16"): 1}
    assert peer.products(lambda: a[0] @ b[0]) == {("aten::mm", "float32"): 1}
    with pytest.raises(SystemExit, match=r"a row: products should be bfloat16, and are {'aten::mm float32': 1}"):
        peer.check_products("a row", lambda: a[0] @ b[0], "bfloat16")
    with pytest.raises(SystemExit, match="none that are known"):
        peer.check_products("a row", lambda: a + 1, "float32")


@pytest.fixture
def their_experts(benchmark):
    """The experts of a block of transformers', a copy for each implementation that is asked for."""
    pytest.importorskip("transformers")
    peer, layer = benchmark("_transformers"), benchmark("moe_layer")
    peer.register()

    def make(implementation):
        torch.manual_seed(0)
        block = layer.their_layer(8, 2, 16, 24, implementation)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return block.experts

    return make


def experts_step(experts):
    """Output and weights' gradients of 12 tokens under autocast."""
    torch.manual_seed(1)
    x_TD, index_TK = torch.randn(12, 16), torch.stack([torch.randperm(8)[:2] for _ in range(12)])
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = experts(x_TD, index_TK, torch.full((12, 2), 0.5))
    y_TD.float().square().sum().backward()
    return [y_TD.detach().float(), experts.gate_up_proj.grad, experts.down_proj.grad]


def test_their_grouped_products_take_no_part_in_autocast_and_ours_of_them_do(benchmark, their_experts):
    peer = benchmark("_transformers")
    with pytest.raises(SystemExit, match=r"should be bfloat16.*float32"):
        peer.check_products("grouped_mm", lambda: experts_step(their_experts("grouped_mm")), "bfloat16")
    cast = their_experts(peer.CAST)
    assert set(peer.check_products("cast", lambda: experts_step(cast), "bfloat16")) == {"bfloat16"}
    assert cast.gate_up_proj.grad.dtype == torch.float32
    for found, expected in zip(
        experts_step(their_experts(peer.CAST)), experts_step(their_experts("eager")), strict=True
    ):
        assert (found - expected).norm() / expected.norm() < 2e-2


def test_without_autocast_it_is_their_grouped_mm_to_the_bit(benchmark, their_experts):
    peer = benchmark("_transformers")
    x_TD, index_TK, weight_TK = torch.randn(5, 16), torch.tensor([[0, 3]] * 5), torch.full((5, 2), 0.5)
    found, expected = (their_experts(kind)(x_TD, index_TK, weight_TK) for kind in (peer.CAST, "grouped_mm"))
    assert torch.equal(found, expected)


def test_copies_of_weights_that_would_fill_the_memory_are_not_made(benchmark):
    peer = benchmark("_transformers")
    assert "batched_mm" in peer.implementations(16 * 8, 512, 256)
    assert "batched_mm" not in peer.implementations(2048 * 8, 256, 128)


# Measuring


def test_memory_does_not_depend_on_who_came_first(benchmark):
    harness = benchmark("_harness")
    # Above 32 MiB glibc always takes a block from the system and gives it back; smaller ones may lie in its heap, where what
    # a process did before decides whether a freed block is used again.
    weight = torch.zeros(3000, 3000, requires_grad=True)

    def step():
        weight.grad = None
        weight.square().sum().backward()

    row = harness.compare("a step", step, {"the same": step}, rounds=1)
    assert row["memory_ours_mb"] == pytest.approx(row["memory_peer_mb"], rel=0.2)
    assert row["spread"] == 0


def test_a_command_is_told_without_folders_of_ones_own(benchmark):
    told = benchmark("_machine").told
    assert told(["python", "benchmarks/coe.py", "--peer", "/tmp/sr/bin/python", "--out=/home/me/x.json", "~/a/b"]) == (
        "python benchmarks/coe.py --peer python --out=x.json b"
    )


# Records


def test_bars_by_hand(benchmark):
    bars = benchmark("_bars")
    rows = [
        {"case": "T=16 E=64 K=8 d=512 h=256 fp32 training", "peer_name": "OLMoE eager", "ratio": 2.9},
        {"case": "T=2048 E=64 K=8 d=512 h=256 fp32 training", "peer_name": "OLMoE eager", "ratio": 2.9},
        {"case": "T=2048 E=64 K=8 d=512 h=256 fp32 forward", "peer_name": "OLMoE eager", "ratio": 2.9},
        {"case": "T=1 E=64 K=8 d=512 h=256 fp32 forward", "peer_name": "OLMoE eager", "ratio": None},
    ]
    assert [row.get("bar") for row in bars.with_bars("moe_layer", rows)] == [3.0, 1.3, None, None]
    assert bars.with_bars("of no bars", rows) == rows


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_what_was_asked_where_and_when(path, benchmark):
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    bars = benchmark("_bars")
    assert [row.get("bar") for row in record["rows"]] == [bars.bar_of(record["name"], row) for row in record["rows"]]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date"])
    assert record["device"]
    assert re.match("[0-9a-f]{7}", record["commit"])
    assert not re.findall(r"""(?:^|[\s"'=:])(?:~|/[\w.-]+)/[\w.-]+""", text), "a path of somebody's machine"
    instructions = path.stem.partition(".")[2]
    assert not instructions or instructions in record["device"]


def test_every_bar_is_of_a_recorded_case(benchmark):
    bars = benchmark("_bars")
    rows = [
        (record["name"], row) for path in RECORDS for record in [json.loads(path.read_text())] for row in record["rows"]
    ]
    for name, asked in bars.BARS.items():
        seen = {bars.bar_of(name, row) for of, row in rows if of == name}
        assert {bar.ratio for bar in asked} <= seen, name
