"""What a model is read from is seen, whoever reads it and whichever file it is."""

import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch

from anabranch.errors import CheckpointError
from anabranch.lm.checkpoint import load_model, save_model
from anabranch.lm.seen_model import check_unchanged, parts_of, see_model
from anabranch.lm.tensors import open_tensors, weight_files
from anabranch.serving.config import ServingConfig
from anabranch.serving.http.config import HttpConfig
from anabranch.serving.http.serve import read_model
from serving_models import saved_moe

_OPENED: list[tuple[int, str]] = []
_IS_WATCHED = threading.Event()


def _note(event, arguments):
    if event == "open" and _IS_WATCHED.is_set() and isinstance(arguments[0], str | os.PathLike):
        _OPENED.append((threading.get_ident(), os.fspath(arguments[0])))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    shutil.copytree(saved_moe(), place)
    (place / "generation_config.json").write_text('{"temperature": 0.5}')
    (place / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return place


@pytest.fixture
def opened():
    """Files that this thread opens in Python."""
    sys.addaudithook(_note)
    _OPENED.clear()
    _IS_WATCHED.set()
    yield lambda: {Path(path) for thread, path in _OPENED if thread == threading.get_ident()}
    _IS_WATCHED.clear()


@pytest.mark.parametrize("options", [{}, {"expert_budget": "4KiB"}], ids=str)
def test_all_that_an_engine_and_its_reader_open_is_seen(folder, opened, options):
    engine, _ = ServingConfig(model=str(folder), num_blocks=8, process=False, dtype="float32", **options).load()
    read_model(str(folder), HttpConfig())
    read = {path for path in opened() if path.parent == folder}
    # What is opened outside of Python is these.
    read |= {folder / "model.safetensors", folder / "tokenizer.json", folder / "tokenizer_config.json"}
    seen = {Path(one.path) for one in engine.info.files.files}
    assert {path for path in read if path.is_file()} - {folder / "SHA256SUMS"} <= seen
    assert {"config.json", "generation_config.json", "chat_template.jinja"} <= {path.name for path in seen}
    assert engine.info.files == see_model(folder)


UNREAD = [
    *("README.md", "metrics.jsonl", "trainer.json", "optimizer.safetensors", "route-predictor.safetensors", "notes"),
    *("adapter_model.safetensors", "skipper.safetensors", "training_args.bin", "rng_state.pth", "m-Q4_K_M.gguf"),
    *(
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "consolidated.safetensors",
    ),
    *("preprocessor_config.json", "vocab.json", "additional_chat_templates/tool.jinja"),
]


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_of_a_model_may_change(folder, name):
    seen, path = see_model(folder), folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    assert see_model(folder) == seen
    check_unchanged(seen, folder)
    # And an engine is made of the folder as before.
    engine, _ = ServingConfig(model=str(folder), num_blocks=8, process=False, dtype="float32").load()
    assert engine.info.files == seen


READ = ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", [*READ, "special_tokens_map.json", "1_Pooling/config.json"])
def test_what_is_read_of_a_model_is_told(folder, name):
    seen, path = see_model(folder), folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((path.read_bytes() if path.is_file() else b"") + b" ")
    with pytest.raises(CheckpointError, match=f"{path} is another file") as caught:
        check_unchanged(seen, folder)
    assert "start again" in str(caught.value)


def test_of_shards_the_index_and_those_it_names_are_seen(folder, tmp_path):
    model, tokenizer = load_model(folder)
    place = tmp_path / "sharded"
    save_model(place, model, tokenizer, max_shard_bytes=10_000)
    index, *shards = weight_files(place)
    assert index.name == "model.safetensors.index.json"
    assert len(shards) > 1
    assert set(weight_files(place)) <= set(parts_of(place))
    seen = see_model(place)
    # A download under way, of a model in more shards.
    (place / "model-00001-of-00099.safetensors").write_bytes(b"")
    check_unchanged(seen, place)
    for path in (index, *shards):
        seen, before = see_model(place), path.read_bytes()
        path.write_bytes(before + b"x")
        with pytest.raises(CheckpointError, match=f"{path} is another file"):
            check_unchanged(seen, place)
        path.write_bytes(before)
    seen = see_model(place)
    # It is read before any index.
    shutil.copyfile(folder / "model.safetensors", place / "model.safetensors")
    assert len(open_tensors(place).names) == len(open_tensors(folder).names)
    with pytest.raises(CheckpointError, match=r"/model\.safetensors is another file"):
        check_unchanged(seen, place)


def test_a_newer_checkpoint_changes_nothing_of_the_one_that_was_read(folder, tmp_path):
    steps = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder, steps / "step-00000001")
    seen = see_model(tmp_path / "run")
    shutil.copytree(folder, steps / "step-00000002")
    check_unchanged(seen, tmp_path / "run")
    assert seen.difference(see_model(tmp_path / "run"))
    shutil.rmtree(steps / "step-00000001")
    with pytest.raises(CheckpointError, match="step-00000001"):
        check_unchanged(seen, tmp_path / "run")


