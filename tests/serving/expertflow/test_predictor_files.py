"""Files of predictors: what is damaged is one DataError that says what to do, and what is of another model is found out."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.lm import save_model
from anabranch.serving.expertflow import find_pools, offload
from anabranch.serving.expertflow.loading import load_offloaded
from anabranch.serving.expertflow.predictors import EncoderDecoder, Fingerprint, Frequency, load_predictor
from anabranch.serving.expertflow.predictors.base import Row, sketch
from anabranch.serving.expertflow.predictors.encdec import Settings
from anabranch.serving.expertflow.predictors.files import find_file, place_of
from anabranch.serving.expertflow.served import offload_options
from anabranch.serving.experts import ExpertsConfig
from expertflow_models import VOCAB, make_model

FINGERPRINT = Fingerprint((4, 6), (1, 2), "vocab:50", ((1.0, 0.5, -0.5, 0.0, 2.0),))
SMALL = Settings(dim=4, feed_forward=4, window=2, max_input=6, heads=2, depth=1)
NAME = "route-predictor.safetensors"


def made(kind: str) -> EncoderDecoder | Frequency:
    if kind == "encdec":
        return EncoderDecoder(FINGERPRINT, 50, SMALL)
    frequency = Frequency(FINGERPRINT, 50)
    frequency.prob_VLE = np.full((50, 2, 6), 0.25, np.float32)
    return frequency


def parts(kind: str, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(table, tensors) of a good file."""
    made(kind).save(folder / NAME)
    with safe_open(folder / NAME, framework="pt") as file:
        about = json.loads(file.metadata()["route_predictor"])
        return about, {name: file.get_tensor(name) for name in file.keys()}


def written(folder: Path, about: Any, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(
        {name: each.contiguous() for name, each in tensors.items()},
        folder / NAME,
        {"route_predictor": json.dumps(about)},
    )
    return folder / NAME


@pytest.fixture(scope="module", params=["encdec", "frequency"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, table, tensors)."""
    folder = tmp_path_factory.mktemp("predictor")
    return folder, *parts(request.param, folder)


def at(*path: str, value: Any) -> Any:
    def change(about: Any) -> Any:
        if not path:
            return value
        about = json.loads(json.dumps(about))
        inner = about
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        return about

    return change


@pytest.mark.parametrize(
    "change",
    [
        at("kind", value="zzz"),
        at("kind", value=[1]),
        at("kind", value="tlp"),
        at("settings", value={}),
        at("settings", value=[1]),
        at("settings", value={"config": "x"}),
        at("fingerprint", value=[1, 2]),
        at("fingerprint", "top_k", value=None),
        at("fingerprint", "top_k", value=[1]),
        at("fingerprint", "top_k", value=[1, 7]),
        at("fingerprint", "num_experts", value=[4, True]),
        at("fingerprint", "num_experts", value=[4, 10**30]),
        at("fingerprint", "num_experts", value=[4, 5]),
        at("fingerprint", "tokenizer", value=7),
        at("fingerprint", "routers", value=[[1.0]]),
        at("fingerprint", "routers", value=7),
        at("version", value=2),
        at("version", value=[1]),
        at(value=[1, 2]),
        at(value=None),
    ],
)
def test_a_damaged_table_is_refused_with_the_remedy(whole: Any, change: Any) -> None:
    folder, about, tensors = whole
    with pytest.raises(
        DataError, match=rf"{NAME} holds no route predictor: .*; delete it, or fit one again"
    ) as refused:
        load_predictor(written(folder, change(about), tensors))
    assert len(str(refused.value)) < 900


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda each: each * float("nan"), "no numbers"),
        (lambda each: each * 0 + 1e30, "no numbers, or beyond 10000"),
        (lambda each: each.half(), "stored as F16; it must be F32"),
        (lambda each: each.int(), "stored as I32"),
        (lambda each: each[:-1], "shape"),
        (lambda each: each[..., :1], "shape"),
        (lambda each: each[None], "shape"),
        (lambda each: each.new_empty(0), "shape"),
        (lambda each: each.new_ones(()), "shape"),
    ],
)
def test_damaged_weights_are_refused(whole: Any, change: Any, why: str) -> None:
    folder, about, tensors = whole
    with pytest.raises(DataError, match=why):
        load_predictor(written(folder, about, {name: change(each) for name, each in tensors.items()}))


def test_each_tensor_is_needed_and_no_other(whole: Any) -> None:
    folder, about, tensors = whole
    for name in tensors:
        with pytest.raises(DataError, match="holds no route predictor"):
            load_predictor(written(folder, about, {other: each for other, each in tensors.items() if other != name}))
    for extra in ("more", "encoder.7.up.weight", "config", "weight"):
        with pytest.raises(DataError, match="holds no route predictor"):
            load_predictor(written(folder, about, {**tensors, extra: torch.zeros(2)}))


@pytest.mark.parametrize("size", ["dim", "feed_forward", "depth", "heads", "window"])
@pytest.mark.parametrize("value", [1, 3, 60_000, 2**31 - 1, 2**70, -1, None, "4", 2.5, float("nan")])
def test_sizes_that_the_tensors_do_not_have_take_no_memory(size: str, value: Any, tmp_path: Path) -> None:
    about, tensors = parts("encdec", tmp_path)
    if value != about["settings"]["config"][size]:
        with pytest.raises(DataError, match="delete it"):
            load_predictor(written(tmp_path, at("settings", "config", size, value=value)(about), tensors))


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything in a JSON tree."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def mutated(value: Any, path: tuple, new: Any) -> Any:
    """A copy with ``new`` at ``path``; ``...`` takes what is there away."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = mutated(copy[path[0]], path[1:], new)
    return copy


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 60)
    | st.sampled_from([2**31, 2**63, 10**40])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["encdec", "frequency", "slp"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("config"), inner, max_size=3)
    ),
    max_leaves=4,
)
CHANGES = [
    lambda each: each.new_full(each.shape, float("nan")),
    lambda each: each * 1e30,
    lambda each: each.half(),
    lambda each: each.double(),
    lambda each: each[: len(each) // 2] if each.dim() else each,
    lambda each: each.flatten(),
    lambda each: each.new_zeros(3),
    lambda each: -each,
    lambda each: each * 9000,
    lambda each: each.to(torch.float8_e4m3fn),
    lambda each: each.bool(),
    lambda each: each.new_full(each.shape, 1e4),
]


@settings(max_examples=60)
@given(st.data())
def test_whatever_is_changed_it_is_refused_or_predicts(whole: Any, data: st.DataObject) -> None:
    folder, about, tensors = whole
    for _ in range(data.draw(st.integers(0, 2))):
        path = data.draw(st.sampled_from(places(about)))
        about = mutated(about, path, data.draw(JSON if not path else JSON | st.just(...)))
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        tensors = {**tensors, name: data.draw(st.sampled_from(CHANGES))(tensors[name])}
    try:
        predictor = load_predictor(written(folder, about, tensors))
    except DataError as error:
        assert str(error).endswith("; delete it, or fit one again (anabranch experts fit-predictor)")  # noqa: PT017
        return
    ids = np.array([1, 49, 50, 3], np.int32)
    prob_TLE = predictor.predict(ids, [Row("a", ids, 4, 4)])
    sizes = predictor.fingerprint.num_experts
    assert prob_TLE.shape == (4, len(sizes), max(sizes))
    assert ((prob_TLE >= 0) & (prob_TLE <= 1)).all()


@settings(max_examples=60)
@given(st.data())
def test_whatever_bytes_are_changed_it_is_refused_or_loads(whole: Any, data: st.DataObject) -> None:
    folder, about, tensors = whole
    raw = bytearray(written(folder, about, tensors).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 400))] = data.draw(st.integers(0, 255))
    (folder / NAME).write_bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))])
    try:
        load_predictor(folder / NAME)
    except DataError as error:
        assert NAME in str(error)  # noqa: PT017


