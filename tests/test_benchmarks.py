"""What benchmarks promise: one precision on both sides, memory in any order of contestants, records that say what was asked."""

import asyncio
import dataclasses
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "anabranch"
ROW = {"case": "a", "ours": 1.0, "peer": 2, "peer_name": "p", "ratio": 2.0, "spread": [1.9, 2.1], "unit": ""}
GOOD = {"name": "x", "device": "d", "commit": "c", "date": "2026-11-29", "command": "python x.py", "rows": [ROW]}
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
    assert [len(each) for each in row["per_round"].values()] == [1, 1]
    assert benchmark("_records").wrong({**GOOD, "rows": [row]}) == []


def test_a_command_is_told_without_folders_of_ones_own(benchmark):
    told = benchmark("_machine").told
    assert told(["python", "benchmarks/coe.py", "--peer", "/tmp/sr/bin/python", "--out=/home/me/x.json", "~/a/b"]) == (
        "python benchmarks/coe.py --peer python --out=x.json b"
    )


def test_a_record_is_made_in_parts(benchmark, tmp_path):
    harness = benchmark("_harness")
    record = tmp_path / "parts.json"

    def options(*more):
        return harness.arguments("").parse_args(["--json", str(record), "--threads", "1", *more])

    def rows():
        return [(row["case"], row["peer_name"], row["ours"]) for row in json.loads(record.read_text())["rows"]]

    def row(case, peer, ours):
        return {"case": case, "peer_name": peer, "ours": ours, "ratio": 1.0}

    harness.finish("x", [row("a", "p", 1), row("a", "q", 1)], options("--add"), ())
    harness.finish("x", [row("a", "p", 2), row("b", "p", 2)], options("--add"), ())
    assert rows() == [("a", "q", 1), ("a", "p", 2), ("b", "p", 2)]
    harness.finish("x", [row("b", "p", 3)], options(), ())
    assert rows() == [("b", "p", 3)]
    other = json.loads(record.read_text()) | {"commit": "another"}
    record.write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="has commit 'another', this run"):
        harness.start(options("--add"))
    with pytest.raises(SystemExit, match="--add needs --json"):
        harness.start(harness.arguments("").parse_args(["--add"]))
    assert json.loads(record.read_text()) == other


def test_records_do_not_make_a_tree_dirty(benchmark, tmp_path, monkeypatch):
    machine = benchmark("_machine")

    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True
        )

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "a.json").write_text("{}")
    (tmp_path / "code.py").write_text("x = 1")
    git("init")
    git("add", "-A")
    git("commit", "-m", "one")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "benchmarks" / "_machine.py"))
    clean = machine.commit()
    assert clean
    assert "dirty" not in clean
    (results / "a.json").write_text("{1}")
    (results / "new.json").write_text("{}")
    assert machine.commit() == clean
    (tmp_path / "code.py").write_text("x = 2")
    assert machine.commit() == clean + "-dirty"


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