def test_a_file_is_read_from_itself(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert parts_of(file) == [file]
    assert [one.path for one in see_model(file).files] == [str(file)]


def test_a_model_that_is_replaced_while_it_is_read_is_refused(folder, monkeypatch):
    from anabranch.serving import load

    def replacing(*args, **kwargs):
        loaded = load_weights(*args, **kwargs)
        os.utime(folder / "tokenizer.json")
        return loaded

    load_weights = load.load_weights
    monkeypatch.setattr(load, "load_weights", replacing)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is another file"):
        ServingConfig(model=str(folder), num_blocks=8, process=False).load()


@pytest.fixture
def run(folder, tmp_path):
    """(a training run with one checkpoint, what writes the next: the same model with other weights and another end of its answers)."""
    steps, made = tmp_path / "run" / "checkpoints", tmp_path / "made"
    shutil.copytree(folder, steps / "step-00000001")
    shutil.copytree(folder, made)
    model, tokenizer = load_model(made)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    save_model(tmp_path / "other", model, tokenizer)
    shutil.copyfile(tmp_path / "other" / "model.safetensors", made / "model.safetensors")
    (made / "generation_config.json").write_text('{"temperature": 0.25}')

    def go_on():
        if made.exists():
            made.rename(steps / "step-00000002")

    return tmp_path / "run", go_on


def folders_of(seen):
    return {Path(one.path).parent.name for one in seen.files}


@pytest.mark.parametrize("options", [{"quantize": "none"}, {"quantize": "nf4"}, {"expert_budget": "4KiB"}], ids=str)
def test_an_engine_has_the_checkpoint_of_a_run_that_it_tells(run, folder, options, monkeypatch):
    from anabranch.serving import load

    place, go_on = run
    settings = {"num_blocks": 8, "process": False, "dtype": "float32"} | options

    def norm_of(engine):
        return engine.runner.model.state_dict()["norm.weight"].tolist()

    def late(*args, **kwargs):
        go_on()
        return load_weights(*args, **kwargs)

    before = norm_of(ServingConfig(model=str(folder), **settings).load()[0])
    load_weights = load.load_weights
    monkeypatch.setattr(load, "load_weights", late)
    engine, _ = ServingConfig(model=str(place), **settings).load()
    assert folders_of(engine.info.files) == {"step-00000001"}
    assert norm_of(engine) == before
    # The next engine has the newer one, and tells so.
    engine, _ = ServingConfig(model=str(place), **settings).load()
    assert folders_of(engine.info.files) == {"step-00000002"}
    assert norm_of(engine) != before


def test_a_reader_reads_the_checkpoint_of_a_run_that_it_tells(run, monkeypatch):
    from anabranch.serving.http import serve

    place, go_on = run

    def late(path):
        tokenizer = read_tokenizer(path)
        go_on()
        return tokenizer

    read_tokenizer = serve.read_tokenizer
    monkeypatch.setattr(serve, "read_tokenizer", late)
    reader = read_model(str(place), HttpConfig())
    assert folders_of(reader.files) == {"step-00000001"}
    assert reader.defaults["temperature"] == 0.5
