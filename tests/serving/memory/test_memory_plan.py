"""The ladder of `plan_memory`: which rung which memory means, what stays as it was given, what is refused."""

import functools
import io
import json
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from anabranch.cli.main import main
from anabranch.cli.memory import planned as planned_for_people
from anabranch.data import ByteTokenizer
from anabranch.errors import CapacityError, ConfigError
from anabranch.lm import Decoder, convert, export_huggingface, save_model
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.serving import LLM, Sampling
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.http.serve import ServeConfig
from anabranch.serving.memory import plan_memory
from anabranch.serving.memory.forms import Form
from anabranch.serving.memory.plan import Ladder
from anabranch.serving.memory.work import load_bytes, step_bytes
from anabranch.sizes import parse_bytes
from served_adapters import make_adapters, make_model, make_routers
from waiting import until

PROGRAM = 100 << 20
MIXTURE = Decoder.Config(
    vocab_size=257,
    dim=256,
    num_layers=4,
    attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
    feed_forward=MoE.Config(num_experts=64, hidden_dim=512),
    max_positions=1024,
)
DENSE = MIXTURE.replace(feed_forward=SwiGLU.Config(hidden_dim=2048), dim=512)


SHAPES = {"mixture": MIXTURE, "dense": DENSE, "long": DENSE.replace(max_positions=1 << 20)}


@functools.cache
def ladder(shape, **fields):
    config = ServingConfig(model="m", dtype="bfloat16", **fields)
    return Ladder(config, SHAPES[shape], measure=lambda model, processes: PROGRAM * processes)


def planned(shape, memory, **fields):
    return ladder(shape, **fields).plan(parse_bytes(memory))


def rung(plan):
    return plan.config.quantize, plan.config.expert_budget is not None


@functools.cache
def tightest(shape, **fields):
    """The smallest memory on each rung, to 1 MiB, from the top down."""
    found = {}
    most = planned(shape, "1TiB", **fields).total
    for memory in range(most + (1 << 20), 0, -(1 << 20)):
        made = planned(shape, memory, **fields)
        if not made.fits:
            return found, memory, made
        found[rung(made)] = made
    raise AssertionError("something always takes memory")


def test_less_memory_means_fewer_bits_and_then_experts_on_disk():
    found, memory, beyond = tightest("mixture")
    assert list(found) == [("none", False), ("int8", False), ("int4", False), ("int4", True)]
    assert memory < beyond.least <= found["int4", True].memory
    for (quantize, on_disk), made in found.items():
        assert made.total <= made.memory
        form = Form.of(MIXTURE, quantize, torch.bfloat16)
        assert (made.rest, made.experts) == (form.rest, form.experts)
        assert made.resident_share == (made.resident / form.experts if on_disk else 1.0)
        assert made.disk == (form.experts if on_disk else 0)
        assert form.pools.layout.total_bytes == form.experts
    last = found["int4", True]
    assert form.least_budget <= parse_bytes(last.config.expert_budget) == last.resident <= form.experts
    # One request of 1,024 positions: 4 layers, 2 heads, keys and values of 64, two bytes each.
    assert last.kv >= 1024 * 4 * 2 * 2 * 64 * 2


def test_bits_are_not_given_up_for_more_than_a_few_requests_keys():
    """A rung is left where four requests of up to 4,096 tokens have no more room, whatever else could be kept for them."""
    few = 4 * 1024 * 4 * 2 * 2 * 64 * 2
    found, _, _ = tightest("mixture")
    for bits in ("none", "int8", "int4"):
        last = found[bits, False]
        assert few <= last.kv
        assert few + (1 << 20) < last.memory // 8
        form = Form.of(MIXTURE, bits, torch.bfloat16)
        least = ladder("mixture")._made(last.memory, form, form.experts, few, on_disk=False)
        assert last.memory - (1 << 20) < least.total <= last.memory


