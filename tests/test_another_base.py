"""A contract of all that is kept apart from its base and put back by place: onto the base it was made for, onto no other of its sizes."""

import pytest
import torch

from adapter_models import make_adapter
from anabranch.adapters import DynMoLE, Labelled, MixtureTask, load_fitted, load_mixture
from anabranch.adapters.adapter_mixture import AdapterMixture
from anabranch.adapters.around import put_around
from anabranch.adapters.front import Front
from anabranch.adapters.fusion import AdapterFusion
from anabranch.adapters.ladder import Ladder
from anabranch.adapters.lora_mixer import MixedLowRank
from anabranch.adapters.mhr import MultiHeadRouted
from anabranch.adapters.own_folder import read_own, write_own
from anabranch.adapters.put_on import put_on
from anabranch.depth import stack_of
from anabranch.depth.dr_llm.bank import RouterBank
from anabranch.depth.ftp.skipper import TokenSkipper
from anabranch.errors import CheckpointError
from anabranch.heads import load_heads, put_heads, save_heads
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from depth_banks import saved_bank

TOKENS = torch.tensor([[3, 17, 60, 8], [0, 5, 22, 1]])


def decoder(seed=0):
    config = Decoder.Config(
        vocab_size=61,
        dim=16,
        num_layers=2,
        max_positions=32,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=24),
        init_std=0.2,
    )
    return config.build(seed=seed).eval()


def llama(seed=0):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


def own(put):
    """Of our own folders, with what ``put`` puts onto a model."""
    return decoder, lambda folder, model: write_own(folder, put(model)), read_own


def of_mixture(make):
    """Of a LoRA-Mixer whose adapters lie beside the checkpoint."""

    def adapters(folder):
        return {name: folder.with_name(name) for name in "ab"}

    def save(folder, model):
        layers = {f"model.layers.{layer}.self_attn.q_proj": (16, 16) for layer in range(2)}
        for name, place in adapters(folder).items():
            make_adapter(place, layers, seed=name)
        load_mixture(adapters(folder), model, family="llama")
        rows = Labelled.of([([1, 2], [3], "a")], "ab")
        folder.mkdir()
        MixtureTask(MixtureTask.Config(), model=model, data=rows).save(folder, model, model.state_dict())

    def load(folder, model):
        load_fitted(folder, load_mixture(adapters(folder), model, family="llama"))

    return make, save, load


def put(linears):
    return lambda model: put_on(model, linears)


# How a base is made by a seed, and what is kept of one with something on it; how that is put onto a base again.
KEPT = {
    "routed low rank": own(lambda model: put_on(model, DynMoLE(num_experts=2, rank=2).linears(2))),
    "multi-head routed": own(put({"*.attention.*": MultiHeadRouted.Config(tasks=("a", "b"), rank=2, skills=2)})),
    "mixed low rank": own(put({"*.attention.*": MixedLowRank.Config(ranks=(2, 2))})),
    "adapter mixture": own(put({"*.down": AdapterMixture.Config(width=2)})),
    "adapter fusion": own(put({"*.down": AdapterFusion.Config(widths=(2, 2))})),
    "virtual tokens": own(lambda model: put_around(model.requires_grad_(False), front=Front.Config(num_tokens=3))),
    "ladder": own(lambda model: put_around(model.requires_grad_(False), ladder=Ladder.Config(reduction=4))),
    "LoRA-Mixer": of_mixture(decoder),
    "LoRA-Mixer on a module": of_mixture(llama),
    "routed heads": (llama, lambda folder, model: save_heads(folder, put_heads(model, 1)), load_heads),
    "routers of depth": (decoder, saved_bank, lambda folder, model: RouterBank.load(folder, stack_of(model))),
    "a skipper of tokens": (
        decoder,
        lambda file, model: TokenSkipper(model, [0.0, 0.5]).save(file),
        TokenSkipper.load,
    ),
}


@pytest.mark.parametrize("kept", KEPT)
def test_it_is_put_back_onto_its_base_and_onto_no_other_of_the_same_sizes(kept, tmp_path):
    make, save, load = KEPT[kept]
    save(tmp_path / "kept", make())
    load(tmp_path / "kept", make())
    with pytest.raises(CheckpointError, match=r"another base|another model|of a model with fingerprint|fingerprint"):
        load(tmp_path / "kept", make(1))
