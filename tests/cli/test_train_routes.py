"""``anabranch train --labels``: routers of a duo model learn an oracle's routes, by command; the run goes on, and is a model."""

import json

import pytest
import torch

from anabranch.cli.corpora import run_of
from anabranch.data import ByteTokenizer
from anabranch.depth.duo_llm import DuoFFN, LabelledRoutes, RouteLabels, train_router, with_router
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import MoE, SelfAttention
from anabranch.train import RunConfig, TaskRunConfig, read_metrics, read_task_run_config

# One rate and one temperature, whatever the number of steps.
FIXED = ("train.schedule={kind = 'constant', warmup = 0}", "model.feed_forward.router.score.kind=tempered")
FIXED += ("model.feed_forward.router.score.temperature.until=1e-9", "model.feed_forward.router.select.kind=mixture")
SETTINGS = ["--set", "train.batch_size=4", "--set", "train.learning_rate=0.01"]


def save(folder, feed_forward, **changes):
    sizes = {"dim": 16, "num_layers": 2, "max_positions": 64, "init_std": 0.3, **changes}
    config = Decoder.Config(attention=SelfAttention.Config(num_heads=2), feed_forward=feed_forward, **sizes)
    model = config.build(seed=0)
    save_model(folder, model, ByteTokenizer())
    return model


@pytest.fixture
def material(tmp_path, monkeypatch):
    """A model in ``duo``, and random labels for it in ``labels.jsonl``."""
    monkeypatch.chdir(tmp_path)
    model = save("duo", DuoFFN.Config(big=32, small=4))
    draw = torch.Generator().manual_seed(0)
    ids, route = torch.randint(257, (6, 9), generator=draw), torch.randint(2, (6, 8, 2), generator=draw)
    labels = RouteLabels(ids, route, 1, "exact")
    labels.write("labels.jsonl")
    return model, labels


def line(out, *more):
    return ["train", "--out", out, "--from", "duo", "--labels", "labels.jsonl", "--quiet", *SETTINGS, *more]


def test_it_is_the_run_of_the_library_and_its_model_is_one_like_others(here, material):
    model, labels = material
    code, out, err = here(*line("routed", "--steps", 3, "--json"))
    assert code == 0, err
    said = json.loads(out)
    assert (said["status"], said["step"], said["task"]) == ("finished", 3, "labelled_routes")
    assert said["agreement"] == read_metrics("routed")[-1]["agreement"]
    made, tokenizer = load_model("routed")
    assert isinstance(tokenizer, ByteTokenizer)
    run = RunConfig(model=model.config, train=read_task_run_config("routed").train)
    ours = train_router(model, run, "library", supervision="oracle", labels=labels)
    for name, value in ours.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name
    assert run_of("routed") is None  # the model that it began as is no run, so there is no text of it
    code, _, err = here("generate", "routed", "--prompt", "a", "--max-tokens", 2)
    assert code == 0, err


@pytest.mark.parametrize("again", ["resume", "auto"])
def test_a_run_goes_on_to_the_bit(here, material, again):
    fixed = [word for setting in FIXED for word in ("--set", setting)]
    for out, steps in (("whole", 4), ("parts", 2)):
        code, _, err = here(*line(out, "--steps", steps, *fixed))
        assert code == 0, err
    more = ["train", "--out", "parts", "--resume", "--steps", 4, "--quiet"]
    code, _, err = here(*(more if again == "resume" else line("parts", "--steps", 4, "--resume", "auto", *fixed)))
    assert code == 0, err
    (whole, _), (parts, tokenizer) = load_model("whole"), load_model("parts")
    assert isinstance(tokenizer, ByteTokenizer)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--set", "data.sequence_length=8"],
            "data.sequence_length is set, but model and text are those of --from and --labels",
        ),
        (["--set", "model.dim=8"], "model.dim is set, but model and text"),
        (["moe"], "--labels are for routers of duo models, and moe has 'moe' layers"),
        (["--labels", "nowhere.jsonl"], "nowhere.jsonl does not hold route labels"),
        (["--from", "moe"], "no 'duo' feed-forward layers"),
        (["--from", "deep"], "has routes over 2 duo layers, and the model has 3"),
        (["--from", "short"], "has sequences of 8 tokens, and the model reads 4"),
    ],
)
def test_what_does_not_fit_is_a_clear_line(here, material, more, said):
    save("moe", MoE.Config(num_experts=2, hidden_dim=8))
    duo = DuoFFN.Config(big=32, small=4)
    save("deep", duo, num_layers=3)
    save("short", duo, max_positions=4)
    code, _, err = here(*line("routed", "--steps", 1, *more))
    assert (code, err.count("\n")) == (2, 1), err
    assert said in err


def test_labels_without_a_model_and_another_model_than_before(here, material):
    code, _, err = here("train", "--out", "x", "--labels", "labels.jsonl", "--quiet")
    assert code == 2
    assert "--from is not given" in err
    assert here(*line("routed", "--steps", 1))[0] == 0
    save("other", DuoFFN.Config(big=32, small=4))
    code, _, err = here("train", "--out", "routed", "--resume", "--from", "other", "--steps", 2, "--quiet")
    assert code == 2
    assert "--from is 'other', but the run in routed began with" in err
    code, _, err = here("train", "--out", "routed", "--resume", "--set", "data.sequence_length=8", "--quiet")
    assert code == 2


def test_it_is_measured_on_the_text_of_the_run_that_it_began_as(material, tmp_path):
    model, _ = material
    base = RunConfig(model=model.config)
    task = LabelledRoutes.Config(model=with_router(model).config, labels="labels.jsonl", source=str(tmp_path / "base"))
    for name, config in (("base", base), ("routed", TaskRunConfig(task=task))):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        config.save(tmp_path / name)
    assert run_of("routed") == base


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "[" * 100_000,
        "[]",
        '{"ids": [1, 2]}',
        '{"ids": [1, 1e400], "label": [[1, 1]], "budget": 1, "bound": "exact"}',
        f'{{"ids": [1, {10**30}], "label": [[1, 1]], "budget": 1, "bound": "exact"}}',
        '{"ids": [1.5, 2.5], "label": [[1, 1]], "budget": 1, "bound": "exact"}',
        '{"ids": [1, 2], "label": [[1.0, 1.0]], "budget": 1, "bound": "exact"}',
        '{"ids": [1, 2], "label": [[]], "budget": 1, "bound": "exact"}',
        '{"ids": [1, 2], "label": [[1, 3]], "budget": 1, "bound": "exact"}',
        '{"ids": [1, 2, 3], "label": [[1, 1]], "budget": 1, "bound": "exact"}',
        '{"ids": [-1, 2], "label": [[1, 1]], "budget": 1, "bound": "exact"}',
    ],
)
def test_damaged_labels_are_one_line(here, material, tmp_path, text):
    (tmp_path / "labels.jsonl").write_text(text)
    code, _, err = here(*line("routed", "--steps", 1))
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert "labels.jsonl" in err
    assert not (tmp_path / "routed").exists()
