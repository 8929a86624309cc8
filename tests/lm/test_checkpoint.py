import json
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.config import configclass
from anabranch.data import ByteTokenizer
from anabranch.errors import BackendError, CheckpointError, ConfigError
from anabranch.files import atomic_folder
from anabranch.lm import Decoder, load_config, load_model, load_weights, save_model, write_model
from anabranch.lm.checkpoint import find_model
from anabranch.lm.tensors import build_empty, open_tensors
from anabranch.nn import ExpertPool, MoE, SelfAttention, SwiGLU
from anabranch.nn.pool_policy import PoolAccess, PoolPolicy
from anabranch.nn.rotary import Rotary
from anabranch.registry import BUILTIN
from anabranch.routing import CosineScore, Router, SwitchLoss
from anabranch.routing.bias import BiasBalancer

BIASED = Router.Config(balance=(BiasBalancer.Config(), SwitchLoss.Config()))


def tiny(**changes):
    fields = {
        "vocab_size": 257,
        "dim": 16,
        "num_layers": 2,
        "attention": SelfAttention.Config(num_heads=2, num_kv_heads=1, qk_norm="head"),
        "feed_forward": MoE.Config(num_experts=4, hidden_dim=8, shared_experts=1, router=BIASED),
        "rotary": Rotary.Config(scaling="linear", factor=2.0),
        "max_positions": 64,
    }
    return Decoder.Config(**{**fields, **changes})


@pytest.fixture
def model():
    built = tiny().build(seed=1)
    built.blocks[0].feed_forward.router.balance[0].expert_bias += 0.25
    return built.eval()


@pytest.fixture
def folder(tmp_path, model):
    save_model(tmp_path / "m", model, ByteTokenizer())
    return tmp_path / "m"


def logits(model):
    token_BL = torch.arange(20).view(2, 10)
    with torch.no_grad():
        return model(token_BL).logits_BLV


def edit(folder, **changes):
    table = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(table))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_what_is_loaded_is_what_was_saved_to_the_bit(folder, model):
    loaded, tokenizer = load_model(folder)
    assert loaded.config == model.config
    assert tokenizer.encode("ab") == [97, 98]
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=0, atol=0)
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    # Buffers that are not stored are there and right.
    torch.testing.assert_close(loaded.rotary.frequency, model.rotary.frequency)
    assert loaded.blocks[0].feed_forward.router.balance[1].load_E.tolist() == [0] * 4


def test_a_loaded_model_trains(folder):
    model, _ = load_model(folder)
    token_BL = torch.arange(10).view(1, 10)
    model.train()(token_BL, token_BL).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tied_embeddings_are_stored_once(tmp_path):
    model = tiny(tie_embeddings=True).build().eval()
    save_model(tmp_path / "m", model)
    assert not [name for name in load_file(tmp_path / "m" / "model.safetensors") if "head" in name]
    torch.testing.assert_close(logits(load_model(tmp_path / "m")[0].eval()), logits(model), rtol=0, atol=0)


class OnePool(PoolPolicy):
    def build(self, config, context):
        pool = context.share("pool", lambda: ExpertPool(4, context.dim, 8, generator=context.generator))
        return PoolAccess(config.router, pool.num_experts, experts=pool)


class Sharing(MoE, kind="sharing"):
    """One pool for all layers, owned by the model (what ReXMoE does), and a parameter that stands under two names."""

    @configclass
    class Config(MoE.Config):
        @property
        def pool_policy(self):
            return OnePool()

    def __init__(self, config, context):
        super().__init__(config, context)
        self.again = torch.nn.ParameterList([self.experts.w2])


