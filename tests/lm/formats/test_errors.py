"""What cannot be imported or exported, and how the message says so."""

import json
import pkgutil
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.config import configclass
from anabranch.data import ByteTokenizer
from anabranch.errors import CheckpointError, ConfigError
from anabranch.experts.parscale import ParScale
from anabranch.experts.rexmoe import ReXMoE
from anabranch.lm import Decoder, convert, export_huggingface, load_config, load_model, load_weights, save_model
from anabranch.nn import MLP, MoE, SelfAttention, SwiGLU
from anabranch.registry import BUILTIN, kinds, resolve
from anabranch.routing import BiasBalancer, CosineScore, GroupTopK, LinearScore, Router, TopK, TopP, WeightField

OLMOE = SelfAttention.Config(num_heads=2, qk_norm="full")


def tiny(**changes):
    fields = {"vocab_size": 300, "dim": 16, "num_layers": 2, "attention": OLMOE}
    fields["feed_forward"] = MoE.Config(num_experts=4, hidden_dim=8)
    return Decoder.Config(**{**fields, **changes})


@pytest.fixture
def folder(tmp_path):
    export_huggingface(tmp_path / "in", tiny().build(), ByteTokenizer())
    return tmp_path / "in"


def edit(folder, **changes):
    table = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "deepseek_v9"},
            r"model_type in .*config.json is 'deepseek_v9'; supported: llama, .*deepseek, .*$",
        ),
        ({"model_type": None}, "model_type in .* is None"),
        ({"hidden_act": "gelu"}, "hidden_act in .* is 'gelu', which is not supported; supported: 'silu' or 'swish'"),
        ({"sliding_window": 128}, "sliding_window in .* is 128"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types in .* is 'sliding_attention'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rope_scaling.rope_type in .* is 'dynamic', .*'default', 'linear', 'llama3' or 'yarn'",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type in .* is 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "config.json has no factor, without which"),
        ({"rope_scaling": "linear"}, "does not describe a model that can be built: "),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor in .* is 0.5"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quantization_config.quant_method in .* is 'aqlm'"),
        (
            {"quantization_config": "fp8"},
            "quantization_config in .* is 'fp8', .*; supported: a table with a quant_method",
        ),
        ({"quantization_config": ["fp8"]}, r"quantization_config in .* is \['fp8'\], which is not supported"),
        ({"mlp_bias": True}, "mlp_bias in .* is True"),
        ({"hidden_size": None}, "config.json has no hidden_size, without which"),
        ({"hidden_size": "wide"}, "does not describe a model that can be built: .*dim is 'wide'"),
        ({"num_experts_per_tok": 9}, r"does not describe .*takes 9 experts of a token, but num_experts is 4"),
        (
            {"model_type": "deepseek", "n_routed_experts": 4, "kv_lora_rank": 512},
            "kv_lora_rank in .* is 512.*latent attention",
        ),
        (
            {"model_type": "deepseek", "n_routed_experts": 4, "scoring_func": "sigmoid"},
            "scoring_func in .* is 'sigmoid'",
        ),
    ],
)
def test_settings_that_are_not_supported(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
    with pytest.raises(CheckpointError, match=message):
        load_config(folder)


def test_settings_that_change_nothing_are_fine(folder):
    edit(folder, sliding_window=4096, use_sliding_window=False, layer_types=["full_attention"] * 2, unheard_of=1)
    load_model(folder)
    edit(folder, sliding_window=2048, use_sliding_window=None)  # as wide as the context
    load_model(folder)


def test_foreign_tensors_that_do_not_fit(folder):
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"in lacks model.layers.1.mlp.experts.3.up_proj.weight$"):
        load_model(folder)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = gone[:5].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"experts.3.up_proj.weight in .* has shape \[5, 16\], the model needs \[8, 16\]"
    ):
        load_model(folder)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = gone
    tensors["model.layers.1.mlp.experts.4.up_proj.weight"] = gone.clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has model.layers.1.mlp.experts.4.up_proj.weight, which the model"):
        load_model(folder)


def test_quantised_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.weight in .* is stored as float8_e4m3fn"):
        load_model(folder)


def test_a_sentencepiece_tokenizer_is_left_out_with_a_warning(folder, caplog):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert load_model(folder)[1] is None
    assert "only a SentencePiece tokenizer.model" in caplog.text


def test_corrupt_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="has no weight_map from tensor to file"):
        load_model(folder)


class NoTensor:
    """What a pickled file names, and reading it would have to make."""


def test_a_pickle_of_more_than_tensors_is_told_in_our_words(folder):
    """torch's own tell how to run the code that is in the file."""
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2), "more": NoTensor()}, folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"holds a Python object \(\S*NoTensor\) beside tensors, .*as safetensors"
    ) as error:
        load_model(folder)
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)


