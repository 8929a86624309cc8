"""Stages of a decoder learn as one process does: GPipe in the trainer."""

import shutil
from ast import literal_eval

import pytest

from anabranch.errors import ConfigError
from anabranch.lm import load_model
from anabranch.routing import BiasBalancer, SwitchLoss, ZLoss
from anabranch.train import Trainer, checkpoints, read_metrics, read_run_config
from anabranch.train.config import Parallel
from ranks import run_ranks

TRAIN = """
from anabranch.train import Trainer, read_run_config
for name in {names}:
    trainer = Trainer(read_run_config("{folder}/" + name + ".config"), "{folder}/" + name)
    result = trainer.fit()
    learned = [name for name, parameter in trainer.model.named_parameters() if parameter in trainer.optimizer.state]
    print(repr((name, result.status, result.bits_per_byte, learned)))
"""

RESUME = """
from anabranch.train import Trainer, read_run_config
from anabranch.train.config import Parallel
config = read_run_config("{folder}")
config = config.replace(train=config.train.replace(steps=8, accumulation=1), parallel=Parallel(pipeline=2, micro_batches=2))
Trainer(config, "{folder}", resume=True).fit()
"""

RESUME_SHARED = """
from anabranch.train import Trainer, read_run_config
from anabranch.train.config import Parallel
config = read_run_config("{folder}")
train = config.train.replace(steps=8, accumulation=1, parallel="fsdp")
config = config.replace(train=train, parallel=Parallel(pipeline=2, micro_batches=1, experts=2))
Trainer(config, "{folder}", resume=True).fit()
"""


@pytest.fixture
def config(make_run, balanced_model):
    # Losses of a micro-batch, and a bias that is moved by the loads of all.
    run = make_run(balanced_model(SwitchLoss.Config(), ZLoss.Config(), BiasBalancer.Config()))
    return run.replace(train=run.train.replace(accumulation=2))