def test_a_good_file_reads_back(whole: Any) -> None:
    folder, about, tensors = whole
    predictor = load_predictor(written(folder, about, tensors))
    assert predictor.fingerprint == FINGERPRINT
    predictor.save(folder / "again.safetensors")
    with safe_open(folder / "again.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["route_predictor"]) == about
        assert all(torch.equal(file.get_tensor(name), each) for name, each in tensors.items())
    # Of before: no routers, no number of tokens.
    del about["fingerprint"]["routers"]
    if about["kind"] == "frequency":
        del about["settings"]["vocab_size"]
    assert load_predictor(written(folder, about, tensors)).fingerprint == replace(FINGERPRINT, routers=None)


def test_another_file_is_not_to_be_deleted() -> None:
    with pytest.raises(
        DataError, match=r"test_predictor_files\.py holds no route predictor: .*; name another file, or fit one again"
    ):
        load_predictor(__file__)


def test_heads_share_the_width() -> None:
    with pytest.raises(ConfigError, match="dim is 10; it must be a multiple of heads=4"):
        Settings(dim=10)


def test_serve_says_so_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    model = make_model(vocab_size=257)
    save_model(tmp_path / "m", model, ByteTokenizer())
    about, tensors = parts("encdec", tmp_path)
    written(tmp_path / "m", at("kind", value="zzz")(about), tensors)
    said = ["--expert-budget", "100KiB", "--port", "0", "--set", "engine.process=false"]
    assert main(["serve", str(tmp_path / "m"), *said]) == 2
    (line,) = (each for each in capsys.readouterr().err.splitlines() if "error" in each)
    assert line.startswith(f"error: {tmp_path}/m/{NAME} holds no route predictor: kind is 'zzz'")


# Of which model


def test_a_sketch_by_hand() -> None:
    signs = np.random.RandomState(0)
    row, column = (signs.randint(0, 2, size) * 2 - 1 for size in (2, (3, 4)))
    weight = np.array([[1.0, 2.0, 3.0], [-4.0, 0.5, 0.0]])
    found = sketch(torch.tensor(weight, dtype=torch.float32))
    assert found[0] == pytest.approx(np.sqrt((weight**2).sum()), rel=1e-6)
    assert found[1:] == pytest.approx([(np.outer(row, column[:, one]) * weight).sum() for one in range(4)], rel=1e-6)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(8, 200), st.sampled_from([1e-3, 0.02, 3.0]))
