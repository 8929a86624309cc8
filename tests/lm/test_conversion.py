"""Converting a model: nothing is lost, whatever the source and the target are and wherever it fails."""

import errno
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from anabranch import files
from anabranch.data import ByteTokenizer, load_tokenizer
from anabranch.data.bpe import train_bpe
from anabranch.errors import AnabranchError, CheckpointError, ConfigError, DataError, TokenizerError
from anabranch.lm import Decoder, convert, export_huggingface, load_model, save_model
from anabranch.lm.folder import PREDICTOR_FILE, RECORD, verify
from anabranch.nn import SelfAttention, SwiGLU

CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


def tiny(**changes):
    fields = {"vocab_size": 300, "dim": 16, "num_layers": 1, "attention": SelfAttention.Config(num_heads=2)}
    return Decoder.Config(**{**fields, "feed_forward": SwiGLU.Config(hidden_dim=8), **changes}).build(seed=1)


def contents(folder):
    """Everything in a folder: what it is, its bytes, its rights."""
    return {
        str(path.relative_to(folder)): (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None,
            path.lstat().st_mode,
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def native(tmp_path):
    save_model(tmp_path / "native", tiny(), ByteTokenizer())
    return tmp_path / "native"


def make_foreign(folder):
    """A Hugging Face folder as people publish them: more in it than we write."""
    tokenizer = train_bpe(["some text, some more text"] * 3, 280)
    export_huggingface(folder, tiny(), tokenizer)
    config = json.loads((folder / "config.json").read_text())
    del config["anabranch_version"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / RECORD).unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 77, "added": {"1": 2}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 3, 5], "temperature": 0.6}))
    for name in ("special_tokens_map.json", "preprocessor_config.json"):
        (folder / name).write_text('{"do_resize": true}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("tools")
    for name in ("LICENSE", "README.md", "NOTICE.txt"):
        (folder / name).write_text(f"the {name}")
    (folder / "thesis.txt").write_text("years of work")
    return folder


@pytest.fixture
def foreign(tmp_path):
    return make_foreign(tmp_path / "foreign")


BELONGS = [
    "LICENSE",
    "NOTICE.txt",
    "README.md",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def test_what_belongs_to_a_hugging_face_folder_goes_along_both_ways(tmp_path, foreign):
    convert(foreign, tmp_path / "ours", "native")
    convert(tmp_path / "ours", tmp_path / "back", "huggingface")
    convert(foreign, tmp_path / "half", "huggingface", dtype=torch.float16)
    for folder in ("ours", "back", "half"):
        for name in BELONGS:
            assert (tmp_path / folder / name).read_bytes() == (foreign / name).read_bytes(), (folder, name)
        assert not (tmp_path / folder / "thesis.txt").exists()
        assert verify(tmp_path / folder)
        tokenizer = load_tokenizer(tmp_path / folder)
        assert tokenizer.chat_template == CHAT
        assert (tokenizer.stop_ids[1:], tokenizer.fingerprint) == ((257, 3, 5), load_tokenizer(foreign).fingerprint)
    before, after = (load_file(folder / "model.safetensors") for folder in (foreign, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ids_that_only_config_json_says_survive(tmp_path, foreign):
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (foreign / name).unlink()
    config = json.loads((foreign / "config.json").read_text()) | {"bos_token_id": 7, "eos_token_id": [9, 8]}
    (foreign / "config.json").write_text(json.dumps(config))
    convert(foreign, tmp_path / "ours", "native")
    convert(tmp_path / "ours", tmp_path / "back", "huggingface")
    for folder in (foreign, tmp_path / "ours", tmp_path / "back"):
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (7, 9, (9, 8))


def test_a_chat_template_that_is_no_text_is_told(foreign):
    (foreign / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(TokenizerError, match=r"cannot read .*chat_template.jinja: .*utf-8"):
        load_tokenizer(foreign)


def test_a_model_cannot_be_converted_onto_itself(tmp_path, native, monkeypatch):
    (tmp_path / "link").symlink_to(native)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for target in (native, "native", "sub/../native", "link", native / "inside", "link/inside/deep", tmp_path, "."):
        for source in (native, "link"):
            for force in (False, True):
                with pytest.raises(CheckpointError, match=r"is the model that is to be converted|lie one inside"):
                    convert(source, target, "huggingface", force=force)
    assert contents(tmp_path) == before


def test_files_that_are_links_into_the_target_are_not_pulled_away(tmp_path, native):
    (tmp_path / "links").mkdir()
    for file in native.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json is a link into .*native, which would be replaced"):
        convert(tmp_path / "links", native, "huggingface")
    assert contents(tmp_path) == before
    convert(tmp_path / "links", tmp_path / "out")
    assert contents(tmp_path / "out").keys() == contents(native).keys()


def settings_of_an_editor(folder, native):
    (folder / "config.json").write_text('{"theme": "dark"}')
    (folder / "thesis.txt").write_text("years of work")


def a_published_model(folder, native):
    make_foreign(folder)
    (folder / "thesis.txt").unlink()


def ours_with_notes(folder, native):
    convert(native, folder)
    (folder / "README.md").write_text("what I found out about it")


def ours_tuned_by_hand(folder, native):
    convert(native, folder, "huggingface")
    (folder / "generation_config.json").write_text('{"temperature": 0.3}')


def ours_with_a_folder(folder, native):
    convert(native, folder)
    (folder / "empty").mkdir()


def ours_through_links(folder, native):
    convert(native, folder)
    (folder / "README.md").symlink_to(native / "config.json")


STRANGERS = [
    settings_of_an_editor,
    a_published_model,
    ours_with_notes,
    ours_tuned_by_hand,
    ours_with_a_folder,
    ours_through_links,
]


@pytest.mark.parametrize("make", STRANGERS)
def test_a_folder_that_is_not_ours_alone_is_replaced_by_force_only(tmp_path, native, make):
    target = tmp_path / "target"
    target.mkdir()
    make(target, native)
    before = contents(target)
    with pytest.raises(CheckpointError, match=r"is not a saved model \(it holds .*choose a new folder, or .* --force"):
        convert(native, target)
    assert contents(target) == before
    with pytest.raises(CheckpointError, match=r"is not a saved model \(it holds [^-]*; choose a new folder$"):
        save_model(target, tiny())
    assert contents(target) == before
    convert(native, target, force=True)
    loaded = load_model(target)[0]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in tiny().state_dict().items())
    after = contents(target)
    written = contents(native)
    for name, kept in before.items():
        assert name in written or kept in (after.get(name), after.get(f"{name}.old")), name


def test_force_loses_no_file_that_is_not_as_we_saved_it(tmp_path, native):
    target = tmp_path / "own"
    target.mkdir()
    theirs = {
        "config.json": '{"theme": "dark"}',
        "model.safetensors": "months of work",
        "thesis.txt": "x",
        "tokenizer.json": "mine",
    }
    for name, text in theirs.items():
        (target / name).write_text(text)
    convert(native, target, force=True)
    kept = {name: "" if name == "thesis.txt" else ".old" for name in theirs}
    assert {name: (target / f"{name}{kept[name]}").read_text() for name in theirs} == theirs
    (target / "config.json").write_text((target / "config.json").read_text() + "\n")  # edited since
    edited = (target / "config.json").read_bytes()
    convert(native, target, force=True)
    assert (target / "config.json.old1").read_bytes() == edited
    # What we saved and nobody has changed is replaced.
    assert not (target / "model.safetensors.old1").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_predictor_is_no_stranger_and_does_not_stay_beside_other_weights(tmp_path, native, force):
    target = tmp_path / "own"
    convert(native, target)
    (target / PREDICTOR_FILE).write_bytes(b"fitted")
    convert(native, target, force=force)
    assert not (target / PREDICTOR_FILE).exists()
    assert (target / f"{PREDICTOR_FILE}.old").read_bytes() == b"fitted"
    (target / PREDICTOR_FILE).write_bytes(b"fitted again")
    save_model(target, tiny())
    assert [path.read_bytes() for path in sorted(target.glob("route*"))] == [b"fitted", b"fitted again"]
    assert (target / f"{PREDICTOR_FILE}.old1").exists()
    load_model(target)


@pytest.mark.parametrize("listed", [True, False])
def test_a_list_of_digests_that_is_not_ours_lets_nothing_be_lost(tmp_path, native, listed):
    target = tmp_path / "own"
    target.mkdir()
    theirs = {"config.json": '{"model_type": "llama"}', "model.safetensors": "months of work"}
    for name, text in theirs.items():
        (target / name).write_text(text)
    lines = [f"{sha256(text.encode()).hexdigest()}  {name}" for name, text in theirs.items()]
    theirs[RECORD] = "\n".join(lines) if listed else "# made with b2sum\nabc  notes.txt"
    (target / RECORD).write_text(theirs[RECORD])
    convert(native, target, force=True)
    assert {name: (target / f"{name}.old").read_text() for name in theirs} == theirs
    load_model(target)


@pytest.mark.parametrize(
    ("name", "text"), [("notes.txt", "years of work"), ("README.md", "# mine"), ("config.json", None)]
)
def test_digests_that_somebody_made_anew_let_nothing_be_lost(tmp_path, native, name, text):
    place = native / name
    place.write_text(place.read_text() + "\n" if text is None else text)
    text = place.read_text()
    names = sorted(path.name for path in native.iterdir() if path.name != RECORD)
    made = subprocess.run(["sha256sum", *names], cwd=native, capture_output=True, check=True, text=True).stdout
    (native / RECORD).write_text(made)
    load_model(native)
    save_model(tmp_path / "new", tiny())
    before = contents(native)
    for wrong in (lambda: convert(tmp_path / "new", native), lambda: save_model(native, tiny())):
        with pytest.raises(
            CheckpointError, match=r"is not a saved model \(it holds a SHA256SUMS that we did not write\)"
        ):
            wrong()
    assert contents(native) == before
    convert(tmp_path / "new", native, force=True)
    assert text in [path.read_text() for path in (place, native / f"{name}.old") if path.exists()]
    assert (native / f"{RECORD}.old").read_text() == made


def test_our_own_digests_are_checked_by_the_usual_program_too(native):
    assert (native / RECORD).read_text().startswith("# anabranch ")
    done = subprocess.run(["sha256sum", "--strict", "-c", RECORD], cwd=native, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("name", ["notes", "config.json", "model.safetensors", RECORD, "tokenizer.json"])
def test_a_pipe_in_a_folder_holds_up_nobody(tmp_path, native, name, force, monkeypatch):
    save_model(tmp_path / "new", tiny())
    (native / name).unlink(missing_ok=True)
    os.mkfifo(native / name)
    # What would open the pipe waits for its other end for ever.
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(20)
    try:
        if force:
            convert(tmp_path / "new", native, force=True)
            assert any(
                stat.S_ISFIFO(path.stat().st_mode) for path in (native / name, native / f"{name}.old") if path.exists()
            )
        else:
            with pytest.raises(CheckpointError, match=r"is not a saved model .it holds "):
                convert(tmp_path / "new", native)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_what_nobody_recorded_is_not_read(tmp_path, native, monkeypatch):
    (native / "data.bin").write_text("3 GB")
    monkeypatch.setattr("anabranch.lm.folder.sha256_of", lambda path: pytest.fail(f"reads {path}"))
    with pytest.raises(CheckpointError, match=r"is not a saved model \(it holds data.bin\)"):
        save_model(native, tiny())


@pytest.mark.parametrize(
    "name", ["config.json", RECORD, "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_folder_with_the_name_of_a_new_file_goes_on_too(tmp_path, native, name):
    target = tmp_path / "own"
    (target / name / "deep").mkdir(parents=True)
    (target / f"{name}.old").mkdir()
    for place in ("a.txt", "deep/config.json"):
        (target / name / place).write_text(place)
    convert(native, target, force=True)
    kept = name if name == "generation_config.json" else f"{name}.old1"
    assert {place: (target / kept / place).read_text() for place in ("a.txt", "deep/config.json")} == {
        "a.txt": "a.txt",
        "deep/config.json": "deep/config.json",
    }
    load_model(target)


def test_what_is_ours_alone_is_replaced(tmp_path, native, foreign):
    for to in ("native", "huggingface", "native"):
        convert(foreign, tmp_path / "out", to)
        assert not (tmp_path / "out/thesis.txt").exists()
    convert(native, tmp_path / "out", max_shard_bytes=5_000)
    assert contents(tmp_path / "out").keys() >= {"model.safetensors.index.json", RECORD}
    convert(native, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == contents(native).keys()
    (tmp_path / "empty").mkdir(mode=0o700)
    convert(native, tmp_path / "empty")
    # What was private stays so.
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700


def test_a_folder_without_a_record_is_replaced_by_force_only(tmp_path, native):
    named = tmp_path / "named"
    named.mkdir()
    (named / "config.json").write_text('{"format": "anabranch"}')
    (named / "model.safetensors").write_bytes(b"months of work")
    (native / RECORD).unlink()
    save_model(tmp_path / "new", tiny())
    for folder in (named, native):
        before = contents(folder)
        with pytest.raises(CheckpointError, match=r"it holds config.json, and no SHA256SUMS that lists it.*--force"):
            convert(tmp_path / "new", folder)
        with pytest.raises(
            CheckpointError, match=r"no SHA256SUMS that lists it\), so it is not replaced; choose a new"
        ):
            save_model(folder, tiny())
        assert contents(folder) == before
        convert(tmp_path / "new", folder, force=True)
        assert (folder / RECORD).is_file()


def test_force_sets_aside_what_would_be_read_as_a_part_of_the_new_model(tmp_path, native):
    target = tmp_path / "target"
    convert(native, target, max_shard_bytes=5_000)
    (target / "chat_template.jinja").write_text("of the old one")
    (target / "chat_template.jinja.old").write_text("of an older one")
    index = (target / "model.safetensors.index.json").read_bytes()
    other = tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    save_model(tmp_path / "zero", other)
    convert(tmp_path / "zero", target, force=True)
    loaded, tokenizer = load_model(target)
    assert not any(value.any() for value in loaded.parameters())
    assert tokenizer is None
    assert (target / "model.safetensors.index.json.old").read_bytes() == index
    assert (target / "chat_template.jinja.old").read_text() == "of an older one"
    assert (target / "chat_template.jinja.old1").read_text() == "of the old one"


@pytest.mark.parametrize("has_links", [True, False])
def test_force_keeps_bytes_and_times_also_where_there_are_no_hard_links(tmp_path, native, monkeypatch, has_links):
    target = tmp_path / "target"
    (target / "notes").mkdir(parents=True)
    kept = {
        "thesis.txt": b"years of work",
        "notes/one.bin": bytes(range(256)),
        "chat_template.jinja": b"of the old one",
    }
    for name, data in kept.items():
        (target / name).write_bytes(data)
    for number, name in enumerate([*kept, "notes"], start=1):
        os.utime(target / name, (number * 10**8, number * 10**8))
    before = {name: (target / name).stat().st_ino for name in kept}
    if not has_links:

        def refuse(*_, **__):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    convert(native, target, force=True)
    for number, (name, data) in enumerate(kept.items(), start=1):
        path = target / (f"{name}.old" if name.endswith(".jinja") else name)
        assert path.read_bytes() == data
        assert path.stat().st_mtime == number * 10**8, name
        assert (path.stat().st_ino == before[name]) == has_links
    assert (target / "notes").stat().st_mtime == 4 * 10**8
    assert load_model(target)[1] is not None


def make_run(folder, native):
    """What a training run looks like from outside."""
    steps = [folder / f"checkpoints/step-0000000{step}" for step in (1, 2)]
    for step in steps:
        shutil.copytree(native, step)
        (step / "trainer.json").write_text("{}")
        (step / "optimizer.safetensors").write_bytes(b"moments")
    (folder / "config.json").write_text(json.dumps({"schema": 1, "model": {}, "data": {}, "train": {}}))
    return steps


def test_a_training_run_is_never_written_into(tmp_path, native):
    steps = make_run(tmp_path / "run", native)
    new_run = tmp_path / "new"
    new_run.mkdir()
    shutil.copy(tmp_path / "run/config.json", new_run)
    before = contents(tmp_path)
    for target in (
        *steps,
        steps[0] / "hf",
        steps[0] / "a/b",
        tmp_path / "run",
        new_run,
        steps[0].with_name("step-00000009"),
    ):
        for force in (False, True):
            with pytest.raises(CheckpointError, match=r"training run.*so no model is saved there; choose a new folder"):
                convert(native, target, force=force)
        with pytest.raises(CheckpointError, match="training run"):
            save_model(target, tiny())
    with pytest.raises(CheckpointError, match="lie one inside the other"):
        convert(tmp_path / "run", steps[1])
    assert contents(tmp_path) == before
    # A name that is no step's is nothing to the run around it.
    convert(native, steps[0].with_name("step-best"))
    assert load_model(tmp_path / "run/checkpoints/step-best")[1] is not None


@pytest.mark.parametrize("name", [".", "..", "../.."])
def test_the_working_directory_is_not_replaced_under_who_stands_in_it(tmp_path, native, monkeypatch, name):
    here = tmp_path / "a/b/c"
    here.mkdir(parents=True)
    before = contents(tmp_path)
    monkeypatch.chdir(here)
    with pytest.raises(DataError, match=r"working directory.*; choose a new folder, or go elsewhere first"):
        convert(native, name, force=True)
    with pytest.raises(DataError, match="working directory"):
        save_model(name, tiny())
    assert here.samefile(".")
    assert contents(tmp_path) == before
    convert(native, "d")
    assert load_model("d")[1] is not None


def test_models_that_would_be_loaded_instead_of_the_new_one_are_no_place_for_it(tmp_path, native):
    shutil.copytree(native, tmp_path / "run/checkpoints/step-00000001")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="is the folder of a training run"):
        convert(native, tmp_path / "run", force=True)
    assert contents(tmp_path) == before


def test_a_folder_that_changes_meanwhile_is_left_alone(tmp_path, native, monkeypatch):
    save_model(tmp_path / "out", tiny())

    class Slow(ByteTokenizer):
        def save(self, folder):
            super().save(folder)
            (tmp_path / "out/notes.txt").write_text("written while it worked")

    with pytest.raises(CheckpointError, match="has changed while a model was made for it"):
        save_model(tmp_path / "out", tiny(), Slow())
    assert (tmp_path / "out/notes.txt").read_text() == "written while it worked"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "out"]


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("what", ["new", "changed"])
def test_a_file_that_appears_at_any_moment_before_the_exchange_is_kept(
    tmp_path, native, monkeypatch, what, force, in_one_step
):
    target = tmp_path / "out"
    save_model(target, tiny())
    name = "notes.txt" if what == "new" else "config.json"
    if not in_one_step:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    was = {"fsync": files._fsync, "swap": files._swap}
    calls = []

    def later(number):
        """Whoever works on it writes into the folder at this moment, and not before the last look at it."""

        def act(which, *arguments):
            calls.append(which)
            if len(calls) == number:
                (target / name).write_text("written meanwhile")
            return was[which](*arguments)

        monkeypatch.setattr(files, "_fsync", lambda *arguments: act("fsync", *arguments))
        monkeypatch.setattr(files, "_swap", lambda *arguments: act("swap", *arguments))

    later(None)
    convert(native, target, force=force)
    moments = calls.index("swap") + 1
    for number in (moments, moments - 1, moments - 2):
        calls.clear()
        later(number)
        before = contents(target) | {name: (b"written meanwhile", 0o100644)}
        with pytest.raises(CheckpointError, match=f"{target} has changed while a model was made for it"):
            convert(native, target, force=force)
        assert contents(target) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "out"]
        later(None)
        shutil.rmtree(target)
        convert(native, target)


def test_a_huge_folder_is_no_models(tmp_path, native, monkeypatch):
    monkeypatch.setattr("anabranch.lm.folder._MOST_ENTRIES", 3)
    (tmp_path / "home").mkdir()
    for number in range(5):
        (tmp_path / "home" / str(number)).touch()
    with pytest.raises(CheckpointError, match="holds more than 3 files, so it is no model's"):
        convert(native, tmp_path / "home", force=True)


def test_quantising_nothing_is_refused(tmp_path):
    save_model(tmp_path / "small", tiny(vocab_size=20, dim=12))
    with pytest.raises(
        ConfigError, match=r"quantize is 'int4', but no layer of .*small can be in int4: .* multiple of 32"
    ):
        convert(tmp_path / "small", tmp_path / "out", quantize="int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


class Failing:
    """Lets a number of operations on files pass, and then one fail."""

    PLACES = (
        (io, "open"),
        (os, "fsync"),
        (os, "link"),
        (os, "mkdir"),
        (os, "replace"),
        (os, "rename"),
        (os, "chmod"),
        (os, "symlink"),
        (shutil, "copyfile"),
        (tempfile, "mkdtemp"),
        (tempfile, "mkstemp"),
        (files, "_exchange"),
    )

    def __init__(self, passing, error):
        self.left, self.error, self.done = passing, error, []

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        for owner, name in self.PLACES:
            self._patch.setattr(owner, name, self._counting(getattr(owner, name), name))
        return self

    def _counting(self, function, name):
        def call(*arguments, **options):
            if self.left == 0:
                self.left = -1
                self.done.append(name)
                raise self.error
            self.left -= 1
            return function(*arguments, **options)

        return call

    def __exit__(self, *_):
        self._patch.undo()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    place = tmp_path_factory.mktemp("sources")
    save_model(place / "native", tiny(), ByteTokenizer())
    make_foreign(place / "foreign")
    return place


TARGETS = {
    "absent": lambda folder, native: folder.rmdir(),
    "empty": lambda folder, native: None,
    "ours": lambda folder, native: save_model(folder, tiny(dim=8)),
    "a file": lambda folder, native: (folder.rmdir(), folder.write_text("x")),
    "a run": make_run,
    **{make.__name__: make for make in STRANGERS},
}


# How many operations pass, how the next one fails, the source, the format, the target, --force, whether folders swap in one step.
WAYS = st.tuples(
    st.integers(0, 90),
    st.sampled_from([OSError(5, "Input/output error"), OSError(28, "No space left on device"), KeyboardInterrupt()]),
    st.sampled_from(["native", "foreign"]),
    st.sampled_from(["native", "huggingface"]),
    st.sampled_from(sorted(TARGETS)),
    st.booleans(),
    st.booleans(),
)


def check_nothing_changes(sources, passing, error, source, to, target, force, in_one_step):
    """A conversion that fails or is refused leaves source and target as they were; one that does not makes the model."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        place = Path(name).resolve()
        (place / "out").mkdir()
        TARGETS[target](place / "out", sources / "native")
        if not in_one_step:
            patch.setattr(files, "_exchange", lambda first, second: False)
        before, origin = contents(place), contents(sources)
        failed = False
        with Failing(passing, error) as failing:
            try:
                convert(sources / source, place / "out", to, force=force)
            except (AnabranchError, OSError, KeyboardInterrupt):
                failed = True
        assert contents(sources) == origin
        if failed:
            assert contents(place) == before, failing.done
        else:
            loaded = load_model(place / "out")[0].state_dict()
            assert all(torch.equal(value, loaded[key]) for key, value in tiny().state_dict().items())
            written = {f"out/{line[66:]}" for line in (place / "out" / RECORD).read_text().splitlines()}
            after = contents(place)
            for key, kept in before.items() if force else ():
                assert key in {*written, f"out/{RECORD}"} or kept in (after.get(key), after.get(f"{key}.old")), key


@settings(max_examples=15, deadline=None)
@given(WAYS)
@example((0, OSError(5, "Input/output error"), "native", "native", "ours", True, True))
def test_a_conversion_that_fails_or_is_refused_changes_nothing(sources, way):
    check_nothing_changes(sources, *way)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(WAYS)
def test_no_failure_of_a_conversion_changes_anything(sources, way):
    check_nothing_changes(sources, *way)