def test_what_loading_takes_is_for_keys_and_values_once_it_is_done():
    """They are not written before, so where loading takes most of all they have what it had: no byte of the memory is left over."""
    form = Form.of(MIXTURE, "none", torch.bfloat16)
    loading = load_bytes(form, is_rounded=False, on_disk=False)
    memory = 2 * PROGRAM + form.rest + form.experts + loading
    made = Ladder(
        ServingConfig(model="m", dtype="bfloat16"),
        MIXTURE.replace(max_positions=1 << 13),
        measure=lambda model, processes: PROGRAM * processes,
    ).plan(memory)
    assert rung(made) == ("none", False)
    assert made.work == step_bytes(form, 512, 16, 1 << 13) == loading - made.kv
    assert made.total == memory


@settings(max_examples=12, deadline=None)
@given(st.integers(300, 900), st.sampled_from([None, "8MiB", "100MiB"]))
def test_more_memory_never_means_fewer_bits(mebibytes, budget):
    order = [("none", False), ("none", True), ("int8", False), ("int8", True), ("int4", False), ("int4", True)]
    ranks = []
    for memory in (mebibytes, mebibytes + 1, mebibytes + 50):
        made = planned("mixture", memory << 20, expert_budget=budget)
        if made.fits:
            ranks.append(order.index(rung(made)))
            if budget is not None:
                # What the budget leaves goes to keys and values.
                most = 16 * 1024 * 4 * 2 * 2 * 64 * 2
                assert made.kv == most or made.total == made.memory
    assert ranks == sorted(ranks, reverse=True)


def test_with_guesses_experts_stay_in_memory():
    """Rows of guesses would load those that no token goes to."""
    smallest = planned("mixture", "1TiB", quantize="int4", prompt_lookup=4).least
    assert rung(planned("mixture", smallest, prompt_lookup=4)) == ("int4", False)
    assert rung(planned("mixture", smallest - 1)) == ("int4", True)
    with pytest.raises(CapacityError, match="m takes at least"):
        planned("mixture", smallest - 1, prompt_lookup=4).check()


@settings(max_examples=60, deadline=None)
@given(st.integers(50, 700), st.sampled_from(["mixture", "dense"]), st.sampled_from(["none", "int8", "int4"]))
def test_a_plan_never_takes_more_than_there_is_nor_refuses_what_would_do(mebibytes, shape, quantize):
    made = planned(shape, mebibytes << 20, quantize=quantize, process=False)
    assert made.fits == (made.total <= made.memory) == (made.memory >= made.least)
    assert planned(shape, made.least, quantize=quantize, process=False).fits
    assert not planned(shape, made.least - 1, quantize=quantize, process=False).fits
    if quantize != "none":
        assert made.config.quantize == quantize


def test_what_is_not_used_by_weights_goes_to_keys_and_values_as_far_as_they_can_be_filled():
    rich = planned("dense", "1TiB")
    # 16 requests of 1,024 positions.
    assert rich.kv == 16 * 1024 * 4 * 2 * 2 * 128 * 2
    long = planned("long", "1TiB")
    assert long.kv == 1 << 30
    assert planned("dense", rich.total).kv == rich.kv
    assert planned("dense", rich.total - (1 << 20)).kv == rich.kv - (1 << 20)


def test_what_is_given_stays_and_the_rest_is_planned_around_it():
    top = planned("mixture", "1TiB")
    memory = top.total + (1 << 20)
    assert rung(planned("mixture", memory, quantize="int4")) == ("int4", False)
    fixed = planned("mixture", memory, kv_memory="8MiB")
    assert (fixed.config.kv_memory, fixed.kv) == ("8MiB", 8 << 20)
    blocks = planned("mixture", memory, num_blocks=3)
    assert (blocks.config.num_blocks, blocks.config.kv_memory, blocks.kv) == (3, None, 3 * 16 * 4 * 2 * 2 * 64 * 2)
    assert planned("mixture", memory, kv_memory="8MiB", host_kv="4MiB").kv == 12 << 20
    budget = planned("mixture", memory, expert_budget="16MiB")
    assert (rung(budget), budget.config.expert_budget, budget.resident) == (("none", True), "16MiB", 16 << 20)
    with pytest.raises(CapacityError, match=r"m takes at least [\d,]+"):
        planned("mixture", memory, kv_memory="4GiB").check()


