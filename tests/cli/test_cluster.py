"""``anabranch cluster``, through its front door."""

import json

import pytest
import torch

from anabranch import presets
from anabranch.cli.cluster.plan import COLUMNS, facts_of
from anabranch.cluster.saved_bytes import SavedBytes
from anabranch.lm import save_model
from anabranch.lm.decoder import Decoder
from anabranch.lm.layers import layer_costs, uncut_groups
from anabranch.nn import LatentAttention


def test_a_plan_is_told_as_json_and_drawn(here, tmp_path):
    picture = tmp_path / "step.svg"
    code, out, err = here(
        "cluster", "plan", "moe", "--ranks", "2", "--micro-batches", "4", "--picture", str(picture), "--json"
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert [rank["rank"] for rank in told["ranks"]] == [0, 1]
    assert told["schedule"]["clocks"] == 2 * (4 + 1)
    assert told["ranks"][0]["layers"][0][0] == 0
    assert told["ranks"][0]["layers"][0][1] + 1 == told["ranks"][1]["layers"][0][0]
    assert 1 < told["speedup"] < 2
    assert picture.read_text().startswith("<svg")
    assert picture.read_text().count("<path") > 16


def test_a_plan_is_told_in_words(here, tmp_path):
    picture = tmp_path / "step.png"
    code, out, _ = here("cluster", "plan", "dense", "--ranks", "2", "--schedule", "1f1b", "--picture", str(picture))
    assert code == 0
    assert "head" in out
    assert "0: F0 F1" in out
    assert f"wrote   {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved"])
def test_json_has_what_the_table_and_the_facts_say(here, schedule):
    """Each column of each rank, and each fact, is written from what JSON has, and is what the table shows."""
    line = ["cluster", "plan", "moe", "--ranks", "2", "--schedule", schedule, "--micro-batches", "4"]
    line += ["--hardware", "compute=20T,bandwidth=200G,memory=16G,network=1G"]
    code, out, _ = here(*line)
    assert code == 0
    told = json.loads(here(*line, "--json")[1])
    lines = [" ".join(one.split()) for one in out.splitlines()]
    for rank in told["ranks"]:
        assert " ".join(show(rank) for show in COLUMNS.values()) in lines
    for name, said in facts_of(told).items():
        assert " ".join(f"{name} {said}".split()) in lines
    above = out.splitlines()[3:5]
    for header in COLUMNS:
        assert all(word in "".join(above) for word in header.split("\n"))
    assert (told["memory_bytes"], told["bytes_s"]) == (16e9, 1e9)
    assert told["flops_s"] == told["efficiency"] * told["peak_flops_s"] == 0.4 * 20e12
    # What goes on from layer to layer, in bfloat16; the first rank's first chunk gets tokens, which are data.
    config = presets.find("moe")("tiny").model
    one = config.max_positions * config.dim * 2
    visits = told["schedule"]["visits"]
    assert [rank["receive_bytes"] for rank in told["ranks"]] == [(visits - 1) * one, visits * one]
    for rank in told["ranks"]:
        assert rank["idle"] == pytest.approx(1 - rank["busy_s"] / told["step_s"])


def test_stages_have_room_in_the_hardware_s_memory(here):
    """Every rank's parameters with what belongs to them, and its activations, which are shown."""
    line = ["cluster", "plan", "moe", "--ranks", "3", "--micro-batches", "4"]
    code, out, _ = here(*line)
    assert code == 0
    assert "activa-" in out
    code, out, _ = here(*line, "--json", "--hardware", "compute=20T,bandwidth=200G,memory=1G")
    ranks = json.loads(out)["ranks"]
    assert all(rank["activation_bytes"] > 0 and rank["state_bytes"] == 16 * rank["parameters"] for rank in ranks)
    taken = [rank["state_bytes"] + rank["activation_bytes"] for rank in ranks]
    # As much as the fullest one has suffices, and with less the stages are others, or none.
    enough = f"compute=20T,bandwidth=200G,memory={int(max(taken)) + 1}"
    code, again, _ = here(*line, "--json", "--hardware", enough)
    assert (code, json.loads(again)["ranks"]) == (0, ranks)
    code, out, err = here(*line, "--json", "--hardware", "compute=20T,bandwidth=200G,memory=1k")
    assert (code, out) == (2, "")
    assert "3 ranks of 1 kB do not hold them; use more ranks, or ranks with more memory" in err


@pytest.mark.parametrize("name", ["dense", "moe", "moe-shared", "rmoe"])
def test_what_layers_are_said_to_keep_is_about_what_they_keep(name):
    """An estimate: within a factor of 2 of what autograd keeps, of the whole model with its loss."""
    config = presets.find(name)("tiny").model
    model, length = config.build(seed=0), 64
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with SavedBytes(ignored=[*model.parameters(), *model.buffers()]) as meter:
        # Held, or nothing is kept.
        output = model(tokens, tokens)
        kept = meter.now
    assert output.loss.requires_grad
    costs = layer_costs(config, tokens=2 * length, sequence_length=length, dtype=torch.float32)
    assert kept / 2 < sum(cost.saved_bytes for cost in costs) < 2 * kept