def test_a_bar_is_missed_where_ours_failed_whatever_the_ratio(benchmark, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    bars, hooks = benchmark("_bars"), importlib.import_module("hooks")
    case = {"case": "T=16 E=64 fp32 training", "peer_name": "OLMoE", "unit": "ms"}
    rows = bars.with_bars(
        "moe_layer",
        [
            {**case, "ratio": 4.0},
            {**case, "ratio": 4.0, "failed_rounds": {"ours": 0, "peer": 2}},
            {**case, "ratio": 4.0, "failed_rounds": {"ours": 1, "peer": 0}},
            {**case, "ratio": None, "failed": "ours: killed"},
            {**case, "ratio": None, "failed": "ours, larger: killed"},
            {**case, "ratio": None, "failed": "OLMoE: killed"},
            {**case, "ratio": 4.0, "missed": "it refuses more"},
        ],
    )
    assert [row.get("bar") for row in rows] == [3.0, 3.0, 3.0, 3.0, None, None, 3.0]
    assert [row.get("missed") for row in rows] == [
        None,
        None,
        "ours failed in 1 round",
        "ours failed",
        None,
        None,
        "it refuses more",
    ]
    asked = [row for row in rows if "bar" in row]
    assert (
        [bars.is_met(row) for row in asked] == [hooks.is_met(row) for row in asked] == [True, True, False, False, False]
    )
    record = {"name": "moe_layer", "device": "x", "rows": rows}
    told = hooks._bar_row("moe_layer", asked)
    assert (told["case"], told["bar"], told["figure"], told["met"]) == (case["case"], 3.0, 0.0, "no, 2 of 5")
    assert "| 3, missed (ours failed) |" in hooks.benchmark_table(record)


def test_a_row_that_keeps_several_bars_is_one_for_each(benchmark):
    bars, day = benchmark("_bars"), benchmark("gateway_game_day")
    row = {
        "case": "down",
        "ours": 99.0,
        "attempts_per_request": 1.25,
        "p99_s": 5.0,
        "recovered_s": 8.0,
        "period_s": 5.0,
        "holds": {"answered": False, "attempts": False, "p99": True, "recovered": True},
    }
    record = {
        "name": "gateway_game_day",
        "bars": day.BARS,
        "rows": [row, {**row, "recovered_s": None}, {"case": "other"}],
    }
    found = bars.parts(record)
    assert [(part["peer_name"], part["ratio"]) for part in found[:4]] == [
        ("at least 99.5% answered", pytest.approx(99 / 99.5)),
        ("at most 1.2 attempts a request", pytest.approx(0.96)),
        ("99th percentile within 10 s", 2.0),
        ("in use again within 2 periods", 1.25),
    ]
    asked = [bars.asked_of("gateway_game_day", part) for part in found]
    assert len(set(asked[:4])) == 4
    assert asked[:4] == asked[4:8]
    assert [bars.is_met(part | {"bar": 1.0}) for part in found[:4]] == list(row["holds"].values())
    assert not bars.is_met(found[7] | {"bar": 1.0})
    assert found[8] == {"case": "other"}
    # A row of the benchmark has them all.
    outage = day.OUTAGES[0]
    made = day.row_of(outage, "deployment", range(1), 0.25)
    kept = bars.parts({"name": "gateway_game_day", "bars": day.BARS, "rows": [made]})
    assert [bars.is_met(part | {"bar": 1.0}) for part in kept] == list(made["holds"].values())


def test_limits_of_the_gateway_are_rows(benchmark):
    overhead, memory, bars = benchmark("gateway_overhead"), benchmark("gateway_memory"), benchmark("_bars")
    rows = bars.with_bars("gateway_overhead", overhead.limits(1.98, 91.0))
    assert [(row["bar"], bars.is_met(row)) for row in rows] == [(1.0, False), (1.0, True)]
    measured = {
        "contestant": "ours",
        "requests": 9,
        "warm": 1,
        "growth_mib": 5.5,
        "before": {"sockets": 1, "tasks": 8},
        "after": {"sockets": 2, "tasks": 7},
    }
    rows = bars.with_bars("gateway_memory", memory.table([measured]))
    assert [(row["ours"], bars.is_met(row)) for row in rows] == [(5.5, False), (1, False), (-1, True)]
    rows = bars.with_bars("gateway_memory", memory.table([{**measured, "growth_mib": -0.2}]))
    assert bars.is_met(rows[0])


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_what_was_asked_where_and_when(path, benchmark):
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    bars = benchmark("_bars")
    # Others say themselves what was asked: of the FLOPs that a row leaves out, for one.
    if record["name"] in bars.BARS:
        assert [row.get("bar") for row in record["rows"]] == [
            bars.bar_of(record["name"], row) for row in record["rows"]
        ]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date"])
    assert record["device"]
    assert re.match("[0-9a-f]{7}", record["commit"])
    assert not re.findall(r"""(?:^|[\s"'=:])(?:~|/[\w.-]+)/[\w.-]+""", text), "a path of somebody's machine"
    instructions = path.stem.partition(".")[2]
    assert not instructions or instructions in record["device"]
    assert benchmark("_records").wrong(record) == []


# Commits that were measured and are in nobody's history: branches that lay on another base before they were kept. Which of today's code
# they had cannot be told any more. What names them leaves this list when it is measured again; nothing is added.
LOST = {
    "6929c2b054": {"fabric", "ring_attention", "rl", "scale"},
    "b6b70af93f": {"study packet_spraying"},
}


def test_what_was_measured_is_in_the_history():
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()

    if git("rev-parse", "--is-shallow-repository") != ["false"]:
        pytest.skip("there is no whole history here")
    known = {name[:10] for name in git("rev-list", "HEAD")}
    named = {(path.stem, json.loads(path.read_text())["commit"]) for path in RECORDS}
    for path in (ROOT / "studies" / "results").glob("*/*-seed*.json"):
        where = json.loads(path.read_text()).get("where") or {}
        # Runs that are older than the note of where they took place have none.
        if where.get("commit"):
            named.add((f"study {path.parent.name}", where["commit"]))
    measured = {(commit.removesuffix("-dirty")[:10], name) for name, commit in named}
    lost = {(commit, name) for commit, name in measured if commit not in known}
    assert lost == {(commit, name) for commit, names in LOST.items() for name in names}


def test_what_is_wrong_with_a_record_is_told(benchmark, tmp_path):
    records = benchmark("_records")
    row, good = ROW, GOOD
    assert records.wrong(good) == []
    assert records.wrong({**good, "rows": [{"case": "a", "ours": None, "failed": "ours: killed"}]}) == []
    for change, told in (
        ({"commit": None}, "commit is None, no text"),
        ({"date": "29.11.2026"}, "date is '29.11.2026', not YYYY-MM-DD"),
        ({"rows": {}}, "rows is dict, no list"),
        ({"rows": [row, {**row, "case": ""}]}, "row 1: case is '', no text"),
        ({"rows": [{**row, "ratio": "2"}]}, "row 0: ratio is '2', no number"),
        ({"rows": [{**row, "ours": True}]}, "row 0: ours is True, no number"),
        ({"rows": [{**row, "spread": [1.0]}]}, "row 0: spread is [1.0], neither a number nor [low, high]"),
        ({"rows": [{**row, "peer_name": None}]}, "row 0: it has a ratio and no peer_name"),
        ({"rows": [{**row, "withdrawn": 1}]}, "row 0: withdrawn is 1, no text"),
        # Of its rounds the ratio can be made again.
        ({"rows": [{**row, "per_round": {"ours": [1.0, 2.0], "peer": [2.0, 4.0]}}]}, None),
        ({"rows": [{**row, "per_round": {"ours": [1.0], "peer": [3.0]}}]}, "row 0: ratio is 2.0, and its rounds say 3"),
        (
            {"rows": [{**row, "per_round": {"ours": [1.0], "peer": []}}]},
            "row 0: per_round has 1 of ours and 0 of the peer",
        ),
        # Versions of peers are asked for since there is a day for it.
        ({"rows": [{**row, "peer_name": "peft Arrow, compiled"}]}, None),
        ({"rows": [{**row, "peer_name": "peft Arrow"}], "date": "2026-12-02"}, "versions has nothing of peft"),
        ({"rows": [{**row, "peer_name": "TorchFT"}], "date": "2026-12-02"}, None),
    ):
        assert records.wrong({**good, **change}) == ([] if told is None else [told])
    # What was measured is kept all the same.
    path = tmp_path / "new" / "x.json"
    with pytest.raises(SystemExit, match=r"x\.json is no record: commit is None"):
        records.write_record(path, {**good, "commit": None})
    assert json.loads(path.read_text())["rows"] == [row]
    records.write_record(path, {**good, "name": "moe_layer", "rows": [{**row, "case": "T=16 E=8 training"}]})
    assert json.loads(path.read_text())["rows"][0]["bar"] == 3.0
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_versions_of_peers_are_kept(benchmark, tmp_path):
    records, harness, machine = benchmark("_records"), benchmark("_harness"), benchmark("_machine")
    names = ("scipy block of 16", "faiss SQ8 + refine", "pypccl", "TorchFT", "the bar", "ours", None)
    rows = [{**ROW, "peer_name": name, "ratio": None} for name in names]
    assert records.peers_of(rows) == ["faiss-cpu", "pypccl", "scipy"]
    # Of what was left out nothing ran.
    assert records.peers_of([{**ROW, "peer": None, "peer_name": "pypccl"}]) == []
    path = tmp_path / "x.json"
    records.write_record(path, {**GOOD, "date": "2026-12-02", "rows": rows, "versions": {"pypccl": "1.2.3"}})
    versions = json.loads(path.read_text())["versions"]
    assert versions["pypccl"] == "1.2.3"
    assert versions["scipy"] == importlib.metadata.version("scipy")
    assert versions.keys() == {"faiss-cpu", "pypccl", "scipy"}
    # Of an environment of its own.
    assert machine.version_in(sys.executable, "torch") == importlib.metadata.version("torch")
    assert machine.version_in(sys.executable, "no-such-thing") == "not known"
    assert machine.version_in(str(tmp_path / "python"), "torch") == "not known"
    options = harness.arguments("").parse_args(["--json", str(path), "--threads", "1"])
    harness.finish("x", rows, options, ["torch"], {"pypccl": machine.version_in(sys.executable, "torch")})
    versions = json.loads(path.read_text())["versions"]
    assert {"python", "torch", "pypccl", "scipy", "faiss-cpu"} == versions.keys()
    assert versions["pypccl"] == versions["torch"]


# What a benchmark uses and does not measure: where its text, models and tables come from.
BESIDE = {"cli", "config", "data", "errors", "files", "machine", "native", "presets", "studies", "testing"}
BY_THE_WAY = {"expertflow": {"train"}}


def test_every_benchmark_says_what_code_it_measures(benchmark):
    sources, folder = benchmark("_sources"), ROOT / "benchmarks"
    measuring = {path.stem for path in folder.glob("[a-z]*.py")} - {"cuda", "make_price_table"}
    assert set(sources.SOURCES) == measuring
    assert {name for name in sources.SOURCES for path in sources.SOURCES[name] if not (SRC / path).exists()} == set()
    for name, paths in sources.SOURCES.items():
        used = set(
            re.findall(r"^\s*(?:from|import) anabranch\.(\w+)", (folder / f"{name}.py").read_text(), re.MULTILINE)
        )
        missing = used - {path.partition("/")[0].removesuffix(".py") for path in paths} - BESIDE
        assert missing <= BY_THE_WAY.get(name, set()), name


def test_a_record_is_stale_once_the_code_it_measures_is_another(benchmark, tmp_path, monkeypatch):
    sources = benchmark("_sources")
    monkeypatch.setitem(sources.SOURCES, "x", ("a", "b.py"))

    def git(*words):
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def commit(path, text):
        file = tmp_path / "src" / "anabranch" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        git("add", "-A")
        git("commit", "-m", path)
        return git("rev-parse", "--short=10", "HEAD")

    def age(measured):
        # Asked anew after each commit.
        sources._age.cache_clear()
        return sources.age({"name": "x", "commit": measured}, tmp_path)

    git("init")
    commit("b.py", "x = 1\n")
    first = commit("a/one.py", "def f():\n    return 1\n")
    assert age(first) == ((), "")
    assert age(first).told() is None
    commit("elsewhere.py", "y = 1\n")
    commit("a/one.py", '"""What it is."""\n\n\ndef f():\n    """One."""\n    # Why.\n    return 1\n')
    assert age(first).changed == age(f"{first}-dirty").changed == ()
    second = commit("a/one.py", "def f():\n    return 2\n")
    assert age(first).changed == ("a/one.py",)
    assert second[:7] in age(first).told()
    assert "`a/one.py`" in age(first).told()
    assert age(second).changed == ()
    # Changed and changed back.
    commit("a/one.py", "def f():\n    return 1\n")
    assert age(first).changed == ()
    commit("a/step.cpp", "int x;")
    assert age(first).changed == ("a/step.cpp",)
    commit("b.py", "def (")
    assert age(first).changed == ("a/step.cpp", "b.py")
    # A commit that lies here and is not in the history, as of a branch that was dropped, other copies of it do not have.
    git("checkout", "-q", "-b", "aside", first)
    dropped = commit("a/one.py", "def f():\n    return 3\n")
    git("checkout", "-q", "-")
    assert git("cat-file", "-t", dropped) == "commit"
    assert age(dropped).changed is None
    # Where git does not know the commit, or there is none.
    for unknown in ("0123456789", "HEAD", "", "--help"):
        assert age(unknown).changed is None
        assert "not known" in age(unknown).told()
    assert sources.age({"name": "of nobody", "commit": first}, tmp_path).changed is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert age(first).changed is None


def test_every_bar_is_of_a_recorded_case_or_awaited(benchmark):
    bars = benchmark("_bars")
    rows = [
        (record["name"], row)
        for path in RECORDS
        for record in [json.loads(path.read_text())]
        for row in bars.parts(record)
    ]
    assert bars.AWAITED.keys() <= bars.BARS.keys()
    for name, asked in bars.AIMS.items():
        assert set(asked) <= {bars.asked_of(name, row, bars.AIMS) for of, row in rows if of == name}, name
    for name, asked in bars.BARS.items():
        # Each bar by itself: the row of another with the same ratio says nothing of it.
        seen = {bars.asked_of(name, row) for of, row in rows if of == name and not row.get("withdrawn")}
        assert set(asked) - seen == bars.AWAITED.get(name, frozenset()), name


def test_a_mixture_and_its_peer_compute_the_same_and_more_than_the_base(benchmark):
    routing = benchmark("adapter_routing")
    plain = routing.PLAIN.replace(dim=36, num_layers=2, max_positions=12)
    six, one = routing.contestants(4, plain)
    tokens = routing.inputs(plain)
    routing.check("a row", six, one, tokens)
    base = plain.build(seed=0).eval()
    assert not torch.allclose(one(tokens).logits_BLV, base(tokens).logits_BLV, atol=1e-3)
    # Three of six work for a token, by routers that are not all of one mind.
    [facts, *_] = routing.mixture_report(six, [(tokens, None, None)]).routers
    assert sum(share > 0 for share in facts.load) > 3
    with torch.no_grad():
        next(module for module in six.modules() if hasattr(module, "pool")).pool.b[0] *= 2
    with pytest.raises(SystemExit, match="a row: outputs differ by"):
        routing.check("a row", six, one, tokens)


def test_a_query_that_weighs_next_to_nothing_changes_no_output_and_one_that_weighs_much_is_told(benchmark, monkeypatch):
    passes = benchmark("adapter_passes")
    monkeypatch.setattr(passes, "EXPERTS", 4)
    plain = passes.PLAIN.replace(dim=36, num_layers=2, max_positions=12)
    monkeypatch.setattr(
        passes, "compare", lambda case, ours, peers, **options: [case, ours(), *(peer() for peer in peers.values())]
    )
    case, ours, theirs = passes.global_row(1, plain)
    assert "4 adapters" in case
    assert torch.allclose(ours, theirs, atol=1e-3 * float(theirs.abs().max()))
    config = passes.GliderConfig
    monkeypatch.setattr(
        passes,
        "GliderConfig",
        lambda **fields: config(**fields, **({} if "instruction" in fields else {"local": "none"})),
    )
    with pytest.raises(SystemExit, match="outputs differ by"):
        passes.global_row(1, plain)


def test_a_generation_that_ends_early_is_told(benchmark, monkeypatch):
    passes = benchmark("adapter_passes")
    monkeypatch.setattr(passes, "generate", lambda *arguments: [[1, 2]])
    monkeypatch.setattr(passes, "NEW", 3)
    with pytest.raises(SystemExit, match="3 tokens came rewired and 2 without, not 3"):
        passes.generation_row(4, guard=False, rounds=1)


# Serving


def test_a_worker_without_a_server_answers_through_pipes(benchmark, tmp_path):
    serving = benchmark("_serving")
    code = (
        "import json, sys\nprint('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps([{'sent': 0.0, 'times': [1.0] * count, 'text': 'x', 'ids': prompt} for stream in json.loads(line)"
        " for prompt, count in stream]), flush=True)\n"
    )
    worker = serving.Worker("echo", [sys.executable, "-c", code], tmp_path / "log")
    assert worker.said == "ready\n"
    answers = asyncio.run(worker.run([[([1, 2], 3)], [([4], 2)]]))
    worker.close()
    assert [(answer.ids, len(answer.times)) for answer in answers] == [([1, 2], 3), ([4], 2)]
    with pytest.raises(ConnectionError, match="early ended"):
        serving.Worker("early", [sys.executable, "-c", "pass"], tmp_path / "log")


def test_instructions_are_taken_from_what_peers_say(benchmark, tmp_path):
    info = benchmark("_system_info")
    log = tmp_path / "log"
    assert info.last_error(log) == info.system_info("nothing") == ""
    log.write_text("load\nerror: no model at /root/x/m.gguf here\n")
    assert info.last_error(log) == "error: no model at PATH here"
    program = tmp_path / "llama-server"
    program.write_text(
        "#!/bin/sh\necho '0.1 I system_info: n_threads = 2 |  CPU : AVX2 = 1 | REPACK = 1 | ' >&2; exit 1\n"
    )
    program.chmod(0o755)
    assert info.llama_instructions(str(program)) == "n_threads = 2 | CPU : AVX2 = 1 | REPACK = 1 |"
    told = "INFO auto thread-binding list 0,1\nINFO other\nWARNING libtcmalloc at /usr/lib/x/libtcmalloc.so is loaded\n"
    assert info.vllm_instructions(told) == [
        "INFO auto thread-binding list 0,1",
        "WARNING libtcmalloc at PATH is loaded",
    ]


def test_requests_of_a_round_are_at_least_what_is_asked(benchmark):
    each = benchmark("serving_engine").each
    assert [each(50, streams) * streams for streams in (1, 4, 16)] == [50, 52, 64]


def test_peers_run_as_their_documentation_says(benchmark, tmp_path):
    engine, peer = benchmark("serving_engine"), benchmark("_vllm")
    program, openmp, tcmalloc = (tmp_path / part for part in ("bin/vllm", "lib/libiomp5.so", "libtcmalloc.so.4"))
    openmp.parent.mkdir()
    openmp.touch()
    words = ["--vllm", str(program), "--llama", "llama-server", "--model", "x.gguf", "--tcmalloc", str(tcmalloc)]
    options = engine.arguments([*words, "--zen", str(tmp_path / "zen"), "--streams", "1", "16"])
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("Q4_0", "BF16")}
    made = {server.name: server for server in engine.servers(options, tmp_path, tmp_path, files, tmp_path / "caches")}
    assert list(made) == [
        "ours bfloat16",
        "ours int8",
        "ours int4",
        "vllm",
        "vllm zentorch",
        "vllm eager",
        "llama.cpp Q4_0",
        "llama.cpp BF16",
    ]
    assert "--enforce-eager" not in made["vllm"].command + made["vllm zentorch"].command
    assert "--enforce-eager" in made["vllm eager"].command
    assert made["vllm"].environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert made["vllm"].environment["PYTHONPATH"] == ""
    assert made["vllm zentorch"].environment["PYTHONPATH"] == str(tmp_path / "zen")
    # What is not there is left out, and told.
    assert made["vllm"].environment["LD_PRELOAD"] == str(openmp)
    assert peer.told_preloads(str(program), tcmalloc) == ["libtcmalloc.so.4 is not there", "libiomp5.so"]
    tcmalloc.touch()
    assert peer.environment(str(program), "0", tcmalloc)["LD_PRELOAD"] == f"{tcmalloc}:{openmp}"
    # Each starts with caches of its own, which are empty at first.
    caches = [made[name].environment["VLLM_CACHE_ROOT"] for name in ("vllm", "vllm zentorch", "vllm eager")]
    assert len({*caches, made["ours bfloat16"].environment["ANABRANCH_CACHE"]}) == 4
    # Both in 4 bits from the same file.
    assert str(files["Q4_0"]) in made["ours int4"].command
    llama = made["llama.cpp Q4_0"].command
    assert str(files["Q4_0"]) in llama
    assert llama[llama.index("-np") : llama.index("-np") + 2] == ["-np", "16"]
    assert llama[llama.index("-Cr") : llama.index("-Cr") + 4] == ["-Cr", "0-1", "--cpu-strict", "1"]
    assert "-tb" not in llama
    assert options.rounds >= 7
    assert options.requests >= 50


