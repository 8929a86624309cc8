"""What is read of a folder of adapters: its size, and what is seen of a pinned one, go by these files alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from anabranch.adapters.glider import describe_expert
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.adapter_place import MOST_CONFIG, check_small, files_of, folder_of, size_of
from anabranch.serving.engine.engine import Engine
from served_adapters import make_adapters, make_model, make_pool, make_routers

# Each file that any adapter may have: a large one of it that is not read is of no account.
ALL = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter.json",
    "adapter.safetensors",
    "glider.json",
    "glider.safetensors",
}
READ = {
    "single": {"adapter_config.json", "adapter_model.safetensors"},
    "pickled": {"adapter_config.json", "adapter_model.bin"},
    "own": {"adapter.json", "adapter.safetensors"},
    "pool": {"adapter_config.json", "adapter_model.safetensors", "glider.json", "glider.safetensors"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    make_adapters(root / "adapters")
    found = {"single": root / "adapters" / "a", "pool": root / "pool", "pickled": root / "pickled"}
    make_pool(root / "pool")
    shutil.copytree(found["single"], root / "pickled")
    (root / "pickled" / "adapter_model.safetensors").unlink()
    torch.save({"a": torch.zeros(64)}, root / "pickled" / "adapter_model.bin")
    (root / "routers").mkdir()
    return {**found, "own": make_routers(root / "routers")["routed_low_rank"]}


@pytest.fixture(params=READ)
def kind(request):
    return request.param


@pytest.fixture
def place(made, kind, tmp_path):
    """A copy of it, and the folder of one of its adapters."""
    shutil.copytree(made[kind], tmp_path / "it")
    return tmp_path / "it", tmp_path / "it" / "law" if kind == "pool" else tmp_path / "it"


def strew(folder, kind):
    """Put there what is not read, and larger than may be."""
    for name in sorted(ALL - READ[kind]):
        # What has a table of our own is of our own form, and what has none of peft's is no adapter of theirs.
        if name in ("adapter.json", "adapter_model.safetensors") and kind in ("single", "pickled"):
            continue
        if name.endswith(".safetensors"):
            save_file({"model.layers.0.self_attn.q_proj": torch.zeros(5000)}, folder / name)
        elif name.endswith(".bin"):
            torch.save({"x": torch.zeros(5000)}, folder / name)
        else:
            (folder / name).write_text(json.dumps({"x": "y" * MOST_CONFIG}))


def test_what_lies_beside_is_neither_counted_nor_looked_at(place, kind):
    whole, inner = place
    before = size_of(folder_of(str(whole), None)), files_of([str(whole)])
    assert before[0] > 0
    strew(inner, kind)
    found = folder_of(str(whole), None)
    check_small(found)
    assert (size_of(found), files_of([str(whole)])) == before
    # A pool has one more, in the folder of its adapters' folders.
    assert {path.name for path in before[1]} == READ[kind] | ({"pool.json"} if kind == "pool" else set())


def test_a_pinned_one_fits_beside_what_is_not_read_of_it(tmp_path):
    """Gates, which only a pool reads, took memory of an adapter that is alone."""
    place = make_adapters(tmp_path)["a"]
    most = size_of(folder_of(place, None))
    gates = {name: torch.zeros(inputs) for name, inputs in _inputs(place).items()}
    describe_expert(place, gate=gates, instruction="Do it.")
    config = ServingConfig(
        num_blocks=64, dtype="float32", adapters=AdaptersConfig(load=(f"a={place}",), memory=f"{most}B")
    )
    engine = Engine.of(make_model(), config)
    assert [facts["bytes"] for facts in engine.adapters.shelf.facts()] == [most]


def _inputs(place):
    from anabranch.adapters import read_peft

    return {name: pair.a_RC.shape[1] for name, pair in read_peft(place).pairs.items()}
