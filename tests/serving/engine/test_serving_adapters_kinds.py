"""Adapters on other kinds of models and engines: latent attention, experts with a budget, paths, recorded routes."""

import copy
import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_models import LATENT, drawn, linear_layers, make_adapter, make_base, make_kind, stacked
from anabranch.adapters import load_peft
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.lm import load_model, save_model
from anabranch.nn import ExpertPool
from anabranch.nn.quantize import QuantizedPool, quantize
from anabranch.serving import LLM, Sampling
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine import ModelRunner
from anabranch.serving.engine.adapter_parts import Factors, PartRows
from anabranch.serving.engine.adapter_place import folder_of, size_of
from anabranch.serving.engine.engine import Engine
from served_adapters import ATTENTION, Runs, layers_of, make_model, scores

SMALL = {"num_blocks": 100, "block_tokens": 4, "dtype": "float32"}
GREEDY = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT, OTHER = tuple(range(3, 24)), tuple(range(40, 52))


def test_latent_attention(tmp_path):
    base = make_base(tmp_path / "base", "deepseek_v2")
    for name, words in (("a", LATENT[:3]), ("kv", LATENT)):
        make_adapter(tmp_path / name, linear_layers(base, words), target_modules=words)
    model = load_model(tmp_path / "base")[0]

    def engine_of(name):
        config = ServingConfig(**SMALL, adapters=AdaptersConfig(load=(f"{name}={tmp_path / name}",)))
        return Engine.of(copy.deepcopy(model), config)

    runs = Runs(engine_of("a"))
    outputs = runs([(None, PROMPT), ("a", PROMPT), ("a", OTHER)], max_tokens=1)
    wanted = load_peft(tmp_path / "a", copy.deepcopy(model))(torch.tensor([PROMPT])).logits_BLV.log_softmax(-1)[0]
    found = [told.logprob for told in outputs[1].prompt_logprobs]
    assert found == pytest.approx([float(wanted[at, token]) for at, token in enumerate(PROMPT[1:])], abs=2e-5)
    assert scores(outputs[0]) != pytest.approx(scores(outputs[1]), abs=1e-2)
    # It is multiplied with what other layers hold: of the rows of a step it knows nothing.
    with pytest.raises(ConfigError, match="computed with as a matrix of all rows"):
        engine_of("kv")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """(folder of a mixture of experts, of an adapter)."""
    root = tmp_path_factory.mktemp("mixture")
    save_model(root / "model", make_model(is_moe=True), ByteTokenizer())
    make_adapter(root / "a", layers_of(ATTENTION), seed="a", rank=3)
    return str(root / "model"), str(root / "a")


@pytest.mark.parametrize("more", [{}, {"quantize": "int8"}], ids=["floats", "int8"])
def test_experts_with_a_budget(mixture, more):
    model, adapter = mixture
    options = {**SMALL, **more, "adapters": AdaptersConfig(load=(f"a={adapter}",))}
    prompts, found = [PROMPT, OTHER], []
    for budget in (None, "72KiB"):
        llm = LLM(model, **options, expert_budget=budget)
        found.append([answer.tokens for name in (None, "a") for answer in llm.generate(prompts, GREEDY, adapters=name)])
        runs = Runs(llm.engine)
        together = runs([(None, PROMPT), ("a", PROMPT), ("a", OTHER)])
        assert [output.tokens for output in together] == [found[-1][0], found[-1][2], found[-1][3]]
        llm.close()
    assert found[0] == found[1]
    assert found[0][:2] != found[0][2:]