def test_rounds_of_engines_by_hand(benchmark):
    rows, bars = benchmark("_engine_rows"), benchmark("_bars")
    speeds = {
        "ours bfloat16": [30.0, 20.0, None],
        "ours int4": [None, None, None],
        "vllm": [10.0, None, 10.0],
        "vllm zentorch": [20.0, 20.0, 20.0],
    }
    turns = {
        name: [{"tokens_s": one, "agreement": None} if one else {"failed": "gone"} for one in each]
        for name, each in speeds.items()
    }
    first = {"ours bfloat16": [{"ttft_ms": 50.0}], "vllm": [{"ttft_ms": 100.0}]}
    starts = rows.Starts(
        cold={
            "ours bfloat16": {"ready_s": 10.0},
            "vllm": {"ready_s": 40.0},
            "vllm zentorch": {"failed": "no such library"},
        },
        warm={"ours bfloat16": {"ready_s": 10.0}, "vllm": {"ready_s": 20.0}, "llama.cpp Q4_0": {"ready_s": 1.0}},
    )
    made = bars.with_bars("serving_engine", rows.table(rows.Measured({16: turns}, first, 3), starts))
    found = {(row["case"], row["peer_name"]): row for row in made}
    assert len(found) == len(made) == 4 + 1 + 2 + 2
    row = found["16 streams, ours bfloat16", "vllm"]
    assert (row["ours"], row["peer"], row["ratio"], row["spread"]) == (30.0, 10.0, 3.0, None)
    assert row["failed_rounds"] == {"ours": 1, "peer": 1}
    assert (row["bar"], bars.is_met(row)) == (1.5, False)
    row = found["16 streams, ours bfloat16", "vllm zentorch"]
    assert (row["ratio"], row["spread"]) == (1.25, [1.125, 1.375])
    row = found["16 streams, ours int4", "vllm"]
    assert (row["ratio"], row["failed"]) == (None, "ours: gone")
    row = found["first token after 256 prompt tokens, ours bfloat16", "vllm"]
    assert (row["ratio"], row["bar"], bars.is_met(row)) == (2.0, 1.0, True)
    row = found["seconds until ready, cold, bfloat16", "vllm"]
    assert (row["ratio"], row["bar"], bars.is_met(row)) == (4.0, 3.0, True)
    row = found["seconds until ready, cold, bfloat16", "vllm zentorch"]
    assert (row["ratio"], row["failed"], row.get("bar")) == (None, "vllm zentorch: no such library", None)
    row = found["seconds until ready, warm, bfloat16", "vllm"]
    assert (row["ratio"], row["bar"], bars.is_met(row)) == (2.0, 3.0, False)
    assert found["seconds until ready, warm, bfloat16", "llama.cpp Q4_0"]["ratio"] == 0.1
    assert rows.medians(turns["vllm"]) == {"tokens_s": 10.0}
    assert rows.medians(turns["ours int4"]) == {}