def test_shared_tensors_are_stored_once_and_shared_after_loading(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILTIN["feed_forward"], "sharing", f"{__name__}:Sharing")
    model = tiny(feed_forward=Sharing.Config(num_experts=4, hidden_dim=8)).build().eval()
    save_model(tmp_path / "m", model)
    names = load_file(tmp_path / "m" / "model.safetensors")
    assert [name for name in names if "w13" in name or "w2" in name or "again" in name] == [
        "shared.pool.w13",
        "shared.pool.w2",
    ]
    loaded, _ = load_model(tmp_path / "m")
    first, second = (block.feed_forward for block in loaded.blocks)
    assert first.experts is second.experts is loaded.shared["pool"]
    assert first.again[0] is second.again[0] is loaded.shared["pool"].w2
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_weights(folder, dtype):
    loaded, _ = load_model(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded.rotary.frequency.dtype == torch.float32
    assert loaded.blocks[0].feed_forward.router.balance[0].expert_bias.dtype == torch.float32
    assert logits(loaded.eval()).dtype == dtype


def test_stored_dtype_is_kept(tmp_path, model):
    save_model(tmp_path / "m", model.bfloat16())
    loaded, _ = load_model(tmp_path / "m")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_large_models_are_split(tmp_path, model):
    save_model(tmp_path / "m", model, max_shard_bytes=20_000)
    files = sorted(file.name for file in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    torch.testing.assert_close(logits(load_model(tmp_path / "m")[0].eval()), logits(model), rtol=0, atol=0)
    (tmp_path / "m" / files[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{files[1]} is missing"):
        load_model(tmp_path / "m")


def test_tensors_are_their_own(folder, model):
    source = open_tensors(folder)
    source.read("norm.weight").zero_()
    torch.testing.assert_close(source.read("norm.weight"), model.norm.weight.detach(), rtol=0, atol=0)


def test_building_empty_takes_no_memory_for_weights():
    model = build_empty(tiny())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    # and leaves torch as it was
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_newest_checkpoint_of_a_run(tmp_path, model):
    for step in (2, 10):
        save_model(tmp_path / f"checkpoints/step-{step:08}", model)
    (tmp_path / "checkpoints/step-00000099").mkdir()  # nothing in it
    assert find_model(tmp_path).name == "step-00000010"
    assert load_config(tmp_path) == model.config
    assert load_model(tmp_path)[0].config == model.config


def test_write_model_leaves_what_is_beside_it(tmp_path, model):
    with atomic_folder(tmp_path / "step") as temporary:
        (temporary / "optimizer.pt").write_text("state")
        write_model(temporary, model, ByteTokenizer())
    assert (tmp_path / "step/optimizer.pt").read_text() == "state"
    torch.testing.assert_close(logits(load_model(tmp_path / "step")[0].eval()), logits(model), rtol=0, atol=0)


def test_given_state_is_written_in_place_of_the_models_own(tmp_path, model):
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    write_model(tmp_path, model, state=state)
    assert all(not tensor.any() for tensor in load_model(tmp_path)[0].state_dict().values())


def test_load_weights_in_place(folder, model):
    other = tiny().build(seed=2).eval()
    before = [parameter.data_ptr() for parameter in other.parameters()]
    load_weights(other, folder)
    assert [parameter.data_ptr() for parameter in other.parameters()] == before
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)


def test_a_saved_model_is_replaced_and_nothing_else(tmp_path, model, folder):
    save_model(folder, model)
    assert not (folder / "tokenizer.json").exists()
    other = tmp_path / "home"
    other.mkdir()
    save_model(other, model)  # empty: fine
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"is not a saved model \(it holds thesis.tex\)"):
        save_model(other, model)
    assert (other / "thesis.tex").read_text() == "years of work"
    listing = tmp_path / "listing"
    listing.mkdir()
    (listing / "data.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds data.json"):
        save_model(listing, model)


def test_a_failed_save_leaves_the_old_model(folder, model, monkeypatch):
    class Broken(ByteTokenizer):
        def save(self, folder):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        save_model(folder, tiny(dim=8).build(), Broken())
    assert sorted(os.listdir(folder.parent)) == ["m"]
    torch.testing.assert_close(logits(load_model(folder)[0].eval()), logits(model), rtol=0, atol=0)


def test_paths_that_hold_no_model(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"no model at .*nowhere; give a folder .*nothing is downloaded"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no model in .*looked for config.json"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a file, and not a .gguf one; did you mean the folder"):
        load_model(folder / "model.safetensors")
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"did you mean .*x.gguf\?"):
        load_model(tmp_path)


def test_weights_that_are_not_there(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights in .*model.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_weights(folder, size):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"cannot read .*model.safetensors: .*truncated or corrupt"):
        load_model(folder)


def test_corrupt_config(folder):
    (folder / "config.json").write_text('{"schema": 1, "format"')
    with pytest.raises(CheckpointError, match=r"cannot read .*config.json: "):
        load_model(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_model(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"cannot read .*config.json: "):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 4}, "schema version 4, and this anabranch .* reads up to 3; update anabranch"),
        ({"schema": "one"}, "schema in .* is 'one'; it must be 1 to 3"),
        ({"format": "other"}, "neither format='anabranch' nor a Hugging Face model_type"),
        ({"model": {"dmi": 3}}, "does not describe a model: .*has no field 'dmi'; did you mean 'dim'"),
        ({"model": None}, "does not describe a model"),
    ],
)
def test_configs_that_cannot_be_read(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_tensors_that_do_not_fit(folder):
    rewrite(folder, lambda tensors: [tensors.pop(f"blocks.{i}.attention.out.weight") for i in (0, 1)])
    with pytest.raises(CheckpointError, match=r"lacks blocks.0.attention.out.weight, blocks.1.attention.out.weight$"):
        load_model(folder)


def test_no_more_than_three_names_are_listed(folder):
    rewrite(folder, lambda tensors: tensors.update({f"x{i}": torch.zeros(1) for i in range(5)}))
    with pytest.raises(CheckpointError, match=r"has x0, x1, x2 and 2 more, which the model .* has no place for"):
        load_model(folder)


def test_wrong_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({"norm.weight": torch.zeros(7)}))
    with pytest.raises(CheckpointError, match=r"norm.weight in .* has shape \[7\], the model needs \[16\]"):
        load_model(folder)