def test_routes_are_recorded_and_paths_are_run(mixture):
    model, adapter = mixture
    config = ServingConfig(**SMALL, max_depth=3, adapters=AdaptersConfig(load=(f"a={adapter}",)))
    runs = Runs(Engine.of(load_model(model)[0], config))
    asked = [(None, PROMPT), ("a", PROMPT), ("a", OTHER)]
    outputs = runs(asked, record_routing=True)
    assert [len(output.routing) for output in outputs] == [8, 8, 8]
    assert all(len(set(chosen)) == 2 for output in outputs for route in output.routing for chosen in route.values())
    assert outputs[0].routing != outputs[1].routing
    ids = [runs.put(*one, path=path) for one in asked for path in (None, (0, 1, 1))]
    found = runs.outputs()
    together = [found[id] for id in ids]
    assert [output.tokens for output in together[::2]] == [output.tokens for output in outputs]
    for number, one in enumerate(asked):
        [alone] = runs([one], path=(0, 1, 1))
        assert together[2 * number + 1].tokens == alone.tokens != outputs[number].tokens


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_not_served_for_some_rows_alone(tmp_path, kind):
    base = make_base(tmp_path / "base", "llama")
    make_kind(tmp_path / kind, kind, base)
    with pytest.raises(ConfigError, match=r"is \w+ tuning, which no request can have for itself; .* adapters fuse"):
        engine_with(load_model(tmp_path / "base")[0], tmp_path, kind)


def engine_with(model, root, *names, **options):
    load = tuple(f"{name}={root / name}" for name in names)
    return Runs(
        Engine.of(copy.deepcopy(model), ServingConfig(**{**SMALL, **options}, adapters=AdaptersConfig(load=load)))
    )


def prompt_scores(model, prompt):
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits_BLV.log_softmax(-1)[0]
    return [float(wanted[at, token]) for at, token in enumerate(prompt[1:])]


@pytest.mark.parametrize("family", ["llama", "qwen2", "int8", "olmoe"])
def test_rows_of_dora_and_ia3_are_as_alone_and_as_the_model_with_them(tmp_path, family):
    """In one batch with LoRA, with mixtures and with the base; each as `load_peft` makes it."""
    base = make_base(tmp_path / "base", "llama" if family == "int8" else family)
    for kind in ("dora", "ia3"):
        make_kind(tmp_path / kind, kind, base, seed=kind)
    make_adapter(tmp_path / "lora", linear_layers(base, ["q_proj", "o_proj"]), seed="lora")
    model = load_model(tmp_path / "base")[0].eval()
    if family == "int8":
        quantize(model, "int8")
    runs = engine_with(model, tmp_path, "dora", "ia3", "lora")
    asked = [
        (adapters, prompt)
        for adapters in ("dora", "ia3", None, "lora", {"dora": 0.5, "ia3": -0.25, "lora": 1.0})
        for prompt in (PROMPT, OTHER)
    ]
    together = runs(asked, max_tokens=4)
    one_by_one = engine_with(model, tmp_path, "dora", "ia3", "lora", prefix_cache=False)
    for one, output in zip(asked, together, strict=True):
        [alone] = one_by_one([one], max_tokens=4)
        assert output.tokens == alone.tokens
        assert scores(output) == pytest.approx(scores(alone), abs=1e-5)
    for kind in ("dora", "ia3", "lora"):
        wanted = prompt_scores(load_peft(tmp_path / kind, copy.deepcopy(model)), PROMPT)
        [output] = one_by_one([(kind, PROMPT)], max_tokens=1)
        assert [told.logprob for told in output.prompt_logprobs] == pytest.approx(wanted, abs=2e-5)
    # A sum of what they add, as of LoRA.
    [half] = one_by_one([({"ia3": 1e-3}, PROMPT)], max_tokens=1)
    [none] = one_by_one([(None, PROMPT)], max_tokens=1)
    assert scores(half) != scores(none)
    assert scores(half)[:-1] == pytest.approx(scores(none)[:-1], abs=0.1)


def test_versions_know_scales_and_what_is_multiplied(tmp_path):
    """Equal numbers with another alpha, or at the other side of a square matrix, are other adapters to the prefix cache."""
    base = make_base(tmp_path / "base", "llama")
    layers = linear_layers(base, ["q_proj"])
    for name, table in (("a", {}), ("again", {}), ("alpha", {"lora_alpha": 9})):
        make_adapter(tmp_path / name, layers, **table)
    for name, words in (("outputs", []), ("inputs", ["q_proj"])):
        make_kind(tmp_path / name, "ia3", base, words=["q_proj"], feedforward_modules=words)
        ones = load_file(tmp_path / name / "adapter_model.safetensors")
        ones = {key: torch.full((1, 32) if words else (32, 1), 1.5) for key in ones}
        save_file(ones, tmp_path / name / "adapter_model.safetensors")
    names = ("a", "again", "alpha", "outputs", "inputs")
    runs = engine_with(load_model(tmp_path / "base")[0], tmp_path, *names)
    version = {facts["name"]: facts["version"] for facts in runs.engine.adapters.shelf.facts()}
    assert version["a"] == version["again"]
    assert len(set(version.values())) == 4