def test_starts_are_timed_cold_and_warm(benchmark, tmp_path, monkeypatch):
    engine, serving, gateway = benchmark("serving_engine"), benchmark("_serving"), benchmark("_gateway")
    # Its second start finds what the first has left.
    code = (
        "import http.server, os, pathlib, sys, time\nleft = pathlib.Path(os.environ['ANABRANCH_CACHE'])\n"
        "open('starts', 'a').write('warm ' if left.exists() else 'cold ')\n"
        "time.sleep(0 if left.exists() else 1)\nleft.mkdir(exist_ok=True)\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()"
    )
    port, log = gateway.free_port(), tmp_path / "log"
    cache = {"ANABRANCH_CACHE": str(tmp_path / "cache")}
    good = serving.Server(
        "ours bfloat16", [sys.executable, "-c", code, str(port)], port, "/none", environment=cache, log=log
    )
    bad = serving.Server("vllm", [sys.executable, "-c", "raise ValueError('no /root/x/y')"], port, "/none", log=log)
    untimed = serving.Server("vllm eager", ["none"], port, "/none", log=log)
    starts = engine.Starts()
    monkeypatch.chdir(tmp_path)
    engine.time_starts([good, bad, untimed], starts)
    assert starts.cold["ours bfloat16"]["ready_s"] > 1
    assert starts.warm["ours bfloat16"]["ready_s"] > 0
    assert (tmp_path / "starts").read_text().split() == ["cold", "warm"]
    assert starts.cold["vllm"] == starts.warm["vllm"] == {"failed": "ValueError: no PATH"}
    assert "vllm eager" not in {**starts.cold, **starts.warm}


