"""Adapters of our own form on models whose table of vectors is in few bits: of GGUF files as they are stored, and packed by an engine."""

import json

import pytest
import torch

from anabranch.adapters.around import put_around
from anabranch.adapters.base_digest import base_digest, is_same_base
from anabranch.adapters.bottleneck import Bottleneck
from anabranch.adapters.front import Front
from anabranch.adapters.ladder import Ladder
from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.own_folder import read_own, write_own
from anabranch.adapters.put_on import added_names, put_on
from anabranch.adapters.scaling import Scaling
from anabranch.adapters.soup import average_own
from anabranch.depth.decoder_stack import DecoderStack
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import Decoder, load_model, save_model
from anabranch.lm.quantized import load_quantized
from anabranch.nn import kernels
from anabranch.nn.quantize import PackedEmbedding
from anabranch.serving import LLM, Sampling
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.expertflow import load_offloaded

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf_made import medium, with_blocks

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
ADDED = {
    "scaling": lambda model: put_on(model, {"*.attention.*": Scaling.Config()}),
    "bottleneck": lambda model: put_on(model, {"*.attention.*": Bottleneck.Config()}),
    "low rank": lambda model: put_on(model, {"*.attention.*": LowRank.Config()}),
    "low rank on experts": lambda model: put_on(model, {"*.experts.*": LowRank.Config()}),
    "bottleneck on experts": lambda model: put_on(model, {"*.experts.1.down": Bottleneck.Config()}),
    "virtual tokens": lambda model: put_around(model.requires_grad_(False), front=Front.Config(num_tokens=3)),
    "virtual keys": lambda model: put_around(model.requires_grad_(False), front=Front.Config(num_tokens=3, of="keys")),
    "ladder": lambda model: put_around(model.requires_grad_(False), ladder=Ladder.Config(reduction=4)),
}
needs_kernels = pytest.mark.skipif(kernels.load() is None, reason="no compiler")


def moved(model):
    """The model, whose added numbers are others than training starts from."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, value in sorted(model.named_parameters()):
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=generator) * 0.05)
    return model.eval()


def logits(model):
    with torch.inference_mode():
        return model.eval()(TOKENS).logits_BLV


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return with_blocks(tmp_path_factory.mktemp("stored") / "m.gguf", medium, layers=1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_a_table_is_known_by_the_rows_that_it_gives(kind, tmp_path):
    path = with_blocks(tmp_path / "m.gguf", lambda name: kind if name == "token_embd.weight" else None, layers=1)
    plain, stored = load_model(path)[0], load_quantized(path, "stored")[0]
    assert isinstance(stored.embedding, PackedEmbedding)
    # Nothing else is in few bits, so that all of it is compared.
    assert base_digest(stored) == base_digest(plain)
    # Depth routers too know a model by its table.
    assert DecoderStack(stored).fingerprint() == DecoderStack(plain).fingerprint()
    row = stored.embedding.num_embeddings // 2
    with torch.no_grad():
        plain.embedding.weight[row] += 1
    assert base_digest(stored)["embedding"] != base_digest(plain)["embedding"]


@pytest.mark.parametrize("name", ADDED)
def test_an_adapter_goes_onto_the_file_as_it_is_stored(name, file, tmp_path):
    trained = moved(ADDED[name](load_model(file)[0]))
    write_own(tmp_path / "a", trained, base=str(file))
    stored = load_quantized(file, "stored")[0]
    bare = logits(stored)
    put = read_own(tmp_path / "a", stored)
    assert added_names(put) == added_names(trained)
    assert all(torch.equal(put.state_dict()[own], trained.state_dict()[own]) for own in added_names(trained))
    wanted, found = logits(trained), logits(put)
    # Activations are rounded to eight bits.
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    assert not torch.equal(found, bare)
    # Trained on the file as it is stored, and onto floating point.
    fresh = moved(ADDED[name](load_quantized(file, "stored")[0]))
    write_own(tmp_path / "b", fresh)
    back = read_own(tmp_path / "b", load_model(file)[0])
    assert all(torch.equal(back.state_dict()[own], fresh.state_dict()[own]) for own in added_names(fresh))


def test_an_adapter_of_another_file_is_refused(file, tmp_path):
    other = with_blocks(tmp_path / "other.gguf", medium, layers=1, vocabulary=97)
    write_own(tmp_path / "a", ADDED["scaling"](load_model(other)[0]), base="other")
    stored = load_quantized(file, "stored")[0]
    with pytest.raises(CheckpointError, match="was trained on another base, other, with other numbers"):
        read_own(tmp_path / "a", stored)


LOADED = {
    "float32": lambda path: load_model(path, dtype=torch.float32)[0],
    "bfloat16": lambda path: load_model(path, dtype=torch.bfloat16)[0],
    "stored": lambda path: load_quantized(path, "stored")[0],
    "stored, bfloat16": lambda path: load_quantized(path, "stored", dtype=torch.bfloat16)[0],
    "stored, float16": lambda path: load_quantized(path, "stored", dtype=torch.float16)[0],
    "int8": lambda path: load_quantized(path, "int8")[0],
    "int8, bfloat16": lambda path: load_quantized(path, "int8", dtype=torch.bfloat16)[0],
    "int4": lambda path: load_quantized(path, "int4")[0],
    "budget": lambda path: load_offloaded(path, "4MiB", dtype=torch.float32)[0],
    "stored, budget": lambda path: load_offloaded(path, "4MiB", quantize="stored")[0],
    "stored, bfloat16, budget": lambda path: load_offloaded(path, "4MiB", quantize="stored", dtype=torch.bfloat16)[0],
}


def drawn_table(name):
    return "Q4_0" if name == "token_embd.weight" else medium(name)


@pytest.fixture(scope="module")
def digests(file, tmp_path_factory):
    """Of a file in which some layers' matrices are of several types, and of another, by how each was loaded."""
    mixed = with_blocks(tmp_path_factory.mktemp("mixed") / "m.gguf", medium, layers=1)
    # Drawn anew, while blocks of other types are the same in both.
    other = with_blocks(tmp_path_factory.mktemp("other") / "m.gguf", drawn_table, layers=1)
    return {path: {way: base_digest(load(path)) for way, load in LOADED.items()} for path in (mixed, other)}


