"""Adapters on other kinds of models and engines: latent attention, experts with a budget, paths, recorded routes."""

import copy

import pytest
import torch

from adapter_models import KINDS, LATENT, linear_layers, make_adapter, make_base, make_kind
from anabranch.adapters import load_peft
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.lm import load_model, save_model
from anabranch.serving import LLM, Sampling
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
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


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_lora_is_not_served_for_some_rows_alone(tmp_path, kind):
    base = make_base(tmp_path / "base", "llama")
    make_kind(tmp_path / kind, kind, base)
    config = ServingConfig(**SMALL, adapters=AdaptersConfig(load=(f"it={tmp_path / kind}",)))
    with pytest.raises(
        ConfigError, match=r"is (\w+|\w+ tuning), and requests choose among plain LoRA alone; serve a model that"
    ):
        Engine.of(load_model(tmp_path / "base")[0], config)