def test_a_contestant_that_does_not_start_or_fails_a_round_stands_in_the_record(benchmark, monkeypatch, tmp_path):
    engine, serving = benchmark("serving_engine"), benchmark("_serving")
    monkeypatch.setattr(engine, "SPIN_S", 0.0)

    class Echo:
        name = "ours bfloat16"

        async def run(self, work):
            return [serving.Answer(0.0, [1.0 + n for n in range(count)], "x") for stream in work for _, count in stream]

    class Prompts:
        sizes = iter([])

        def work(self, streams, each):
            return [[([1], 4)] * each] * streams

    options = engine.arguments(
        [
            "--model",
            "x.gguf",
            "--streams",
            "1",
            "2",
            "--requests",
            "2",
            "--rounds",
            "2",
            "--json",
            str(tmp_path / "x.json"),
        ]
    )
    starts, found = engine.Starts(), [Echo()]
    engine._miss("vllm", "no such library", starts, found)
    for so_far in engine.measured(options, found, Prompts()):
        engine.write(options, so_far, starts, {})
        record = json.loads((tmp_path / "x.json").read_text())
        assert record["rounds"] == so_far.rounds == len(record["first_token_ms"]["vllm"])
        assert record["failed"] == {"vllm": "no such library"}
        (row,) = [row for row in record["rows"] if row["case"] == "2 streams, ours bfloat16"]
        assert (row["ratio"], row["failed"]) == (None, "vllm: SystemExit: no such library")
        assert row["failed_rounds"] == {"ours": 0, "peer": so_far.rounds}
    assert record["rounds"] == 2


def test_goodput_counts_the_time_that_a_queue_takes_to_drain(benchmark, monkeypatch):
    goodput = benchmark("serving_goodput")
    http = benchmark("_serving_http")

    async def ask(session, url, body, headers=None, timeout_s=120):
        sent = time.monotonic()
        await asyncio.sleep(0.3)
        return http.Result(sent, 200, "whole", 0.01, time.monotonic() - sent, 1)

    monkeypatch.setattr(goodput, "ask", ask)
    # Two clients begin within 0.1 s and end after 0.3: two requests in 0.3 s, not in 0.1.
    rate, median = asyncio.run(goodput.capacity("http://x", 2, 0.1))
    assert 0 < rate <= 2 / 0.3
    assert median == pytest.approx(0.3, abs=0.2)
    row = asyncio.run(goodput.load("http://x", 50.0, 0.1, 5.0, "0 1.0", False, 5.0))
    assert row["took_s"] >= 0.3
    assert row["sent"] == row["answered"]
    assert row["goodput"] == pytest.approx(row["sent"] / row["took_s"], rel=0.01)


def test_rows_of_goodput_by_hand(benchmark):
    goodput, bars = benchmark("serving_goodput"), benchmark("_bars")

    def load(good, p99, answered, refused=0, times=3.0):
        return {
            "times": times,
            "sent": 10,
            "answered": answered,
            "rejected": refused,
            "goodput": good,
            "ttft_p99_s": p99,
        }

    told = {
        "ours": {"kept": 0.95, "rows": [load(4.0, 0.1, 4, 6)], "patient": load(4.0, 0.1, 4, 6)},
        "vllm": {"kept": 0.5, "rows": [load(2.0, 0.4, 9)], "patient": load(5.0, 0.4, 10)},
        "vllm with limits": {"kept": 0.5, "rows": [], "failed": "no such option"},
    }
    found = {(row["case"], row["peer_name"]): row for row in bars.with_bars("serving_goodput", goodput.table(told))}
    leave, wait = (
        found[f"P99 to the first token at 3 times the saturating load, clients {clients}", "vllm"]
        for clients in ("leave at the objective", "wait as long as it takes")
    )
    assert (leave["ratio"], leave["bar"], bars.is_met(leave)) == (4.0, 3.0, True)
    assert (leave["not_answered_ours"], leave["refused_ours"], leave["not_answered_peer"]) == (0.6, 0.6, 0.1)
    # As soon, but fewer of them.
    assert (wait["ratio"], bars.is_met(wait)) == (4.0, False)
    assert wait["missed"] == "ours answers 4 a second in time, vllm 5"
    kept = found["least from the best load to 3 times, share of the best", "the bar"]
    assert (kept["ratio"], kept["bar"], bars.is_met(kept)) == (pytest.approx(0.95 / 0.9), 1.0, True)
    limited = found["requests/s in time at 3 times the saturating load", "vllm with limits"]
    assert (limited["ratio"], limited["failed"]) == (None, "vllm with limits: no such option")
    told["ours"] = {"kept": 0.0, "rows": [], "failed": "killed"}
    rows = bars.with_bars("serving_goodput", goodput.table(told))
    assert [row["peer_name"] for row in rows if "bar" in row] == ["the bar", "vllm", "vllm"]
    assert not any(bars.is_met(row) for row in rows if "bar" in row)


