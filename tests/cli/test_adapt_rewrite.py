"""``anabranch adapt --resume`` onto an adapter that is there: what people said of it stays, and what is in the way is told at once."""

import json
import shutil

import pytest

from anabranch.adapters.glider.folder import read_described
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, export_huggingface
from anabranch.nn import SelfAttention, SwiGLU

QUICK = ("--set=train.batch_size=2", "--set=train.device=cpu", "--set=task.held_out=0", "--quiet")
PAGE = "my model card, two hours of work"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model and rows of two tasks."""
    root = tmp_path_factory.mktemp("rewrite")
    config = Decoder.Config(
        vocab_size=257,
        dim=32,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=48),
        max_positions=64,
    )
    export_huggingface(root / "base", config.build(seed=1), ByteTokenizer.Config().build(), family="llama")
    rows = [{"task": task, "input": f"{task}: {word}", "output": word} for word in ("ab", "cd") for task in ("a", "b")]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture
def adapt(here, base):
    def run(out, *arguments, resume=False):
        given = ("--resume",) if resume else (base / "base", base / "rows.jsonl", *QUICK[:-1])
        return here("adapt", *given, "--out", out, "--quiet", *arguments)

    return run


METHODS = ["lora", "mhr", "dynmole", "adamix"]


@pytest.mark.parametrize("method", METHODS)
def test_what_people_said_survives_a_resumed_run(here, adapt, tmp_path, method):
    out = tmp_path / "run"
    code, _, err = adapt(out, "--method", method, "--steps", 2)
    assert code == 0, err
    place = out / "adapter"
    (place / "README.md").write_text(PAGE)
    if is_peft := (place / "adapter_config.json").exists():
        code, _, err = here("adapters", "describe", place, "--instruction", "Write SQL.")
        assert code == 0, err
    for steps in (4, 4):
        code, _, err = adapt(out, "--steps", steps, resume=True)
        assert code == 0, err
        assert (place / "README.md").read_text() == PAGE
        assert (read_described(place).instructions == ("Write SQL.",)) == is_peft
        assert json.loads((place / "prompt.json").read_text()) == {"template": "{prompt}\n"}
        assert not list(out.glob(".*unfinished*"))


@pytest.mark.parametrize("change", ["gone", "another", "new"])
def test_a_run_goes_on_in_the_form_that_it_began_with_whatever_notes_say_now(adapt, tmp_path, change):
    """How prompts are written was read again from the notes of what a run had begun from, and the rows were then called others."""
    sources, out = [tmp_path / name for name in ("one", "two")], tmp_path / "run"
    for source in sources:
        said = () if change == "new" else ("--set", "task.template=Q: {prompt} A:")
        code, _, err = adapt(source, "--steps", 1, *said)
        assert code == 0, err
    given = json.dumps([str(source / "adapter") for source in sources])
    code, _, err = adapt(out, "--method", "lora_mixer", "--set", f"method.adapters={given}", "--steps", 1)
    assert code == 0, err
    for source in sources:
        note = source / "adapter" / "prompt.json"
        note.unlink()
        if change != "gone":
            note.write_text(json.dumps({"template": "another: {prompt}"}))
    code, _, err = adapt(out, "--steps", 2, resume=True)
    assert code == 0, err
    wanted = "{prompt}\n" if change == "new" else "Q: {prompt} A:"
    assert json.loads((out / "adapter" / "prompt.json").read_text()) == {"template": wanted}


def test_gates_go_with_their_numbers_and_a_new_description_stays(here, adapt, tmp_path, caplog):
    assert adapt(tmp_path / "lora", "--steps", 2)[0] == 0
    first = tmp_path / "lora" / "adapter"
    assert here("adapters", "describe", first, "--instruction", "Of the first.")[0] == 0
    gated = ("--method", "gate", "--set", f"method.adapter={first}", "--steps", 2)
    assert adapt(tmp_path / "gate", *gated)[0] == 0
    place = tmp_path / "gate" / "adapter"
    assert read_described(place).instructions == ("Of the first.",)
    assert here("adapters", "describe", place, "--instruction", "Described later.")[0] == 0
    before = (place / "glider.safetensors").read_bytes()
    assert adapt(tmp_path / "gate", "--steps", 4, resume=True)[0] == 0
    assert read_described(place).instructions == ("Described later.",)
    assert (place / "glider.safetensors").read_bytes() != before
    assert not (place / "glider.safetensors.old").exists()
    # Gates beside an adapter that learns on are of numbers that it has no more.
    shutil.copyfile(place / "glider.safetensors", first / "glider.safetensors")
    assert adapt(tmp_path / "lora", resume=True)[0] == 0
    assert (first / "glider.safetensors").exists()
    assert not caplog.text
    assert adapt(tmp_path / "lora", "--steps", 4, resume=True)[0] == 0
    assert "trained beside other numbers than the adapter has now" in caplog.text
    assert read_described(first).gates is None
    assert (first / "glider.safetensors.old").read_bytes() == (place / "glider.safetensors").read_bytes()


@pytest.mark.parametrize("method", [*METHODS, "ln-tuning"])
@pytest.mark.parametrize("resume", [False, True])
def test_what_is_in_the_way_is_told_before_the_training(adapt, tmp_path, monkeypatch, method, resume):
    out = tmp_path / "run"
    if resume:
        assert adapt(out, "--method", method, "--steps", 1)[0] == 0
    (out / "adapter").mkdir(parents=True, exist_ok=True)
    (out / "adapter" / "notes.txt").write_text("mine")

    def fit(*_):
        raise AssertionError("it was trained")

    monkeypatch.setattr("anabranch.train.Trainer.fit", fit)
    code, _, err = adapt(out, *(() if resume else ("--method", method)), "--steps", 3, resume=resume)
    assert (code, "notes.txt" in err, "; move it elsewhere" in err) == (2, True, True), err
    assert err.count("\n") == 1
    assert (out / "adapter" / "notes.txt").read_text() == "mine"
    shutil.rmtree(out / "adapter")
    (out / "adapter").write_text("a file")
    code, _, err = adapt(out, *(() if resume else ("--method", method)), "--steps", 3, resume=resume)
    assert (code, "adapter" in err) == (2, True), err
