import pytest
import torch

from anabranch import presets
from anabranch.config import from_dict, to_dict
from anabranch.errors import ConfigError
from anabranch.experts.rexmoe import ProgressiveScaling
from anabranch.studies.compare import comparison
from anabranch.train import RunConfig


@pytest.mark.parametrize("size", presets.BUDGETS)
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_has_every_size(name, size):
    config = presets.find(name)(size)
    assert isinstance(config, RunConfig)
    assert from_dict(RunConfig, to_dict(config)) == config
    budget = presets.BUDGETS[size]
    assert (config.model.dim, config.model.num_layers) == (budget.dim, budget.num_layers)
    assert config.data.sequence_length == budget.sequence_length


@pytest.mark.parametrize("size", presets.BUDGETS)
def test_designs_of_one_size_do_the_same_work_per_token(size):
    configs = {name: presets.find(name)(size).model for name in presets.PRESETS}
    # What adapters add is beside the work of their model.
    configs = {name: config for name, config in configs.items() if not config.linears}
    counts = {name: config.count(256) for name, config in configs.items() if config.streams is None}
    for name, count in counts.items():
        assert count.active == pytest.approx(counts["moe"].active, rel=0.025), name  # they differ by their routers only
        if name not in ("dense", "duo", "versatile"):  # which have no experts
            assert count.parameters == pytest.approx(counts["moe"].parameters, rel=0.01), name


@pytest.mark.parametrize("size", presets.BUDGETS)
@pytest.mark.parametrize("name", ["dynmole", "lora-mixer"])
def test_adapters_are_few_numbers_beside_the_dense_model(name, size):
    config, dense = presets.find(name)(size).model, presets.find("dense")(size).model
    assert config.replace(linears={}) == dense
    added = config.count().parameters - dense.count().parameters
    assert 0.02 < added / dense.count().parameters < 0.6


@pytest.mark.parametrize("size", presets.BUDGETS)
def test_streams_do_the_work_of_the_dense_model_several_times(size):
    config = presets.find("parscale")(size).model
    assert config.replace(streams=None) == presets.find("dense")(size).model
    times = config.count(256).flops / config.replace(streams=None).count(256).flops
    assert 0.75 * config.streams.num_streams < times < 1.1 * config.streams.num_streams  # the head works once


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_tiny_preset_builds_and_learns(name):
    config = presets.find(name)("tiny")
    model = config.model.build(seed=0)
    token_BL = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    output = model(token_BL[:, :-1], token_BL[:, 1:])
    output.loss.backward()
    assert 5.0 < float(output.cross_entropy) < 6.5  # ln 257 = 5.55
    assert sum(float(loss) for loss in output.auxiliary.values()) < (1.3 if name == "lora-mixer" else 0.9)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.model.count().parameters


def test_what_makes_each_design():
    find = {name: presets.find(name)("tiny").model.feed_forward for name in presets.PRESETS}
    assert find["rexmoe"].reuse == 2
    assert find["rexmoe-r4"].reuse == 4
    assert find["rexmoe"].psr is find["rexmoe-r4"].psr is None
    assert find["rexmoe-psr"] == find["rexmoe"].replace(psr=ProgressiveScaling.Config())
    assert find["rexmoe-open"] == find["rexmoe"]
    assert (find["rmoe"].router.score.owner.kind, find["rmoe"].router.score.state_dim) == ("recurrent", 16)
    assert (find["chain"].iterations, find["chain"].num_choices, find["chain"].router.select.normalize) == (
        2,
        1,
        "none",
    )
    assert find["demo"].psr.mask == "local_first"
    assert find["moe-fine"].num_experts == 32
    assert find["moe-fine"].router.select.top_k == 8
    assert find["moe-shared"].shared_experts == 1
    assert find["moe-shared"].num_choices + find["moe-shared"].shared_experts == find["moe"].num_choices
    assert find["moe-lossfree"].router.score.activation == "sigmoid"


def test_descriptions_are_one_sentence():
    for name in presets.names():
        assert presets.describe(name).endswith("."), name
        assert len(presets.describe(name)) < 120, name


def test_unknown_preset_and_size():
    with pytest.raises(ConfigError, match=r"^no preset 'rexmo'; did you mean 'rexmoe'\?$"):
        presets.find("rexmo")
    with pytest.raises(ConfigError, match=r"^no preset 'quite else'; known: demo, dense, moe, "):
        presets.find("quite else")
    with pytest.raises(ConfigError, match=r"^size is 'huge'; use one of tiny, small, base$"):
        presets.demo("huge")


def test_a_size_names_the_demo_of_that_size():
    assert presets.find("small")("tiny") == presets.demo("small") != presets.demo("tiny")
    assert presets.find("tiny")() == presets.demo("tiny")
    assert presets.describe("base") == presets.describe("demo")
    with pytest.raises(ConfigError, match="preset 'demo' with --size base"):
        presets.find("small")("base")


def test_installed_preset_is_found(monkeypatch):
    class Point:
        name = "mine"

        def load(self):
            return presets.moe

    monkeypatch.setattr(
        presets,
        "entry_points",
        lambda group, name="mine": [Point()] if (group, name) == ("anabranch.presets", "mine") else [],
    )
    assert presets.find("mine") is presets.moe
    assert presets.names()[-1] == "mine"


def test_language_model_reads_the_vocabulary_of_its_tokenizer():
    from anabranch.data import BpeTokenizer
    from anabranch.nn.feed_forward import SwiGLU

    config = presets.language_model(SwiGLU.Config(), tokenizer=BpeTokenizer.Config(vocab_size=1000))
    assert config.model.vocab_size == 1000
    assert presets.language_model(SwiGLU.Config()).model.vocab_size == 257


@pytest.mark.parametrize("name", presets.GROUPS)
def test_groups_name_presets_of_one_budget(name):
    members = presets.group(name)
    assert len(set(members)) == len(members) > 1
    comparison({member: presets.find(member)("tiny") for member in members}, seeds=(0,))  # raises where budgets differ


def test_unknown_group():
    with pytest.raises(ConfigError, match="no group of presets 'famly'; known: family"):
        presets.group("famly")