def test_a_server_that_is_gone_or_hangs_is_out_and_the_record_says_so(benchmark, monkeypatch):
    goodput = benchmark("serving_goodput")
    monkeypatch.setattr(goodput, "SPIN_S", 0.0)

    def start():
        raise SystemExit("error: no model at /root/x/model here")

    async def work(url):
        raise AssertionError(url)

    one = goodput.Contestant(start)
    assert one.turn(work) is None
    assert one.turn(work) is None
    assert one.told() == {"capacity": None, "kept": 0.0, "rows": [], "failed": "error: no model at PATH here"}
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    server = type("Server", (), {"url": "http://x", "process": ended, "logged": lambda self: "RuntimeError: died\n"})()

    async def done(url):
        return 1

    one = goodput.Contestant(lambda: server)
    assert one.turn(done) is None
    assert one.failed == "RuntimeError: died"


def test_others_wait_in_goodput_as_ours_does(benchmark, tmp_path):
    goodput = benchmark("serving_goodput")
    given = goodput.arguments(["--vllm", "python", "--streams", "4"])
    assert list(goodput.contestants_of(given, "m")) == ["ours", "ours without limits", "vllm", "vllm with limits"]
    given = goodput.arguments(["--vllm", "python", "--zen", str(tmp_path)])
    assert list(goodput.contestants_of(given, "m"))[2:] == ["vllm zentorch", "vllm zentorch with limits"]
    assert goodput.vllm_limits(4)[:2] == ["--max-num-queued-reqs", "12"]


# Memory


def test_the_best_limit_that_a_system_allows_is_taken_and_says_what_it_covers(benchmark, tmp_path, monkeypatch):
    memory = benchmark("_memory_limit")
    # No group can be made where none lies: a plain folder gets no files of a control group.
    nothing = memory.best_way(tmp_path, "0::/\n4:memory:/mine\n", has_systemd=False)
    assert nothing.name == "RLIMIT_DATA"
    assert "not counted" in nothing.covers
    monkeypatch.setattr(memory, "_can_make", lambda way: way.name == "cgroup v1")
    found = memory.best_way(tmp_path, "0::/\n4:memory:/mine\n", has_systemd=False)
    assert (found.name, found.parent) == ("cgroup v1", tmp_path / "memory" / "mine")
    assert "pages of files" in found.covers


def test_a_limit_holds(benchmark):
    memory = benchmark("_memory_limit")
    way = memory.best_way(has_systemd=False)
    taken = [sys.executable, "-c", "print(len(bytearray(300 << 20)))"]
    with memory.limited(way, None) as group:
        done = subprocess.run(group.wrap(taken), capture_output=True, check=False)
        assert done.stdout.strip() == str(300 << 20).encode()
        assert group.peak_bytes() is None or group.peak_bytes() > 300 << 20
    with memory.limited(way, 100 << 20) as group:
        assert subprocess.run(group.wrap(taken), capture_output=True, check=False).returncode != 0
        assert group.peak_bytes() is None or group.peak_bytes() <= 100 << 20


def test_anonymous_memory_is_of_a_process_and_what_it_started(benchmark):
    anonymous = benchmark("_memory_limit").anonymous_bytes
    held = "held = bytearray(b'1' * (40 << 20)); print('x', flush=True); sys.stdin.read()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; ' + {held!r}], check=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert anonymous(process.pid) > 40 << 20
        process.stdin.close()
    assert anonymous(process.pid) == 0