def assert_same_curve(one, two, tolerance):
    ours, theirs = read_metrics(one), read_metrics(two)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["kind"] == other["kind"]
        if mine["kind"] == "validation":
            assert mine["nats_per_token"] == pytest.approx(other["nats_per_token"], abs=tolerance)
            continue
        assert mine["loss"] == pytest.approx(other["loss"], abs=tolerance)
        assert mine["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
        assert mine["auxiliary"] == pytest.approx(other["auxiliary"], rel=1e-3)


def save(config, folder, name, **changes):
    train, parallel = changes.get("train", {}), changes.get("parallel", {})
    place = folder / f"{name}.config"
    place.mkdir()
    settings = config.train.replace(**{"accumulation": 1, **train})
    config.replace(train=settings, parallel=Parallel(**parallel)).save(place)


def test_two_stages_learn_as_one_process_does(tmp_path, config):
    # The head is the embedding, which the first and the last stage have both.
    config = config.replace(model=config.model.replace(tie_embeddings=True))
    Trainer(config, tmp_path / "one").fit()
    save(config, tmp_path, "two", parallel={"pipeline": 2, "micro_batches": 2}, train={"recompute": True})
    save(config, tmp_path, "turns", parallel={"pipeline": 2, "micro_batches": 2, "schedule": "interleaved"})
    printed = run_ranks(TRAIN.format(names=("two", "turns"), folder=tmp_path))
    (first, turns), (second, others) = (map(literal_eval, one.splitlines()) for one in printed)
    assert first[:3] == second[:3]
    assert set(turns[3]) | set(others[3]) == set(first[3]) | set(second[3])
    # Each stage has every other part: the first one has a block behind one of the second.
    blocks = [
        {int(name.split(".")[1]) for name in each if name.startswith("blocks.")} for each in (turns[3], others[3])
    ]
    assert max(blocks[0]) > min(blocks[1])
    assert_same_curve(tmp_path / "one", tmp_path / "turns", 2e-5)
    # Each has the moments of its own stage's parameters.
    names = {name for name, _ in config.model.build().named_parameters()}
    assert set(first[3]) | set(second[3]) == names
    assert set(first[3]) & set(second[3]) == {"embedding.weight"}
    assert first[3]
    assert second[3]
    assert_same_curve(tmp_path / "one", tmp_path / "two", 2e-5)
    assert load_model(tmp_path / "two")[0].state_dict().keys() == load_model(tmp_path / "one")[0].state_dict().keys()


@pytest.mark.slow
def test_stages_that_keep_activations_and_stages_that_go_on_with_what_one_wrote(tmp_path, config):
    for name in ("one", "other"):
        Trainer(config, tmp_path / name).fit()
    save(config, tmp_path, "kept", parallel={"pipeline": 2, "micro_batches": 2})
    run_ranks(TRAIN.format(names=("kept",), folder=tmp_path))
    assert_same_curve(tmp_path / "one", tmp_path / "kept", 2e-5)
    longer = config.replace(train=config.train.replace(steps=8))
    for name in ("one", "kept"):
        Trainer(longer, tmp_path / name, resume=True).fit()
    assert_same_curve(tmp_path / "one", tmp_path / "kept", 5e-5)
    run_ranks(RESUME.format(folder=tmp_path / "other"))
    assert checkpoints(tmp_path / "other")[-1].name == "step-00000008"
    assert_same_curve(tmp_path / "one", tmp_path / "other", 5e-5)


# What two pipelines of two stages share beside the batch: train.parallel, and parallel.experts.
SHARED = {"batch": ("none", 1), "weights": ("fsdp", 1), "experts": ("ddp", 2), "both": ("fsdp", 2), "later": ("ddp", 2)}


@pytest.mark.slow
def test_two_pipelines_of_two_stages_share_a_batch_and_weights_and_experts(tmp_path, config):
    """What they wrote one process goes on with, and the reverse."""
    Trainer(config, tmp_path / "one").fit()
    for name, (parallel, experts) in SHARED.items():
        layout = {"pipeline": 2, "micro_batches": 1, "data": 2, "experts": experts}
        if name == "later":
            layout["schedule"] = "zero-bubble"
        save(config, tmp_path, name, parallel=layout, train={"parallel": parallel})
    ranks = run_ranks(TRAIN.format(names=(*SHARED,), folder=tmp_path), 4)
    for number, name in enumerate(SHARED):
        found = [literal_eval(printed.splitlines()[number]) for printed in ranks]
        assert len({each[:3] for each in found}) == 1
        assert found[0][3] == found[2][3] != found[1][3] == found[3][3]
        assert_same_curve(tmp_path / "one", tmp_path / name, 2e-5)
    longer = config.replace(train=config.train.replace(steps=8))
    for name in ("both", "one"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-alone")
        Trainer(longer, tmp_path / f"{name}-alone", resume=True).fit()
    assert_same_curve(tmp_path / "one-alone", tmp_path / "both-alone", 5e-5)
    run_ranks(RESUME_SHARED.format(folder=tmp_path / "one"), 4)
    assert checkpoints(tmp_path / "one")[-1].name == "step-00000008"
    assert_same_curve(tmp_path / "one-alone", tmp_path / "one", 5e-5)


@pytest.mark.parametrize(
    ("parallel", "train", "message"),
    [
        ({"pipeline": 2}, {}, "parallel.pipeline is 2; start it with torchrun"),
        ({"pipeline": 2}, {"compile": True}, "parallel.pipeline is 2, and train.compile is set"),
        ({"pipeline": 2, "context": 2}, {}, "parallel.pipeline is 2, and parallel.context is set"),
        ({"data": 2}, {}, "parallel.data is 2; start it with torchrun"),
        (
            {"pipeline": 2, "schedule": "zero-bubble"},
            {"parallel": "fsdp"},
            "parallel.schedule is zero-bubble, and train",
        ),
        ({"visits": 3}, {}, "visits is 3, and schedule is 'gpipe', which makes one"),
    ],
)
def test_what_does_not_go_together_is_told(tmp_path, config, parallel, train, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(config.replace(train=config.train.replace(**train), parallel=Parallel(**parallel)), tmp_path / "run")


def test_models_that_cannot_be_cut_are_told(config):
    from anabranch.train.pipeline import check_cut
    from anabranch.train.pipeline_layers import layers_of

    model = config.model.build(seed=0)
    with pytest.raises(ConfigError, match=r"parallel\.pipeline is 99, and"):
        layers_of(model, 99)
    with pytest.raises(ConfigError, match=r"parallel\.pipeline is 2 and each stage has 3 parts of the model, and"):
        layers_of(model, 2, 3)
    whole = config.model.feed_forward.replace(
        router=config.model.feed_forward.router.replace(balance=(SwitchLoss.Config(scope="global_batch"),))
    )
    with pytest.raises(ConfigError, match="over the global batch"):
        check_cut(config.model.replace(feed_forward=whole).build(seed=0), "parallel.pipeline is 2")


def test_read_back(tmp_path, config):
    # A run in stages that goes on in one process keeps the number.
    Trainer(config.replace(parallel=Parallel(micro_batches=8)), tmp_path / "run").close()
    config.replace(parallel=Parallel(pipeline=4, micro_batches=8)).save(tmp_path)
    assert read_run_config(tmp_path).parallel == Parallel(pipeline=4, micro_batches=8)