def test_what_contradicts_is_refused():
    with pytest.raises(ConfigError, match="memory is None"):
        plan_memory(ServingConfig(model="m"))
    with pytest.raises(ConfigError, match="memory is '8 apples'"):
        ServingConfig(memory="8 apples")
    with pytest.raises(ConfigError, match="expert_budget is 2GiB, and memory, which is for everything, is 1GiB"):
        ServingConfig(memory="1GiB", expert_budget="2GiB")
    with pytest.raises(ConfigError, match="device is 'cuda'; only the memory of a CPU"):
        planned("dense", "8GiB", device="cuda")
    with pytest.raises(ConfigError, match="m has no experts that can stay on disk"):
        planned("dense", "8GiB", expert_budget="1MiB")
    with pytest.raises(ConfigError, match="expert_budget is 1KiB, but experts of one token"):
        planned("mixture", "8GiB", expert_budget="1KiB")
    with pytest.raises(ConfigError, match=r"devices is 2, but engine\.memory is for one engine"):
        ServeConfig(devices=2, engine=ServingConfig(memory="8GiB"))


def test_a_dense_model_that_is_too_large_says_what_it_takes():
    made = planned("dense", "1MiB")
    with pytest.raises(CapacityError, match=f"m takes at least {made.least:,}: 209,715,200 for the program"):
        made.check()
    assert planned("dense", made.least).fits
    assert made.resident_share is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = MIXTURE.replace(num_layers=2, dim=64, feed_forward=MoE.Config(num_experts=4, hidden_dim=64))
    save_model(folder / "m", config.build(seed=0), ByteTokenizer())
    convert(folder / "m", folder / "q", "native", quantize="int8")
    return folder


def test_a_folder_in_few_bits_has_two_rungs(saved):
    def of(memory, **fields):
        config = ServingConfig(model=str(saved / "q"), memory=str(memory), **fields)
        return plan_memory(config, measure=lambda model, processes: 0)

    rich = of("1TiB")
    assert (rung(rich), rich.disk) == (("none", False), 0)
    assert (rung(of(rich.least)), of(rich.least).disk) == (("none", True), 0)
    with pytest.raises(ConfigError, match="saved in int8, and int4 is asked for"):
        of("1TiB", quantize="int4")


def test_the_engine_is_loaded_as_planned(saved, monkeypatch):
    monkeypatch.setattr("anabranch.serving.memory.plan.program_bytes", lambda model, processes: 0)
    config = ServingConfig(model=str(saved / "m"), memory="1TiB", process=False)
    plan = plan_memory(config, measure=lambda model, processes: 0)
    assert config.planned() == plan.config
    assert plan.config.planned() is plan.config
    llm = LLM(str(saved / "m"), memory="1TiB", process=False, dtype="float32")
    assert (
        llm.engine.info.num_blocks * 16 * 2 * 2 * 2 * 16 * 4
        == plan_memory(config.replace(dtype="float32"), measure=lambda *a, **k: 0).kv
    )
    llm.close()
    with pytest.raises(CapacityError, match="takes at least"):
        config.replace(memory="1MiB").planned()


@pytest.mark.parametrize("kind", ["F16", "Q4_1"])
def test_gguf_files_have_rungs_as_they_are_stored(kind, tmp_path, monkeypatch):
    files = pytest.importorskip("gguf_files")
    files.write(tmp_path / "m.gguf", files.tiny(300), kind=files.gguf.GGMLQuantizationType[kind])
    monkeypatch.setattr("anabranch.serving.memory.plan.program_bytes", lambda model, processes: 0)
    config = ServingConfig(model=str(tmp_path / "m.gguf"), memory="1TiB", process=False)
    found = Ladder(config)
    assert [form.quantize for form in found.resident] == (["none", "int8", "int4"] if kind == "F16" else ["stored"])
    assert found.on_disk == []
    # Loaded by the plan it is what the same bits give.
    greedy = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
    made = []
    for fields in ({"memory": "1TiB"}, {"quantize": found.resident[0].quantize}):
        llm = LLM(config.model, process=False, **fields)
        made.append(llm.generate([[1, 2, 3]], greedy)[0].tokens)
        llm.close()
    assert made[0] == made[1]