@pytest.mark.parametrize("trained", LOADED)
def test_a_base_is_known_however_it_is_loaded(digests, trained):
    first, other = digests.values()
    for way in LOADED:
        assert is_same_base(first[trained], first[way]), way
        # And any other is told.
        assert not is_same_base(first[trained], other[way]), way


def test_adapters_of_one_base_have_a_mean_however_it_was_loaded(file, tmp_path):
    write_own(tmp_path / "a", moved(ADDED["scaling"](load_model(file)[0])))
    write_own(tmp_path / "b", moved(ADDED["scaling"](load_quantized(file, "stored")[0])))
    write_own(tmp_path / "c", moved(ADDED["scaling"](load_quantized(file, "int8")[0])))
    average_own([tmp_path / name for name in "abc"], [1, 1, 1], tmp_path / "mean")
    other = with_blocks(tmp_path / "other.gguf", drawn_table, layers=1)
    write_own(tmp_path / "d", moved(ADDED["scaling"](load_quantized(other, "stored")[0])))
    with pytest.raises(ConfigError, match="d was trained on another base than"):
        average_own([tmp_path / "a", tmp_path / "d"], [1, 1], tmp_path / "none")


def test_bases_in_floating_point_are_told_by_all_of_their_numbers(file):
    plain, other = load_model(file)[0], load_model(file)[0]
    with torch.no_grad():
        other.blocks[0].attention.out.weight[0] += 1
    assert not is_same_base(base_digest(plain), base_digest(other))
    assert not is_same_base(base_digest(plain), base_digest(other.bfloat16()))
    assert is_same_base(base_digest(plain), base_digest(plain.bfloat16()))


@needs_kernels
@pytest.mark.parametrize("name", ["bottleneck", "low rank"])
def test_an_engine_loads_it_onto_the_file(name, file, tmp_path):
    write_own(tmp_path / "a", moved(ADDED[name](load_model(file)[0])), base=str(file))
    adapters = AdaptersConfig(load=(f"a={tmp_path / 'a'}",))
    sampling = Sampling(temperature=0.0, max_tokens=4, ignore_eos=True)
    llm = LLM(file, num_blocks=20, process=False, adapters=adapters, dtype="float32", quantize="stored")
    [found] = llm.generate([[1, 2, 3]], sampling, adapters=(("a", 1.0),))
    llm.close()
    # The same layers, all of whose rows have it.
    merged = read_own(tmp_path / "a", load_quantized(file, "stored")[0]).eval()
    wanted = [1, 2, 3]
    with torch.inference_mode():
        for _ in found.tokens:
            wanted.append(int(merged(torch.tensor([wanted])).logits_BLV[0, -1].argmax()))
    assert list(found.tokens) == wanted[3:]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_loads_it_onto_a_table_that_it_packed(dtype, tmp_path):
    model = Decoder.Config(vocab_size=96, dim=64, num_layers=1, tie_embeddings=True).build(seed=2).to(dtype)
    save_model(tmp_path / "m", model)
    write_own(tmp_path / "a", moved(ADDED["low rank"](load_model(tmp_path / "m")[0])))
    adapters = AdaptersConfig(load=(f"a={tmp_path / 'a'}",))
    llm = LLM(tmp_path / "m", num_blocks=20, process=False, quantize="none", adapters=adapters)
    sampling = Sampling(temperature=0.0, max_tokens=4, ignore_eos=True)
    assert len(llm.generate([[1, 2, 3]], sampling, adapters=(("a", 1.0),))[0].tokens) == 4
    llm.close()


def test_a_digest_that_another_version_wrote_is_known(file, tmp_path):
    """That of floating point is as it was: an adapter trained on a file goes onto it as it is stored."""
    model = ADDED["scaling"](load_model(file)[0])
    write_own(tmp_path / "a", model)
    told = json.loads((tmp_path / "a" / "adapter.json").read_text())["base_digest"]
    assert told == base_digest(load_model(file)[0])
    assert told["embedding"] == base_digest(load_quantized(file, "stored")[0])["embedding"]