def test_what_factors_add_by_hand():
    """To what a matrix makes: of its outputs, and of its inputs."""
    rows = PartRows(torch.randn(3, 4), lambda: torch.full((3, 2), 2.0), lambda x: x[:, :2] * 10)
    own = Factors(torch.tensor([3.0, 0.5]), False)
    assert own.added(rows).tolist() == [[4.0, -1.0]] * 3
    own = Factors(torch.tensor([1.0, 2.0, 3.0, 4.0]), True)
    torch.testing.assert_close(own.added(rows), rows.x_MC[:, :2] * torch.tensor([10.0, 20.0]) - 2)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_adapters_of_the_head_as_peft_writes_them(tmp_path, family):
    """With a copy of the base's head, which takes no memory; of any other the reason is told."""
    base = make_base(tmp_path / "base", family)
    head = base.get("lm_head.weight", base["model.embed_tokens.weight"])
    copied = {"lm_head.base_layer.weight": head.clone()}
    layers = {**linear_layers(base, ["q_proj"]), "lm_head": (32, 61)}
    make_adapter(tmp_path / "a", layers, extra=copied)
    lengths = {"lm_head.lora_magnitude_vector": drawn("m", (61,)) + 2}
    make_adapter(tmp_path / "d", {"lm_head": (32, 61)}, extra={**copied, **lengths}, use_dora=True)
    make_adapter(tmp_path / "other", layers, extra={"lm_head.base_layer.weight": drawn("other", (61, 32))})
    model = load_model(tmp_path / "base")[0].eval()
    config = ServingConfig(**SMALL, adapters=AdaptersConfig(load=tuple(f"{name}={tmp_path / name}" for name in "ad")))
    for takes in (False, True):
        runs = Runs(Engine.of(copy.deepcopy(model), config, takes_weights=takes))
        together = runs([("a", PROMPT), (None, PROMPT), ("d", PROMPT)], max_tokens=1)
        for name, output in zip("ad", together[::2], strict=True):
            wanted = prompt_scores(load_peft(tmp_path / name, copy.deepcopy(model)), PROMPT)
            assert [told.logprob for told in output.prompt_logprobs] == pytest.approx(wanted, abs=2e-5)
        shelf = runs.engine.adapters.shelf
        facts = {one["name"]: one["bytes"] for one in shelf.facts()}
        assert facts["a"] == sum(4 * 4 * sum(sizes) for sizes in layers.values())
        with pytest.raises(
            ConfigError, match=r"brings lm_head\.weight whole, with other numbers than the model's, which"
        ):
            shelf.load_now("other", str(tmp_path / "other"))


def test_memory_is_not_asked_for_a_copy_of_the_head(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    extra = {"lm_head.base_layer.weight": base["lm_head.weight"].clone()}
    make_adapter(tmp_path / "a", {"lm_head": (32, 61)}, extra=extra)
    held, whole = 4 * 4 * (32 + 61), 4 * (4 * (32 + 61) + 61 * 32)
    found = folder_of(str(tmp_path / "a"), None)
    assert size_of(found, 4, (61, 32)) == held
    assert size_of(found, 4, (60, 32)) == size_of(found) == whole
    config = ServingConfig(**SMALL, adapters=AdaptersConfig(load=(f"a={tmp_path / 'a'}",), memory=f"{held}B"))
    Engine.of(load_model(tmp_path / "base")[0], config)


def test_factors_of_what_the_head_gets_are_refused(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    make_kind(tmp_path / "it", "ia3", {"lm_head.weight": base["lm_head.weight"]}, words=["lm_head"])
    tensors = load_file(tmp_path / "it" / "adapter_model.safetensors")
    tensors = {name: torch.ones(1, 32) for name in tensors}
    save_file(tensors, tmp_path / "it" / "adapter_model.safetensors")
    path = tmp_path / "it" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "feedforward_modules": ["lm_head"]}))
    with pytest.raises(ConfigError, match="multiplies what goes into the head, which all requests share"):
        engine_with(load_model(tmp_path / "base")[0], tmp_path, "it")


