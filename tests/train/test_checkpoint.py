"""Checkpoints keep what was good: damage is told before anything is resumed from it, and a run that diverges keeps its way back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.errors import AnabranchError, CheckpointError, ConfigError, DataError
from anabranch.lm import load_model
from anabranch.lm.checkpoint import find_model
from anabranch.lm.folder import RECORD
from anabranch.train import Trainer, checkpoints
from anabranch.train.checkpoint import checkpoint_path, read_checkpoint, set_aside


@pytest.fixture(scope="module")
def _trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(_trained, tmp_path, make_run):
    """A fresh copy of a run with checkpoints of steps 1 and 2."""
    if not _trained.exists():
        Trainer(make_run(steps=2, checkpoint_every=1, eval_every=None), _trained).fit()
    shutil.copytree(_trained, tmp_path / "run")
    return tmp_path / "run"


def resumed(run, make_run, **changes):
    return Trainer(make_run(**{"steps": 3, "checkpoint_every": 1, "eval_every": None, **changes}), run, resume=True)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "flipped": flip_a_bit,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "empty": lambda file: file.write_bytes(b""),
    "absent": lambda file: file.unlink(),
    "of another": lambda file: shutil.copy(file.parent.with_name("step-00000001") / file.name, file),
}


SAME_IN_ALL = ("config.json", "tokenizer.json")
FILES = [*SAME_IN_ALL, "model.safetensors", "optimizer.safetensors", "trainer.json"]
CASES = [(name, damage) for name in FILES for damage in DAMAGES if damage != "of another" or name not in SAME_IN_ALL]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damage_in_any_file_is_told_and_nothing_is_resumed(run, make_run, name, damage):
    newest = checkpoints(run)[-1]
    DAMAGES[damage](newest / name)
    with pytest.raises(CheckpointError, match=f"{newest}"):
        resumed(run, make_run)
    if name not in ("trainer.json", "optimizer.safetensors"):
        with pytest.raises(CheckpointError):
            load_model(newest)
    else:
        load_model(newest)
    shutil.rmtree(newest)
    assert resumed(run, make_run).fit().step == 3


@pytest.mark.parametrize("text", ["", "nonsense", "0" * 64 + "  config.json\n"])
def test_a_damaged_record_is_told(run, make_run, text):
    (checkpoints(run)[-1] / RECORD).write_text(text)
    with pytest.raises(CheckpointError, match=r"SHA256SUMS|config.json"):
        resumed(run, make_run)


def test_checkpoints_of_before_the_record_are_resumed_with_a_warning(run, make_run, caplog):
    (checkpoints(run)[-1] / RECORD).unlink()
    assert resumed(run, make_run).fit().step == 3
    assert "has no SHA256SUMS, so what is in it cannot be checked" in caplog.text


BROKEN = [
    b"",
    b"\xff\xfe\x00",
    b"[]",
    b'{"schema": 1}',
    b"[" * 100_000,
    b'{"schema": 1, "progress": 3, "stream": {}}',
]


@pytest.mark.parametrize("content", BROKEN)
def test_trainer_state_that_cannot_be_checked_is_looked_through(run, make_run, content):
    newest = checkpoints(run)[-1]
    (newest / RECORD).unlink()
    (newest / "trainer.json").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"trainer.json.*remove .*step-00000002 to go on from the checkpoint before"
    ):
        resumed(run, make_run)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("progress", "step"), "2"),
        (("progress", "step"), -1),
        (("progress", "step"), True),
        (("progress", "seconds"), None),
        (("progress", "skipped"), 0.5),
        (("progress", "evaluation"), 7),
        (("progress", "more"), 1),
        (("stream", "position"), "x"),
        (("stream",), []),
        (("progress",), None),
        (("best",), 7),
        (("best",), {"since": -1, "evaluation": None}),
        (("best",), {"since": True, "evaluation": None}),
        (("best",), {"since": 0}),
        (("best",), {"since": 0, "evaluation": {"loss": 1.0}}),
    ],
)
def test_values_that_no_trainer_stores(run, make_run, path, value):
    newest = checkpoints(run)[-1]
    (newest / RECORD).unlink()
    state = json.loads((newest / "trainer.json").read_text())
    table = state[path[0]] if len(path) > 1 else state
    table[path[-1]] = value
    (newest / "trainer.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=rf"{path[0]}.* in .*trainer.json"):
        resumed(run, make_run)


def test_moments_that_are_gone_are_not_replaced_by_fresh_ones(run, make_run):
    newest = checkpoints(run)[-1]
    (newest / RECORD).unlink()
    save_file({}, newest / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors holds no moments, after 2 steps"):
        resumed(run, make_run)


# Divergence


def poison(trainer, first):
    """Gradients that are not finite from step ``first`` on."""
    parameter = next(trainer.model.parameters())
    parameter.register_hook(
        lambda gradient: gradient * float("nan") if trainer._progress.step + 1 >= first else gradient
    )


def names(run):
    return [path.name for path in checkpoints(run)]


def test_a_run_that_diverges_keeps_its_good_checkpoints_and_goes_on_from_them(tmp_path, make_run):
    settings = {"steps": 12, "checkpoint_every": 1, "keep_checkpoints": 2, "eval_every": None, "max_skipped": 3}
    trainer = Trainer(make_run(**settings), tmp_path)
    poison(trainer, 5)
    with pytest.raises(
        AnabranchError, match=r"at step 7: .*resume with a lower train.learning_rate.* from step-00000003"
    ):
        trainer.fit()
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    # What diverged is kept too, out of the way.
    assert read_checkpoint(tmp_path / "checkpoints/diverged-step-00000004")[0]["step"] == 4
    with pytest.raises(ConfigError, match=r"train.learning_rate was 0.01 and is now 0.1; change it back"):
        Trainer(make_run(**settings, learning_rate=0.1), tmp_path, resume=True)
    result = Trainer(make_run(**settings, learning_rate=1e-3), tmp_path, resume=True).fit()
    assert (result.status, result.step) == ("finished", 12)
    assert names(tmp_path) == ["step-00000011", "step-00000012"]
    # That it diverged once does not let it begin again in silence when its later checkpoints are lost.
    for path in checkpoints(tmp_path):
        shutil.rmtree(path)
    with pytest.raises(DataError, match="had come to step 12 and has no checkpoint to go on from"):
        Trainer(make_run(**settings, learning_rate=1e-3), tmp_path, resume=True)


def spoil_router(trainer, at, layer):
    """What comes into a router holds a NaN once ``at`` steps are finished."""
    router = trainer.model.blocks[layer].feed_forward.router

    def spoil(module, args):
        x_ND, *others = args
        if trainer._progress.step < at:
            return args
        return torch.where(torch.arange(len(x_ND)).unsqueeze(-1) == 3, torch.nan, x_ND), *others

    router.register_forward_pre_hook(spoil)


@pytest.mark.filterwarnings("default::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scores_that_are_no_numbers_end_a_run_by_their_layer_and_save_nothing(
    tmp_path, make_run, compiled, without_kernels
):
    settings = {"steps": 12, "checkpoint_every": 1, "eval_every": None, "compile": compiled}
    trainer = Trainer(make_run(**settings), tmp_path)
    spoil_router(trainer, 4, 2)
    told = (
        "routers have NaN scores, that of layer 2 first"
        if compiled
        else "the router of layer 2 has NaN scores for 1 of 64 items"
    )
    ends = "resume with a lower train.learning_rate, which goes on from step-00000003"
    with pytest.raises(AnabranchError, match=f"training stopped at step {5 if compiled else 4}: {told}.*; {ends}"):
        trainer.fit()
    assert names(tmp_path)[-1] == "step-00000003"
    assert Trainer(make_run(**settings), tmp_path, resume=True).fit().status == "finished"


def test_scores_that_are_no_numbers_in_an_evaluation_end_a_run_too(tmp_path, make_run):
    trainer = Trainer(make_run(steps=4, checkpoint_every=1, eval_every=2), tmp_path)
    spoil_router(trainer, 2, 0)
    with pytest.raises(AnabranchError, match=r"training stopped at step 2: the router of layer 0 has NaN scores"):
        trainer.fit()
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("keep", [1, 2])
def test_an_update_that_ruins_the_weights_evicts_nothing(tmp_path, make_run, keep):
    settings = {"steps": 12, "checkpoint_every": 1, "keep_checkpoints": keep, "eval_every": None, "max_skipped": 2}
    trainer = Trainer(make_run(**settings), tmp_path)
    apply = trainer._stepper.apply

    def ruin(norm, step):
        apply(norm, step)
        if trainer._progress.step == 3:
            with torch.no_grad():
                trainer.model.embedding.weight.fill_(float("inf"))

    trainer._stepper.apply = ruin
    with pytest.raises(AnabranchError, match=r"from step-00000003"):
        trainer.fit()
    assert names(tmp_path) == ["step-00000002", "step-00000003"][-keep:]
    for path in checkpoints(tmp_path):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())


def test_a_run_that_never_learned_starts_again(tmp_path, make_run):
    settings = {"steps": 4, "checkpoint_every": 1, "max_skipped": 2}
    trainer = Trainer(make_run(**settings), tmp_path)
    poison(trainer, 1)
    with pytest.raises(AnabranchError, match=r"start again with a lower train.learning_rate"):
        trainer.fit()
    assert Trainer(make_run(**settings, learning_rate=1e-3), tmp_path, resume=True).fit().step == 4


def test_the_last_checkpoint_evicts_nothing_when_its_evaluation_is_not_finite(tmp_path, make_run):
    settings = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 1, "eval_every": None}
    trainer = Trainer(make_run(**settings), tmp_path)
    apply = trainer._stepper.apply

    def ruin(norm, step):
        apply(norm, step)
        if trainer._progress.step == 2:
            with torch.no_grad():
                trainer.model.norm.weight.fill_(float("nan"))

    trainer._stepper.apply = ruin
    trainer.fit()
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_an_old_divergence_at_a_later_step_hides_no_lost_checkpoints(tmp_path, make_run):
    settings = {"steps": 8, "checkpoint_every": 2, "eval_every": None, "max_skipped": 2}
    trainer = Trainer(make_run(**settings), tmp_path)
    trainer.fit()
    set_aside(tmp_path, 1)
    assert names(tmp_path) == []
    # The run set all of them aside itself, so it may begin again; that it then comes less far does not matter.
    again = Trainer(make_run(**{**settings, "steps": 4}, learning_rate=1e-3), tmp_path, resume=True)
    assert again.fit().step == 4
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    for path in checkpoints(tmp_path):
        shutil.rmtree(path)
    with pytest.raises(DataError, match="had come to step 4 and has no checkpoint to go on from"):
        Trainer(make_run(**settings, learning_rate=1e-3), tmp_path, resume=True)


def test_what_diverged_before_keeps_its_place(run):
    shutil.copytree(checkpoints(run)[-1], run / "checkpoints/diverged-step-00000002")
    (run / "checkpoints/diverged-step-00000002/trainer.json").write_text("of before")
    (run / "checkpoints/diverged-step-00000002.2").symlink_to("nowhere")
    assert [path.name for path in set_aside(run, 2)] == ["diverged-step-00000002.3"]
    assert (run / "checkpoints/diverged-step-00000002/trainer.json").read_text() == "of before"
    assert read_checkpoint(run / "checkpoints/diverged-step-00000002.3")[0]["step"] == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_what_a_user_keeps_among_the_checkpoints_is_never_taken_for_one(run, make_run, keep):
    held = ("step-best", "step-00000002-good", "step-2", "step-000000002", "step-99999999.old", "diverged-step-best")
    for name in (*held, ".step-best", ".step-00000002-mine"):
        shutil.copytree(checkpoints(run)[-1], run / "checkpoints" / name)
    others = {path.name for path in (run / "checkpoints").iterdir()} - {path.name for path in checkpoints(run)}
    assert len(others) == 8
    assert resumed(run, make_run, steps=4, keep_checkpoints=keep).fit().step == 4
    assert [path.name for path in checkpoints(run)] == ["step-00000003", "step-00000004"][-keep:]
    assert {path.name for path in (run / "checkpoints").iterdir()} - {path.name for path in checkpoints(run)} == others
    assert find_model(run) == checkpoints(run)[-1]
    set_aside(run, 1)
    assert {path.name for path in (run / "checkpoints").iterdir()} >= others


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (100_000_000, 99_999_999, 5):
        path = checkpoint_path(tmp_path, step)
        path.mkdir(parents=True)
        for name in ("trainer.json", "config.json"):
            (path / name).write_text("{}")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005", "step-99999999", "step-100000000"]
    assert find_model(tmp_path).name == "step-100000000"
    set_aside(tmp_path, 100_000_000)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005", "step-99999999"]