def test_corrupt_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK nothing of the kind")
    with pytest.raises(CheckpointError, match=r"cannot read .*pytorch_model.bin: .*truncated or corrupt"):
        load_model(folder)


def test_a_pickle_runs_no_code(folder):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot read .*pytorch_model.bin"):
        load_model(folder)


def test_pickle_that_is_no_table_of_tensors(folder):
    (folder / "model.safetensors").unlink()
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*list"):
        load_model(folder)


def routed(**changes):
    score, select = changes.pop("score", LinearScore.Config()), changes.pop("select", TopK.Config())
    balance = changes.pop("balance", ())
    return MoE.Config(
        num_experts=4, hidden_dim=8, router=Router.Config(score=score, select=select, balance=balance), **changes
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward": routed(score=LinearScore.Config(activation="sigmoid"))}, "router.score.activation='sigmoid'"),
        (
            {"feed_forward": routed(score=CosineScore.Config())},
            "no Hugging Face family has .*router.score.kind='cosine'$",
        ),
        ({"feed_forward": routed(select=TopP.Config())}, "no Hugging Face family has .*router.select.kind='top_p'$"),
        (
            {"feed_forward": routed().replace(shared_experts=1, shared_weight=0.5)},
            r"no Hugging Face family has .*shared_weight=0\.5",
        ),
        (
            {"feed_forward": routed(select=GroupTopK.Config(top_k=2, num_groups=2, top_groups=1))},
            "no Hugging Face family has all of this model; the closest, glm4_moe, lacks .*router.score.activation='softmax'",
        ),
        ({"feed_forward": routed(select=TopK.Config(scale=2.5))}, "router.select.scale=2.5"),
        ({"feed_forward": routed(weight_on="input")}, "weight_on='input'"),
        ({"feed_forward": routed(balance=(BiasBalancer.Config(),))}, "router.balance="),
        (
            {"feed_forward": routed(shared_experts=1)},
            "has all of this model; the closest, olmoe, lacks feed_forward.shared_width=8$",
        ),
        ({"attention": OLMOE.replace(head_dim=10)}, "the closest, olmoe, lacks attention.head_dim=10$"),
        (
            {
                "attention": SelfAttention.Config(num_heads=2),
                "feed_forward": SwiGLU.Config(hidden_dim=8),
                "streams": ParScale.Config(num_streams=4, switchable=(2,)),
            },
            r"the closest, qwen2_parscale, lacks streams\.switchable=\[2\]$",
        ),
        (
            {
                "attention": SelfAttention.Config(num_heads=2, out_bias=True),
                "feed_forward": SwiGLU.Config(hidden_dim=8),
            },
            "no Hugging Face family has attention.out_bias=True in a dense model$",
        ),
        (
            {"attention": SelfAttention.Config(num_heads=2), "feed_forward": MLP.Config(hidden_dim=8)},
            "the closest, llama, lacks feed_forward.kind='mlp'$",
        ),
        # Mixtures have it.
        ({"feed_forward": SwiGLU.Config(hidden_dim=8)}, "has attention.qk_norm='full' in a dense model$"),
        (
            {"dense_feed_forward": routed(), "dense_layers": (0,)},
            "no Hugging Face family has dense_feed_forward.kind='moe'; 'swiglu' can be exported",
        ),
    ],
)
def test_features_that_no_family_has(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        export_huggingface(tmp_path / "out", tiny(**changes).build())
    assert not list(tmp_path.iterdir())


def test_a_family_that_does_not_fit(tmp_path):
    model = tiny().build()
    with pytest.raises(
        CheckpointError, match=r"Hugging Face's mixtral has no attention.qk_norm='full', .*leave the family out"
    ):
        export_huggingface(tmp_path / "out", model, family="mixtral")
    with pytest.raises(CheckpointError, match=r"Hugging Face's llama has no feed_forward.kind='moe'"):
        export_huggingface(tmp_path / "out", model, family="llama")
    with pytest.raises(ConfigError, match=r"family is 'gpt2'; it must be one of: llama, qwen2, qwen3, mistral, olmoe"):
        export_huggingface(tmp_path / "out", model, family="gpt2")


def test_convert_refuses_what_it_does_not_know(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"to is 'onnx'; it must be 'native' or 'huggingface'"):
        convert(folder, tmp_path / "out", "onnx")
    with pytest.raises(CheckpointError, match="no model at"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a saved model"):
        convert(folder, tmp_path / "home")


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_a_failed_conversion_leaves_nothing(tmp_path, folder, to, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ByteTokenizer, "save", fail)
    with pytest.raises(Exception, match="no room left on disk"):
        convert(folder, tmp_path / "out", to)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def rexmoe(reuse, **changes):
    return tiny(num_layers=4, feed_forward=ReXMoE.Config(num_experts=4, hidden_dim=8, reuse=reuse, **changes))


def count_of(config):
    return config.count().parameters


def test_rexmoe_keeps_one_copy_natively_and_is_expanded_for_others(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    model = rexmoe(2).build(seed=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    save_model(tmp_path / "native", model)
    names = load_file(tmp_path / "native/model.safetensors")
    assert [name for name in names if "w13" in name] == ["shared.experts_0.w13", "shared.experts_1.w13"]
    token_BL = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model(token_BL).logits_BLV
        again = load_model(tmp_path / "native")[0].eval()
        torch.testing.assert_close(again(token_BL).logits_BLV, expected, rtol=0, atol=0)
        convert(tmp_path / "native", tmp_path / "out", "huggingface")
        few, many = (count_of(load_config(tmp_path / name)) for name in ("native", "out"))
        assert (
            f"each gets its own copy ({few:,} parameters become {many:,}), and nothing shares them again" in caplog.text
        )
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert (theirs.config.model_type, theirs.config.num_experts) == ("olmoe", 8)
        torch.testing.assert_close(theirs(token_BL).logits, expected, rtol=1e-4, atol=1e-4)


def test_every_function_that_an_error_points_to_exists():
    configs = [resolve(family, kind).Config() for family in ("feed_forward", "score") for kind in kinds(family)]
    said = [f"{part.advice} {part.hint}" for config in configs for part in config.conversions()]
    names = set(re.findall(r"\b(?:experts|adapters|depth)(?:\.\w+){2,}", " ".join(said)))
    assert names == {"experts.rexmoe.from_vanilla", "experts.chain.from_moe", "experts.rmoe.to_recurrent"}
    for name in names:
        assert callable(pkgutil.resolve_name(f"anabranch.{name}"))


class Folded(SwiGLU, kind="folded"):
    """A design that no loader knows, which says itself what its weights depend on."""

    @configclass
    class Config(SwiGLU.Config):
        folds: int = 2

        def conversions(self):
            return (WeightField("folds", self.folds, "unfold it by hand", plain=1),)

        def expand_decoder(self, model):
            plain = model.config.replace(feed_forward=SwiGLU.Config(hidden_dim=self.hidden_dim)).build()
            plain.load_state_dict(model.state_dict())
            return plain


def test_a_design_says_itself_what_converts_it(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILTIN["feed_forward"], "folded", f"{__name__}:Folded")
    ours, plain = (
        tiny(feed_forward=kind(hidden_dim=8), attention=SelfAttention.Config(num_heads=2))
        for kind in (Folded.Config, SwiGLU.Config)
    )
    save_model(tmp_path / "plain", plain.build())
    with pytest.raises(CheckpointError, match=r"plain has folds=1, the model folds=2; unfold it by hand$"):
        load_weights(ours.build(), tmp_path / "plain")
    save_model(tmp_path / "ours", ours.build())
    with pytest.raises(CheckpointError, match=r"ours has folds=2, the model folds=1; unfold it by hand$"):
        load_weights(plain.build(), tmp_path / "ours")
    export_huggingface(tmp_path / "theirs", ours.build())
    assert load_config(tmp_path / "theirs").feed_forward == SwiGLU.Config(hidden_dim=8)


def test_kinds_of_scores_that_nothing_converts_are_told(tmp_path):
    save_model(
        tmp_path / "cosine", tiny(feed_forward=MoE.Config(router=Router.Config(score=CosineScore.Config()))).build()
    )
    with pytest.raises(CheckpointError, match=r"cosine has router=cosine, the model router=linear$"):
        load_weights(tiny(feed_forward=MoE.Config()).build(), tmp_path / "cosine")


def test_another_reuse_factor(tmp_path):
    save_model(tmp_path / "m", rexmoe(2).build())
    with pytest.raises(
        CheckpointError, match=r"m has reuse=2, the model reuse=4; grow a plain model with experts.rexmoe.from_vanilla"
    ):
        load_weights(rexmoe(4).build(), tmp_path / "m")
    table = json.loads((tmp_path / "m/config.json").read_text())
    table["model"]["feed_forward"]["reuse"] = 4
    (tmp_path / "m/config.json").write_text(json.dumps(table))
    with pytest.raises(
        CheckpointError, match=r"the config says reuse=4: to change the reuse factor use experts.rexmoe.from_vanilla"
    ):
        load_model(tmp_path / "m")
    table["model"]["feed_forward"]["reuse"] = 1
    (tmp_path / "m/config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"lacks .*the config says reuse=1"):
        load_model(tmp_path / "m")