@pytest.mark.parametrize(("kind", "top", "width"), [("Q4_0", 7, 18), ("Q8_0", 127, 34)])
def test_random_blocks_are_those_of_gguf_with_the_deviation_asked_for(benchmark, kind, top, width):
    gguf = pytest.importorskip("gguf")
    models = benchmark("_moe_models")
    packed = models.blocks(np.random.default_rng(0), (4, 8, 64), kind, 0.5)
    assert packed.shape == (4, 8, 64 // 32 * width)
    values = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert values.shape == (4, 8, 64)
    assert values.std() == pytest.approx(0.5, rel=0.1)
    assert abs(values.mean()) < 0.05
    scale = packed.reshape(-1, width)[:, :2].copy().view(np.float16).astype(np.float32)
    assert (abs(values.reshape(-1, 32) / scale) <= top + 1e-3).all()


def test_a_random_model_has_the_shape_it_says_and_routes_that_vary(benchmark, tmp_path):
    pytest.importorskip("gguf")
    from anabranch.lm import load_model
    from anabranch.routing import record_routing

    models = benchmark("_moe_models")
    shape = dataclasses.replace(models.SMALL["qwen3"], dim=64, hidden=32, head_dim=32, vocabulary=320)
    path = tmp_path / "model.gguf"
    models.write_random(path, shape)
    model, tokenizer = load_model(path)
    assert tokenizer.decode([300]) == f" {300}"
    assert model.config.vocab_size == 320
    token_BL = torch.randint(256, 320, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), record_routing(model) as recorder:
        model(token_BL)
    for _, decided in recorder.trace():
        assert len({tuple(sorted(index_K)) for index_K in decided.index_NK.tolist()}) > 32
    expert_bytes = sum(tensor.n_bytes for tensor in gguf_tensors(path) if "_exps" in tensor.name)
    assert expert_bytes == shape.expert_bytes


def gguf_tensors(path):
    import gguf

    return gguf.GGUFReader(path).tensors


def turns_of(memory, speeds):
    """{share: {name: [a turn]}} of {share: {name: tokens a second, None for who failed}}, one stream."""
    answer = memory.Answer(0.0, [0.1], "a b")
    made = {"ttft_ms": 5.0, "answers": [answer]}
    return {
        share: {
            name: [
                {
                    "limit_bytes": 9,
                    "peak_bytes": None,
                    "anonymous_bytes": 7,
                    "streams": {1: {**made, "tokens_s": speed}},
                }
            ]
            if speed
            else [{"limit_bytes": 9, "peak_bytes": None, "streams": {}, "failed": "killed"}]
            for name, speed in each.items()
        }
        for share, each in speeds.items()
    }


def test_rows_of_memory_by_hand(benchmark):
    memory, bars = benchmark("serving_moe_memory"), benchmark("_bars")
    turns = turns_of(
        memory,
        {0.25: {"ours": 6.0, "llama.cpp mmap": 3.0, "ik_llama.cpp": None}, 1.0: {"ours": 8.0, "llama.cpp": 10.0}},
    )
    rows = bars.with_bars("serving_moe_memory", memory.table("M", turns, [1]))
    assert [(row["case"], row["peer_name"], row["ratio"], row.get("bar")) for row in rows] == [
        ("M, 25% of experts, 1 stream", "llama.cpp mmap", 2.0, 1.5),
        ("M, 25% of experts, 1 stream", "ik_llama.cpp", None, None),
        ("M, 100% of experts, 1 stream", "llama.cpp", 0.8, 1.0),
    ]
    assert rows[1]["failed"] == "ik_llama.cpp: killed"
    assert [row.get("failed_rounds") for row in rows] == [None, {"ours": 0, "peer": 1}, None]
    assert (rows[0]["first_ms_ours"], rows[0]["anonymous_bytes_peer"], rows[0]["peak_bytes_ours"]) == (5.0, 7, None)
    assert memory.check_same(turns, [1]) == {"ours, 25%, 1 streams": 1.0}
    turns[0.25]["ours"][0]["streams"][1]["answers"] = [memory.Answer(0.0, [0.1], "b a")]
    with pytest.raises(SystemExit, match="ours with 25% of its experts does not answer as with all"):
        memory.check_same(turns, [1])


def test_everyone_has_the_share_of_experts_and_what_it_needs_beside(benchmark, tmp_path):
    memory, models = benchmark("serving_moe_memory"), benchmark("_moe_models")
    path, native = tmp_path / "model.gguf", tmp_path / "native"
    shape = models.SMALL["olmoe"]
    path.write_bytes(bytes(shape.expert_bytes + 1000))
    native.mkdir()
    header = json.dumps(
        {
            "blocks.0.feed_forward.experts.w2.panels": {"data_offsets": [8, 128]},
            "embedding.weight": {"data_offsets": [128, 256]},
        }
    ).encode()
    (native / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    model = models.Written(shape, path, native)
    assert model.native_expert_bytes == 120
    assert memory.expert_bytes("ours", model, 0.25) == memory.expert_bytes("llama.cpp mmap", model, 0.25)
    assert memory.expert_bytes("llama.cpp mmap", model, 0.25) == shape.expert_bytes // 4
    assert memory.expert_bytes("ours", model, 1.0) == 120
    taken = 10 * shape.expert_bytes
    assert memory.room_bytes("ours", model, 0.25, taken) == taken - shape.expert_bytes // 4 + memory.SLACK
    assert memory.room_bytes("llama.cpp mmap", model, 0.25, taken) == taken + 1000 + memory.SLACK
    assert memory.room_bytes("llama.cpp", model, 1.0, taken) == taken - shape.expert_bytes + 1000 + memory.SLACK
    assert [memory.is_limiting(model, share) for share in (0.25, 1.0)] == [False, True]
    assert memory.is_limiting(models.Written(models.SHAPES["olmoe"], path, native), 0.5)
    options = memory.arguments(["--llama", "llama-server", "--ik", "python", "--planned", "--room", "ours=1MiB"])
    assert options.room == {"ours": 1 << 20}
    assert options.rounds >= 5
    assert memory.contestants(options, 0.25) == ["ours", "ours --memory", "llama.cpp mmap", "ik_llama.cpp"]
    assert memory.contestants(options, 1.0) == [
        "ours",
        "llama.cpp mmap",
        "llama.cpp",
        "ik_llama.cpp",
        "ik_llama.cpp -rtr",
    ]

    def command(name, share):
        return memory.command_of(name, model, share, 12345, 80, options)

    assert command("ours", 0.25)[command("ours", 0.25).index("--expert-budget") + 1] == f"{shape.expert_bytes // 4}B"
    assert "engine.experts.drop_cache=true" in command("ours", 0.25)
    assert "--expert-budget" not in command("ours", 1.0)
    assert command("ours --memory", 0.25)[-6:-4] == ["--memory", "12345B"]
    assert "--no-repack" in command("llama.cpp mmap", 0.25)
    assert "--no-repack" not in command("llama.cpp", 1.0)
    assert command("ik_llama.cpp -rtr", 1.0)[-1] == "-rtr"
    # 64 tokens of 16 streams, and a quarter.
    assert command("llama.cpp", 1.0)[command("llama.cpp", 1.0).index("-c") + 1] == "1280"
    with pytest.raises(SystemExit, match="nobody is none of them"):
        memory.arguments(["--room", "nobody=1MiB"])


def test_a_contestant_that_does_not_answer_is_ended(benchmark, monkeypatch):
    memory = benchmark("serving_moe_memory")
    monkeypatch.setattr(memory, "TURN_S", 0.2)

    class Silent:
        async def run(self, work):
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError, match="no answer in 0 s"):
        memory.answers_of(Silent(), [])


def test_a_contestant_that_does_not_even_run_without_a_limit_says_why(benchmark, tmp_path, monkeypatch):
    memory, models, limit = benchmark("serving_moe_memory"), benchmark("_moe_models"), benchmark("_memory_limit")
    model = models.Written(models.SMALL["olmoe"], tmp_path / "model.gguf", tmp_path)
    options = memory.arguments(["--ik", sys.executable, "--rounds", "2", "--shares", "1"])
    monkeypatch.setattr(memory, "contestants", lambda options, share: ["ik_llama.cpp"])
    monkeypatch.setattr(
        memory, "command_of", lambda *given: [sys.executable, "-c", "raise SystemExit('error: no such file')"]
    )
    turns, rooms = memory.measured(options, model, limit.Way("none", ""), tmp_path)
    assert [turn["failed"] for turn in turns[1.0]["ik_llama.cpp"]] == [
        "ik_llama.cpp ended; see its log error: no such file"
    ] * 2
    assert rooms == {"100%": {"ik_llama.cpp": "ik_llama.cpp ended; see its log error: no such file"}}
    assert limit.read_ahead_kb(tmp_path / "new") is None or limit.read_ahead_kb(tmp_path) >= 0


def test_the_most_memory_is_seen_though_it_is_given_back(benchmark):
    limit = benchmark("_memory_limit")
    group = limit.Group(limit.Way("none", ""), None, None)
    held, is_over = [{"anonymous": 5}, {"anonymous": 9}, {"anonymous": 7}, {}], threading.Event()

    def held_bytes():
        if len(held) == 1:
            is_over.set()
        return held.pop(0) if held else {}

    group.held_bytes = held_bytes
    with group.watched(every_s=0.001) as most:
        assert is_over.wait(60)
    assert most == [9]


def test_pages_of_a_file_that_are_in_memory_are_counted(benchmark, tmp_path):
    limit = benchmark("_memory_limit")
    (tmp_path / "a").write_bytes(bytes(1 << 16))
    assert limit.resident_bytes(tmp_path) in (1 << 16, None)


def test_models_are_added_to_a_record_of_the_same_machine_and_settings(benchmark, tmp_path):
    memory = benchmark("serving_moe_memory")
    path = tmp_path / "record.json"
    options = memory.arguments(["--json", str(path), "--add"])
    settings = {"cpu": "a", "options": {"shares": (0.25, 1.0)}, "date": "2026-01-02"}
    assert memory.kept(options, settings) == ([], {})
    path.write_text(json.dumps({**settings, "date": "2026-01-01", "rows": [{"case": "M"}], "models": {"M": {}}}))
    assert memory.kept(options, settings) == ([{"case": "M"}], {"M": {}})
    assert memory.kept(memory.arguments(["--json", str(path)]), settings) == ([], {})
    with pytest.raises(SystemExit, match="has another cpu"):
        memory.kept(options, {**settings, "cpu": "b"})


# On paper


def test_a_billion_edges_on_paper(benchmark):
    """40 microseconds an edge, and 20 seconds to begin."""
    paper = benchmark("graph_spark").on_paper(2_000_000, 100.0, 500_000, 40.0, 8e9)
    assert paper == {"shuffle_tb": 4.0, "core_hours": 11.1, "start_s": 20.0}
    assert (
        benchmark("graph_spark").on_paper(2_000_000, 30.0, 500_000, 40.0, 8e9)["core_hours"] == 0.0
    )  # nothing is learned


# What torch's pipelining refuses


REFUSED = {"uneven micro-batches", "shapes that change"}


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="docs/systems/gpipe.md says it of torch 2.13")
@pytest.mark.parametrize(
    "case",
    [
        "uneven micro-batches",
        "fewer micro-batches than stages",
        "shapes that change",
        "skips across stages",
        "recomputation",
    ],
)
def test_what_torchs_pipelining_refuses_is_as_the_page_says(benchmark, case):
    """It was said of all five, and asked in none."""
    made = benchmark("gpipe")
    assert (made.refusal(case) is not None) == (case in REFUSED)