def test_a_type_that_is_asked_for_is_had_where_it_fits(tmp_path):
    """As without a limit; what a GGUF file stores comes after it."""
    made = pytest.importorskip("gguf_made")
    path = made.with_blocks(tmp_path / "m.gguf", made.medium, experts=4)
    found = Ladder(ServingConfig(model=str(path), dtype="float32", process=False), measure=lambda model, processes: 0)
    assert [form.quantize for form in found.resident] == ["none", "stored"]
    assert [form.quantize for form in found.on_disk] == ["stored"]


def test_experts_of_a_gguf_file_stay_in_it(tmp_path):
    made = pytest.importorskip("gguf_made")
    path = made.with_blocks(tmp_path / "m.gguf", made.medium, experts=4)
    found = Ladder(ServingConfig(model=str(path), process=False), measure=lambda model, processes: 0)
    assert [form.quantize for form in found.resident] == [form.quantize for form in found.on_disk] == ["stored"]
    (form,) = found.resident
    # Q4_K twice, whose six-bit scales have a byte each, Q6_K once: 256 rows of a block, of four experts of two layers.
    assert form.experts == 2 * 4 * 256 * (2 * 148 + 210)
    budget = ServingConfig(model=str(path), process=False, expert_budget="400KB", kv_memory="1MiB")
    plan = Ladder(budget, measure=lambda model, processes: 0).plan(1 << 40)
    assert (plan.config.quantize, plan.resident, plan.disk) == ("stored", 400_000, 0)
    # Of the file so much may be mapped at a time.
    assert plan.work > 64_000_000
    llm = LLM(str(path), process=False, dtype="float32", quantize="stored", expert_budget="400KB", num_blocks=8)
    assert llm.generate([[1, 2, 3]], Sampling(max_tokens=3, temperature=0, ignore_eos=True))[0].tokens
    llm.close()


def test_huggingface_folders_and_those_that_cannot_be_read_in_parts(tmp_path):
    config = MIXTURE.replace(num_layers=2, dim=64, feed_forward=MoE.Config(num_experts=4, hidden_dim=64))
    model = config.build(seed=0)
    export_huggingface(tmp_path / "hf", model, None)
    ladder = Ladder(ServingConfig(model=str(tmp_path / "hf")), measure=lambda model, processes: 0)
    assert [form.quantize for form in ladder.resident] == ["none", "int8", "int4"]
    assert [form.quantize for form in ladder.on_disk] == ["int4"]
    with_budget = Ladder(
        ServingConfig(model=str(tmp_path / "hf"), expert_budget="1MiB"), measure=lambda model, processes: 0
    )
    assert (with_budget.resident, [form.quantize for form in with_budget.on_disk]) == ([], ["none", "int8", "int4"])
    # Pickled weights are not read in parts: they can only be rounded into a file of their own.
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "hf" / "pytorch_model.bin")
    pickled = Ladder(
        ServingConfig(model=str(tmp_path / "hf"), expert_budget="1MiB"), measure=lambda model, processes: 0
    )
    assert [form.quantize for form in pickled.on_disk] == ["int8", "int4"]