def test_rounding_is_no_other_model_and_training_is(seed: int, rows: int, columns: int, std: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw) * std
    own = replace(FINGERPRINT, routers=(sketch(weight),))
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        assert not own.has_other_routers(replace(own, routers=(sketch(weight.to(kind)),)))
    for other in (torch.randn(rows, columns, generator=draw) * std, 1.1 * weight):
        assert own.has_other_routers(replace(own, routers=(sketch(other),)))
    assert own.has_other_routers(replace(own, routers=()))
    assert not own.has_other_routers(replace(own, routers=None))
    assert not replace(own, routers=None).has_other_routers(own)


def trained_further(model: Any) -> Any:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in find_pools(model).layers:
            weight = layer.router.score.weight
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=draw)
    return model


def fitted(model: Any, place: Path, routers: bool = True) -> None:
    fingerprint = find_pools(model).fingerprint(f"vocab:{VOCAB}")
    assert len(fingerprint.routers) == 4
    EncoderDecoder(fingerprint if routers else replace(fingerprint, routers=None), VOCAB, SMALL).save(place)


@pytest.mark.parametrize("how", ["stored", "bfloat16", "float16", "int4", "in memory"])
def test_a_model_that_was_trained_further_is_another(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = make_model(), trained_further(make_model())
    for name, each in (("same", model), ("other", other)):
        save_model(tmp_path / name, each)
        # Of the one, in both.
        fitted(model, place_of(tmp_path / name))
    place = place_of(tmp_path / "same")

    def engine(predictor: str, folder: Path, model: Any) -> Any:
        options = offload_options(ExpertsConfig(predictor=predictor), folder)
        if how == "in memory":
            return offload(model, None, **options)
        options |= {"quantize": how} if how == "int4" else {"dtype": getattr(torch, how, None)}
        return load_offloaded(folder, None, **options)[2]

    for asked in ("auto", str(place)):
        with caplog.at_level(logging.WARNING), engine(asked, tmp_path / "same", model) as running:
            assert running.predictor.kind == "encdec"
    assert caplog.text == ""
    with pytest.raises(
        CheckpointError, match=r"made for a model of other router weights.*; fit one on this model's routes"
    ):
        engine(str(place), tmp_path / "other", other)
    with engine("auto", tmp_path / "other", other) as running, torch.no_grad():
        assert running.predictor.kind == "router_lookahead"
        assert all(layer.experts.is_watched for layer in running._layers)
        running.model(torch.tensor([[1, 2, 3]]))
        # Whether what was named came in time is the machine's matter.
        assert running.stats().counters["expert_predicted"] > 0
    assert "made for a model of other router weights" in caplog.text
    assert "is not used: router_lookahead predicts one layer ahead" in caplog.text


def test_a_file_of_before_is_taken_and_it_is_said_what_it_does_not_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    fitted(model, tmp_path / NAME, routers=False)
    with caplog.at_level(logging.WARNING), offload(model, None, predictor=str(tmp_path / NAME)) as engine:
        assert engine.predictor.kind == "encdec"
    assert caplog.text.count("does not say which routers it was fitted on") == 1


def test_a_damaged_file_does_not_keep_a_new_one_from_being_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "m", make_model(vocab_size=257), ByteTokenizer())
    place = place_of(tmp_path / "m")
    place.write_bytes(b"no predictor")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    said = [
        "--inputs",
        "4",
        "--samples",
        "1",
        "--input-length",
        "8",
        "--max-tokens",
        "4",
        "--kind",
        "frequency",
        "--hold-out",
        ".3",
    ]
    command = ["experts", "fit-predictor", str(tmp_path / "m"), str(tmp_path / "text.txt"), *said]
    assert main([*command, "--expert-budget", "100KiB", "--quiet"]) == 0, capsys.readouterr().err
    assert len(load_predictor(place).fingerprint.routers or ()) == 4


def test_an_interrupt_while_it_is_written_leaves_the_file_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = made("encdec")
    predictor.save(tmp_path / NAME)
    before = (tmp_path / NAME).read_bytes()

    def half(tensors: Any, place: Any, table: Any) -> None:
        Path(place).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("anabranch.serving.expertflow.predictors.files.save_file", half)
    for name in (NAME, "new.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            predictor.save(tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_bytes() == before


def test_a_checkpoint_has_the_predictor_in_its_folder_or_else_that_of_its_run(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-00000007"
    save_model(step, make_model(), ByteTokenizer())
    for model in (tmp_path / "run", step):
        assert find_file(model) is None
    (tmp_path / "run" / NAME).write_text("of the run")
    for model in (tmp_path / "run", step):
        assert find_file(model) == tmp_path / "run" / NAME
    (step / NAME).write_text("of the step")
    for model in (tmp_path / "run", step):
        assert find_file(model) == step / NAME
    # Copies that somebody keeps are no checkpoints of the run they lie in.
    copy = step.rename(step.with_name("best"))
    (copy / NAME).unlink()
    assert find_file(copy) is None