def test_a_row_without_length_has_no_dora(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    make_kind(tmp_path / "it", "dora", base)
    tensors = load_file(tmp_path / "it" / "adapter_model.safetensors")
    tensors = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "it" / "adapter_model.safetensors")
    model = load_model(tmp_path / "base")[0]
    with torch.no_grad():
        model.blocks[1].attention.out.weight[3] = 0
    with pytest.raises(ConfigError, match=r"it adapts blocks\.1\.attention\.o: a row of the matrix .* has no length"):
        engine_with(model, tmp_path, "it")


@pytest.mark.parametrize("kind", ["compiled", "modules", "int8"])
def test_adapters_of_experts_are_served_row_by_row(tmp_path, kind):
    """Of single experts, and of all of a layer that peft saw as one tensor."""
    model = make_model(is_moe=True)
    one = "model.layers.1.mlp.experts.2.up_proj"
    layers = {one: (64, 32), **layers_of(("self_attn.q_proj",))}
    make_adapter(tmp_path / "one", layers, target_modules=[one, "q_proj"])
    both = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    make_adapter(tmp_path / "all", {}, extra=stacked([0, 1], dim=64, hidden=32), rank=3, **both)
    if kind == "int8":
        quantize(model, "int8")
    make = (
        {"make_runner": functools.partial(ModelRunner, use_kernel=False)}
        if kind == "modules"
        else {"takes_weights": True}
    )
    make_adapter(tmp_path / "none", layers_of(ATTENTION), seed="none")
    load = tuple(f"{name}={tmp_path / name}" for name in ("one", "all", "none"))
    config = ServingConfig(**SMALL, adapters=AdaptersConfig(load=load))
    runs = Runs(Engine.of(copy.deepcopy(model), config, **make))
    pool = runs.engine.runner.model.blocks[0].feed_forward.experts
    assert isinstance(pool, ExpertPool if kind == "modules" else QuantizedPool)
    names = ("one", None, "all", {"one": 2.0, "all": 0.5}, "none")
    asked = [(name, prompt) for name in names for prompt in (PROMPT, OTHER)]
    together = runs(asked, max_tokens=4)
    one_by_one = Runs(Engine.of(copy.deepcopy(model), config.replace(prefix_cache=False), **make))
    for each, output in zip(asked, together, strict=True):
        [alone] = one_by_one([each], max_tokens=4)
        assert output.tokens == alone.tokens
        assert scores(output) == pytest.approx(scores(alone), abs=1e-5)
    # Beside rows that have none of experts.
    few = [asked[4], asked[-1]]
    for each, output in zip(few, one_by_one(few, max_tokens=4), strict=True):
        assert scores(output) == pytest.approx(scores(together[asked.index(each)]), abs=1e-5)
    if kind == "int8":
        return
    for number, name in ((0, "one"), (4, "all")):
        wanted = prompt_scores(load_peft(tmp_path / name, copy.deepcopy(model)), PROMPT)
        assert [told.logprob for told in together[number].prompt_logprobs] == pytest.approx(wanted, abs=2e-5)


def test_experts_that_are_not_all_in_memory_take_no_adapters(tmp_path):
    save_model(tmp_path / "model", make_model(is_moe=True), ByteTokenizer())
    name = "model.layers.0.mlp.experts.1.up_proj"
    make_adapter(tmp_path / "one", {name: (64, 32)}, target_modules=[name])
    options = {**SMALL, "adapters": AdaptersConfig(load=(f"a={tmp_path / 'one'}",))}
    with pytest.raises(ConfigError, match=r"adapts experts .* which this engine has not whole in its memory"):
        LLM(str(tmp_path / "model"), **options, expert_budget="72KiB")
    LLM(str(tmp_path / "model"), **options).close()


def test_experts_have_plain_lora_alone(tmp_path):
    base = make_base(tmp_path / "base", "olmoe")
    make_kind(tmp_path / "it", "dora", base, words=["down_proj"])
    with pytest.raises(ConfigError, match=r"it is DoRA and adapts blocks.*; experts are served with plain LoRA alone"):
        engine_with(load_model(tmp_path / "base")[0], tmp_path, "it")