def test_layers_sum_to_the_model():
    config = presets.find("moe")("tiny").model
    costs = layer_costs(config, tokens=7, sequence_length=64, dtype=torch.float32)
    count = config.count(64)
    assert sum(cost.flops for cost in costs) == 7 * count.flops
    assert sum(cost.parameters for cost in costs) == count.parameters
    tied = config.replace(tie_embeddings=True)
    costs = layer_costs(tied, tokens=1, sequence_length=64, dtype=torch.float32)
    assert sum(cost.parameters for cost in costs) == tied.count(64).parameters
    assert sum(cost.flops for cost in costs) == tied.count(64).flops


def test_a_head_that_is_the_embedding_is_on_the_last_rank_too(here, tmp_path):
    """With gradients and moments, in the table and in its JSON; and once where both are on one rank."""
    config = Decoder.Config(num_layers=6, dim=16, vocab_size=1000, max_positions=64, tie_embeddings=True)
    save_model(tmp_path / "tied", config.build(seed=0))
    for ranks, copies in ((1, 0), (4, 1)):
        code, out, err = here("cluster", "plan", str(tmp_path / "tied"), "--ranks", str(ranks), "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)["ranks"]
        assert sum(rank["parameters"] for rank in found) == config.count().parameters + copies * 16_000
        assert found[-1]["state_bytes"] == 16 * found[-1]["parameters"] > 16 * 16_000
        code, out, _ = here("cluster", "plan", str(tmp_path / "tied"), "--ranks", str(ranks))
        assert f"{found[-1]['parameters'] / 1e6:.2f}" in next(line for line in out.splitlines() if "to head" in line)


def test_layers_that_share_a_pool_stay_together(here):
    config = presets.find("rexmoe")("tiny").model
    groups = uncut_groups(config)
    assert groups
    assert all(len(group) > 1 for group in groups)
    code, _, err = here("cluster", "plan", "rexmoe", "--ranks", str(config.num_layers + 2))
    assert code == 2
    assert "some stay together" in err
    assert uncut_groups(Decoder.Config(num_layers=3)) == []


def test_ways_to_cut_attention_are_compared(here):
    line = ["cluster", "attention", "dense", "--ranks", "4", "--sequence-length", "4096", "--bandwidth", "1GB"]
    code, out, err = here(*line)
    assert (code, err) == (0, "")
    assert [word in out for word in ("ring2", "token_ring", "all_gather", "ulysses")] == [True] * 4
    assert "x as fast as ring in a forward pass, by simulation of one layer" in out
    assert "with forward" not in out
    code, out, _ = here(*line, "--backward")
    assert code == 0
    assert "with forward" in out
    assert "x as fast as ring in forward and backward together" in out
    code, out, _ = here(*line, "--cached", "65536", "--backward", "--network", "ring", "--json")
    told = json.loads(out)
    assert (code, told["choice"], told["ranks"]) == (0, "token_ring", 4)
    costs = {cost["scheme"]: cost["size_bytes"] for cost in told["costs"]}
    assert costs["token_ring"] < costs["ring"]
    code, out, _ = here(*line, "--network", "nodes", "--node-ranks", "2", "--between", "100MB", "--json")
    told = json.loads(out)
    costs = {cost["scheme"]: cost for cost in told["costs"]}
    assert (code, told["topology"]["node_size"], told["topology"]["between"]) == (0, 2, 100e6)
    # Two blocks of keys out of a node of two, where the ring of four sends three.
    assert costs["hybrid"]["time_s"] < costs["ring"]["time_s"]


def test_attention_that_is_not_cut_is_told_so(here, tmp_path):
    config = Decoder.Config(num_layers=1, dim=16, vocab_size=8, attention=LatentAttention.Config())
    save_model(tmp_path / "latent", config.build(seed=0))
    code, _, err = here("cluster", "attention", str(tmp_path / "latent"))
    assert code == 2
    assert "only self-attention is cut over ranks" in err


def test_losses_are_planned_and_compared(here):
    code, out, err = here(
        "cluster", "elastic", "--replicas", "4", "--layers", "16", "--lose", "1", "--lose", "2:2", "--json"
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert len(told["lost"]) == 3
    assert [len(stage["ranks"]) for stage in told["plan"]["stages"]] == [4, 3, 2, 4]
    assert all(ratio >= 1 for ratio in told["throughput_over"].values())
    samples = [sum(stage["samples"]) for stage in told["plan"]["stages"]]
    assert samples == [4 * 16 * 4] * 4
    whole = told["step_s"]
    words = ["--replicas", "4", "--layers", "16", "--lose", "1", "--lose", "2:2", "--decoupled"]
    code, out, _ = here("cluster", "elastic", *words, "--json")
    apart = json.loads(out)["step_s"]
    # The others are as they were.
    assert {name: apart[name] for name in whole} == whole
    assert apart["recycle-staggered"] <= apart["recycle-decoupled"] <= apart["recycle"]
    assert apart["elaswave-decoupled"] <= apart["elaswave"]
    code, out, _ = here("cluster", "elastic", *words)
    assert "ReCycle, staggered" in out
    code, out, _ = here(
        "cluster", "elastic", "moe", "--replicas", "2", "--stages", "2", "--memory", "1MB", "--bandwidth", "1GB"
    )
    assert code == 0
    assert "layers stay" in out
    assert "no cut into 2 stages" in out