def test_refused_is_what_torch_was_asked_for_and_refused(benchmark, monkeypatch, capsys):
    made = benchmark("gpipe")
    asked = []

    def run_ranks(function, world, case, side):
        asked.append((case, side))
        if side == "theirs" and case == made.CASES[0]:
            raise made.RankError(1, "RuntimeError: no\nmore")
        return [0.0, 1e-3 if side == "theirs" and case == made.CASES[3] else 1e-16]

    monkeypatch.setattr(made, "run_ranks", run_ranks)
    told = made.refusals("")
    assert asked == [(case, side) for case in made.CASES for side in ("ours", "theirs")]
    assert told.endswith("refuses 2: uneven micro-batches, skips across stages.")
    assert "torch refuses it: RuntimeError: no\n" in capsys.readouterr().out
    assert made.refusals("step") is None
    assert made.refusals("recomputation").endswith("refuses 0.")


def test_both_sides_of_a_pipelines_bytes_recompute(benchmark):
    """Ours did, and torch's kept everything."""
    made = benchmark("gpipe")
    size = (16, 2, 16, 4)
    plain, spared = (made.run_ranks(made.contest, 2, size, 1, recomputes) for recomputes in (False, True))
    for rank in range(2):
        assert spared[rank]["differ"] < 1e-5
        assert all(spared[rank]["saved"][side] < plain[rank]["saved"][side] / 2 for side in ("ours", "theirs"))
        # Inputs of all micro-batches, and one of them recomputed.
        assert spared[rank]["saved"]["theirs"] > plain[rank]["saved"]["theirs"] / made.MICRO_BATCHES


# Adapters


def test_routed_experts_are_compared_with_two_products_of_all_of_them(benchmark, monkeypatch):
    dispatch, bars = benchmark("adapter_dispatch"), benchmark("_bars")
    for name, size in (("TOKENS", 24), ("IN_DIM", 64), ("OUT_DIM", 32), ("RANK", 2), ("MOST_ACTIVE", 4.0)):
        monkeypatch.setattr(dispatch, name, size)
    # Whether torch can compile here is not what is asked.
    monkeypatch.setattr(torch, "compile", lambda run: run)
    for decided in (True, False):
        loop, products = dispatch.hybrid_rows(8, decided, 1)
        assert loop["case"] == products["case"]
        assert loop["peer_name"] == "dense loop"
        assert products["peer_name"] in ("two products", "two products, compiled")
        # A loop is what was asked about.
        assert (bars.bar_of("adapter_dispatch", loop), bars.bar_of("adapter_dispatch", products)) == (
            2 if decided else None,
            None,
        )
    wrong = dispatch.two_products
    monkeypatch.setattr(dispatch, "two_products", lambda layer: lambda x_NC: 1.001 * wrong(layer)(x_NC))
    with pytest.raises(SystemExit, match="outputs differ"):
        dispatch.hybrid_rows(8, True, 1)


def test_a_pool_is_compared_with_grouped_products(benchmark, monkeypatch):
    batch, bars = benchmark("adapter_batch"), benchmark("_bars")
    monkeypatch.setattr(batch, "RANKS", (2, 4))
    monkeypatch.setattr(torch, "compile", lambda run: run)
    row = batch.layer_row(24, 16, 3, 1)
    assert row["peer_name"] in ("grouped bmm", "grouped bmm, compiled")
    assert bars.bar_of("adapter_batch", row) is None
    wrong = batch.grouped
    monkeypatch.setattr(batch, "grouped", lambda pool, row_B: wrong(pool, row_B.roll(1)))
    with pytest.raises(SystemExit, match="outputs differ"):
        batch.layer_row(24, 16, 3, 1)