def test_the_command_plans_what_serve_does_with_the_same_options(saved, monkeypatch, capsys):
    monkeypatch.setattr("anabranch.serving.memory.plan.program_bytes", lambda model, processes: 5 << 20)
    options = ["--memory", "1GiB", "--expert-budget", "100KiB", "--quantize", "int4", "--set", "engine.max_seqs=2"]
    options += ["--set", "engine.kv_memory=3MiB"]
    assert main(["plan", str(saved / "m"), *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    fields = {"expert_budget": "100KiB", "quantize": "int4", "max_seqs": 2, "kv_memory": "3MiB"}
    expected = plan_memory(ServingConfig(model=str(saved / "m"), memory="1GiB", **fields))
    assert told == expected.to_dict()
    assert (told["expert_budget"], told["quantize"], told["kv_memory"]) == (100 << 10, "int4", 3 << 20)
    assert main(["plan", str(saved / "m"), *options]) == 0
    shown = capsys.readouterr().out
    assert main(["serve", str(saved / "m"), *options, "--check"]) == 0
    assert shown.strip() in capsys.readouterr().err


def test_the_command_says_which_bits_a_folder_has_and_that_a_budget_holds_all(saved, monkeypatch, capsys):
    monkeypatch.setattr("anabranch.serving.memory.plan.program_bytes", lambda model, processes: 5 << 20)
    assert main(["plan", str(saved / "q"), "--memory", "1GiB"]) == 0
    assert "weights in int8, as they are saved, all in memory\n" in capsys.readouterr().out
    assert main(["plan", str(saved / "m"), "--memory", "1GiB", "--expert-budget", "512MiB"]) == 0
    shown = capsys.readouterr().out
    assert "experts on disk and all in memory once used: the budget of 512MiB is more than they are\n" in shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_that_waits_is_told_for_what(saved, monkeypatch):
    monkeypatch.setattr("anabranch.cli.memory.PATIENCE_S", 0.05)

    def measured(model, processes):
        if sys.stderr.isatty():
            until(sys.stderr.getvalue)
        else:
            time.sleep(0.2)
        return 5 << 20

    monkeypatch.setattr("anabranch.serving.memory.plan.program_bytes", measured)
    said = []
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        planned_for_people(ServingConfig(model=str(saved / "m"), memory="1GiB"))
        said.append(stream.getvalue())
    assert said == ["measuring what the program takes without a model ...\n", ""]


def test_the_command_prints_the_plan(saved, monkeypatch, capsys):
    monkeypatch.setattr("anabranch.serving.memory.plan.program_bytes", lambda model, processes: 5 << 20)
    assert main(["plan", str(saved / "m"), "--memory", "1GiB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == [
        "model",
        "memory",
        "fits",
        "least_memory",
        "quantize",
        "expert_budget",
        "kv_memory",
        "bytes",
        "total_bytes",
        "all_expert_bytes",
        "resident_share",
        "disk_bytes",
    ]
    assert list(told["bytes"]) == ["rest", "experts", "kv", "work", "program"]
    assert (told["memory"], told["fits"], told["expert_budget"], told["resident_share"]) == (1 << 30, True, None, 1.0)
    assert told["total_bytes"] == sum(told["bytes"].values())
    assert main(["plan", str(saved / "m"), "--memory", "20MiB"]) == 1
    assert "does not fit: give at least" in capsys.readouterr().out
    assert main(["plan", "moe", "--memory", "1GiB", "--dtype", "int4"]) == 0
    assert "weights in int4, all in memory" in capsys.readouterr().out
    for words in (
        ["--memory", "1GiB"],
        ["moe", "--memory", "1GiB", "--devices", "2"],
        ["moe", "--memory", "1GiB", "--dtype", "bits"],
        ["moe", "--memory", "1GiB", "--dtype", "int8", "--quantize", "int4"],
        ["moe", "--memory", "1GiB", "--expert-budget", "2GiB"],
        ["moe", "--memory", "8"],
        ["moe", "--memory", "1GiB", "--set", "engine.sea=1"],
        ["moe", "--quantize", "int4"],
    ):
        assert main(["plan", *words]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_layers_with_windows_are_planned_with_what_they_keep():
    windowed = DENSE.replace(
        max_positions=1 << 15,
        local_attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, window=64),
        local_layers=(0, 1, 2),
    )
    config = ServingConfig(model="m", dtype="bfloat16", max_seqs=2, max_batched_tokens=128)
    made = Ladder(config, windowed, measure=lambda model, processes: PROGRAM).plan(1 << 40)
    # Two requests of 32,768 positions in one layer, of 2 heads with keys and values of 128, two bytes each. In three layers the window, a
    # step's tokens and another window for what requests begin with: 63 + 128 tokens lie in at most 13 blocks of 16, a window in 4.
    layer = 16 * 2 * 2 * 128 * 2
    assert made.kv == 2 * 2048 * layer + 2 * (13 + 4) * 3 * layer
    assert made.kv < 0.3 * 2 * 2048 * 4 * layer
    llm = LLM(
        windowed.build(seed=0),
        num_blocks=3,
        **{name: getattr(config, name) for name in ("max_seqs", "max_batched_tokens")},
    )
    llm.close()
    # As much as before where there is room for no more than windows.
    pools = llm.engine.runner.stores.pools
    assert [pool.num_blocks for pool in pools] == [3, 3]
    fixed = Ladder(config.replace(num_blocks=3), windowed, measure=lambda model, processes: PROGRAM).plan(1 << 40)
    assert 2 * fixed.kv == sum(pool.size_bytes for pool in pools)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(model's folder, NAME=FOLDER of what it is served with: LoRA, a pool whose ranks differ, a mixture, skills of tasks)."""
    root = tmp_path_factory.mktemp("adapted")
    save_model(root / "m", make_model(), ByteTokenizer())
    folders = {**make_adapters(root / "lora"), **make_routers(root / "routers")}
    names = ("a", "b", "pool", "routed_low_rank", "multi_head_routed")
    return str(root / "m"), tuple(f"{name}={folders[name]}" for name in names)


def test_adapters_are_counted_as_they_lie_in_memory(adapted, monkeypatch):
    monkeypatch.setattr("anabranch.serving.memory.plan.program_bytes", lambda model, processes: 0)
    model, load = adapted
    config = ServingConfig(model=model, memory="1TiB", process=False, dtype="float32")
    plain = plan_memory(config, measure=lambda *a, **k: 0)
    plan = plan_memory(config.replace(adapters=AdaptersConfig(load=load)), measure=lambda *a, **k: 0)
    assert (plain.adapters, plain.to_dict()["bytes"].get("adapters")) == (0, None)
    assert plan.to_dict()["bytes"]["adapters"] == plan.adapters
    assert plan.least >= plain.least + plan.adapters
    assert plan.total == plan.rest + plan.resident + plan.kv + plan.work + plan.program + plan.adapters
    llm = LLM(model, memory="1TiB", process=False, dtype="float32", adapters=AdaptersConfig(load=load))
    shelf = llm.engine.adapters.shelf
    assert shelf.stats().gauges["adapter_resident_bytes"] == plan.adapters
    tensors = {}
    for name in shelf.names:
        held = shelf.peek(name)
        if hasattr(held, "experts"):
            layers = [*held.parts.values(), *(layer.table for layer in held.parts.values() if hasattr(layer, "table"))]
            tensors |= {tensor.data_ptr(): tensor for layer in layers for tensor in layer.state_dict().values()}
        else:
            tensors |= {half.data_ptr(): half for a_RC, b_RO, _ in held.parts.values() for half in (a_RC, b_RO)}
    assert plan.adapters == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    llm.close()


def test_memory_that_adapters_alone_pass_is_too_little(adapted):
    model, load = adapted
    config = ServingConfig(model=model, memory="1TiB", process=False, dtype="float32")
    least = plan_memory(config, measure=lambda *a, **k: 0).least
    short = config.replace(memory=f"{least}B", adapters=AdaptersConfig(load=load))
    plan_memory(config.replace(memory=f"{least}B"), measure=lambda *a, **k: 0).check()
    with pytest.raises(CapacityError, match=r"takes at least .* for adapters"):
        plan_memory(short, measure=lambda *a, **k: 0).check()
    plan_memory(
        short.replace(memory=f"{plan_memory(short, measure=lambda *a, **k: 0).least}B"), measure=lambda *a, **k: 0
    ).check()


def test_the_command_tells_adapters(adapted, monkeypatch, capsys):
    monkeypatch.setattr("anabranch.serving.memory.plan.program_bytes", lambda model, processes: 0)
    model, load = adapted
    options = ["--memory", "1GiB", "--set", f"engine.adapters.load={json.dumps(load)}"]
    assert main(["plan", model, *options]) == 0
    assert "that requests may use" in capsys.readouterr().out
    assert main(["plan", model, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"]["adapters"] > 0