def test_weights_that_are_not_numbers_of_ours(folder):
    rewrite(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(16, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"norm.weight in .* is stored as int8; weights must be float64"):
        load_model(folder)


def test_wrong_dtype_and_device(folder):
    with pytest.raises(ConfigError, match=r"dtype is torch.int8; weights must be float64"):
        load_model(folder, dtype=torch.int8)
    with pytest.raises(BackendError, match="device 'nonsense' is not available"):
        load_model(folder, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="device 'cuda' is not available"):
            load_model(folder, device="cuda")


def test_dense_model_without_tokenizer(tmp_path):
    model = tiny(feed_forward=SwiGLU.Config(hidden_dim=8)).build().eval()
    save_model(tmp_path / "m", model)
    loaded, tokenizer = load_model(str(tmp_path / "m"))
    assert tokenizer is None
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=0, atol=0)


def test_building_a_model_empty_leaves_other_threads_alone():
    """The hook that empties parameters is the process's: models loaded side by side lost weights to each other."""

    class Busy:
        """Builds a layer on another thread while one is built here."""

        def build(self):
            built = []
            thread = threading.Thread(target=lambda: built.append(torch.nn.Linear(2, 2)))
            thread.start()
            thread.join()
            return torch.nn.Linear(2, 2), built[0]

    here, there = build_empty(Busy())
    assert here.weight.is_meta
    assert not there.weight.is_meta


@pytest.mark.parametrize("layout", [(), (1,)])
def test_a_single_number_may_be_stored_without_an_axis(tmp_path, layout):
    router = Router.Config(score=CosineScore.Config(temperature=0.25))
    model = tiny(feed_forward=MoE.Config(num_experts=4, hidden_dim=8, router=router)).build(seed=1).eval()
    save_model(tmp_path / "m", model)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    name = "blocks.0.feed_forward.router.score.log_temperature"
    save_file({**tensors, name: tensors[name].reshape(layout)}, file)
    loaded, _ = load_model(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))
    load_weights(model, tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))
