"""A training ends where no evaluation is better for long, and what is kept of it is the best."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from anabranch.errors import CapacityError, CheckpointError, ConfigError
from anabranch.lm import load_model
from anabranch.lm.checkpoint import find_model
from anabranch.lm.folder import RECORD, files_of, run_bests, run_of
from anabranch.train import Trainer, checkpoints, read_metrics
from anabranch.train.best import TOLD
from anabranch.train.config import DiLoCoConfig, ElasticConfig, Parallel, TrainConfig
from ranks import run_ranks
from scripted_evaluations import EVERY, Rising, Scripted, Unsaid, scripted_run

TIMES = {"seconds", "items_per_second", "tokens_per_second"}
LOSSES = (5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 2.0)


class Crash(BaseException):
    """Ends a process on the spot."""


def crash_at(kind, step):
    def react(event):
        if (event.kind, event.step) == (kind, step):
            raise Crash

    return react


def evaluations(out):
    return [record for record in read_metrics(out) if record["kind"] == "validation"]


def lines(out):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in read_metrics(out)]


def everything(out):
    """All that a run leaves but times: files by their place, of checkpoints and of the best weights."""
    found = {}
    for folder in [*checkpoints(out), *run_bests(out)]:
        for file in sorted(folder.iterdir()):
            place = f"{folder.name}/{file.name}"
            if file.suffix == ".safetensors":
                found[place] = {name: value.tolist() for name, value in load_file(file).items()}
            elif file.name == "trainer.json":
                found[place] = json.loads(file.read_text())
                del found[place]["progress"]["seconds"]
            elif file.name != RECORD:
                found[place] = file.read_text()
    return lines(out), found


def weights(model):
    return {name: value.tolist() for name, value in model.state_dict().items()}


def stored(folder):
    return {name: value.tolist() for name, value in load_file(folder / "model.safetensors").items()}


# When it ends

NAN, INFINITE, MINUS_INFINITE = None, "inf", "-inf"
ENDS = {
    "never worse": ((5, 4, 3, 2), 1, 8, 8, False),
    "one that is not better": (LOSSES, 1, 6, 4, True),
    "two in a row": (LOSSES, 2, 12, 8, True),
    "three in a row never come": (LOSSES, 3, 14, 14, False),
    "as good is not better": ((5, 5, 5, 5), 2, 6, 2, True),
    "the last one counts": ((5, 6, 6, 4), 3, 8, 8, False),
    "all steps are made where the last evaluation is the one": ((5, 6, 7), 2, 6, 2, False),
    "not a number is not better": ((5, NAN, NAN, 4), 2, 6, 2, True),
    "not a number is no best": ((NAN, 6, 7, 8), 2, 8, 4, False),
    "nothing but not a number": ((NAN, NAN, NAN), 2, 4, None, True),
    "infinite is not better": ((INFINITE, MINUS_INFINITE, 6), 2, 4, None, True),
    "patience beyond all": ((5, 6, 7), 99, 6, 2, False),
}


@pytest.mark.parametrize("case", ENDS)
def test_it_ends_where_patience_does(tmp_path, case):
    losses, patience, last, best, is_early = ENDS[case]
    events = []
    trainer = Trainer(scripted_run(losses, patience=patience), tmp_path, on_event=events.append)
    result = trainer.fit()
    assert (result.status, result.step, result.best_step, result.stopped_early) == ("finished", last, best, is_early)
    # Nothing is kept where nobody asks.
    assert (result.best, result.written_step, run_bests(tmp_path)) == (None, last, [])
    assert result.written == result.checkpoint == checkpoints(tmp_path)[-1]
    told = evaluations(tmp_path)
    assert [record["step"] for record in told] == list(range(EVERY, last + 1, EVERY))
    assert [record["stopped_early"] for record in told] == [False] * (len(told) - 1) + [is_early]
    assert (told[-1]["best_step"], told[-1]["since_best"]) == (best, (last - (best or 0)) // EVERY)
    shown = [event.values for event in events if event.kind == "evaluation"]
    assert [[values[name] for name in TOLD] for values in shown] == [[record[name] for name in TOLD] for record in told]


def test_steps_before_the_end_are_those_of_the_whole_training(tmp_path):
    """The learning rate goes down as it would over all steps."""
    Trainer(scripted_run(LOSSES, keep_checkpoints=9, checkpoint_every=EVERY), tmp_path / "whole").fit()
    Trainer(scripted_run(LOSSES, patience=1, checkpoint_every=None), tmp_path / "early").fit()
    (end,) = checkpoints(tmp_path / "early")
    for file in ("model.safetensors", "optimizer.safetensors"):
        whole = load_file(tmp_path / "whole/checkpoints/step-00000006" / file)
        assert [name for name, value in load_file(end / file).items() if not torch.equal(value, whole[name])] == []
    early, whole = (
        [record for record in lines(tmp_path / name) if record["kind"] == "train"] for name in ("early", "whole")
    )
    assert early == whole[:6]


def test_a_run_that_asks_for_nothing_says_nothing_of_it(tmp_path):
    result = Trainer(scripted_run(LOSSES), tmp_path).fit()
    assert (result.stopped_early, result.best_step, result.best, result.written_step) == (False, None, None, 14)
    assert not any(set(TOLD) & record.keys() for record in read_metrics(tmp_path))
    assert all("best" not in json.loads((path / "trainer.json").read_text()) for path in checkpoints(tmp_path))


def test_a_headline_that_is_to_be_high(tmp_path):
    result = Trainer(scripted_run((0.1, 0.3, 0.2, 0.2), task=Rising, patience=2, keep_best=True), tmp_path).fit()
    assert (result.step, result.best_step, result.headline) == (8, 4, 0.3)


# What is kept


@pytest.mark.parametrize("patience", [None, 2])
def test_what_is_written_is_the_best(tmp_path, patience):
    losses = (5.0, 4.0, 4.5, 4.6, 4.7)
    Trainer(scripted_run(losses, keep_checkpoints=9, checkpoint_every=EVERY), tmp_path / "whole").fit()
    run = scripted_run(losses, patience=patience, keep_best=True, keep_checkpoints=1)
    trainer = Trainer(run, tmp_path / "best")
    result = trainer.fit()
    last = 10 if patience is None else 8
    assert (result.step, result.written_step, result.best_step) == (last, 4, 4)
    assert (result.headline, result.measures["step"]) == (4.0, 4)
    assert result.best == result.written == tmp_path / "best/checkpoints/best-00000004"
    assert result.checkpoint == checkpoints(tmp_path / "best")[-1]
    at_4 = stored(tmp_path / "whole/checkpoints/step-00000004")
    assert stored(result.best) == weights(trainer.model) == at_4
    # A run goes on from where it was, with the moments of there.
    assert stored(result.checkpoint) == stored(tmp_path / f"whole/checkpoints/step-{last:08d}") != at_4


def test_the_best_is_the_last(tmp_path):
    trainer = Trainer(scripted_run((3.0, 2.0), keep_best=True), tmp_path)
    result = trainer.fit()
    assert (result.written_step, result.best) == (4, tmp_path / "checkpoints/best-00000004")
    assert stored(result.best) == stored(result.checkpoint) == weights(trainer.model)


def test_where_none_is_finite_the_last_is_written(tmp_path):
    trainer = Trainer(scripted_run((NAN, NAN), keep_best=True), tmp_path)
    result = trainer.fit()
    assert (result.written_step, result.best, result.written) == (4, None, result.checkpoint)
    assert weights(trainer.model) == stored(result.checkpoint)


def test_checkpoints_come_and_go_and_the_best_stays(tmp_path):
    seen = {}

    def look(event):
        if event.kind == "step":
            seen[event.step] = (
                [path.name for path in run_bests(tmp_path)],
                [path.name for path in checkpoints(tmp_path)],
            )

    run = scripted_run((5.0, 3.0, 4.0, 4.0, 2.0, 4.0), keep_best=True, keep_checkpoints=1, checkpoint_every=1)
    Trainer(run, tmp_path, on_event=look).fit()
    assert seen[9] == (["best-00000004"], ["step-00000008"])
    # What a checkpoint that is there tells of stays until that has gone: it may be resumed.
    assert [path.name for path in run_bests(tmp_path)] == ["best-00000010"]
    for step, (bests, kept) in seen.items():
        told = [
            json.loads((tmp_path / "checkpoints" / name / "trainer.json").read_text())
            for name in kept
            if (tmp_path / "checkpoints" / name).exists()
        ]
        for state in told:
            if state["best"]["evaluation"] is not None and state["step"] > 10:
                assert f"best-{state['best']['evaluation']['step']:08d}" in bests, step


def test_no_room_for_the_best_leaves_what_was_the_best_before(tmp_path, monkeypatch):
    run = scripted_run(LOSSES, keep_best=True, patience=2)
    Trainer(run, tmp_path / "straight").fit()
    real, calls = Scripted.save, []

    def save(self, folder, model, tensors):
        if "best-00000008" in folder.name:
            calls.append(1)
            raise OSError(28, "No space left on device")
        real(self, folder, model, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Scripted, "save", save)
        with pytest.raises((CapacityError, OSError)):
            Trainer(run, tmp_path / "full").fit()
    assert calls
    # That of step 2 is of the checkpoint of step 3.
    assert [path.name for path in run_bests(tmp_path / "full")] == ["best-00000002", "best-00000004"]
    state = json.loads((checkpoints(tmp_path / "full")[-1] / "trainer.json").read_text())
    assert state["best"]["evaluation"]["step"] == 4
    assert Trainer(run, tmp_path / "full", resume=True).fit().status == "finished"


# Going on


@pytest.mark.parametrize("every", [None, 3, 1])
@pytest.mark.parametrize("kind", ["evaluation", "checkpoint", "step"])
def test_resumed_to_the_bit_wherever_it_was_killed(tmp_path, kind, every):
    run = scripted_run(LOSSES, patience=2, keep_best=True, keep_checkpoints=2, checkpoint_every=every)
    events = []
    Trainer(run, tmp_path / "straight", on_event=lambda event: events.append((event.kind, event.step))).fit()
    expected = everything(tmp_path / "straight")
    for step in [step for name, step in events if name == kind]:
        out = tmp_path / f"killed-{step}"
        with pytest.raises(Crash):
            Trainer(run, out, on_event=crash_at(kind, step)).fit()
        result = Trainer(run, out, resume=True).fit()
        assert (result.step, result.best_step, result.stopped_early) == (12, 8, True)
        assert everything(out) == expected


def test_a_run_that_ended_stays_so_and_is_the_best_again(tmp_path):
    run = scripted_run(LOSSES, patience=2, keep_best=True)
    first = Trainer(run, tmp_path)
    result = first.fit()
    before = everything(tmp_path)
    second = Trainer(run, tmp_path, resume=True)
    again = second.fit()
    told = ("step", "best_step", "stopped_early", "measures", "headline", "written_step", "best", "checkpoint")
    assert [getattr(again, name) for name in told] == [getattr(result, name) for name in told]
    assert weights(second.model) == weights(first.model) == stored(result.best)
    assert everything(tmp_path) == before


def test_more_patience_goes_on_from_the_last_step(tmp_path):
    run = scripted_run(LOSSES, patience=5, keep_best=True)
    Trainer(run, tmp_path / "straight").fit()
    Trainer(run.replace(train=run.train.replace(patience=2)), tmp_path / "twice").fit()
    result = Trainer(run, tmp_path / "twice", resume=True).fit()
    assert (result.step, result.best_step, result.stopped_early) == (14, 14, False)
    straight, twice = everything(tmp_path / "straight")[1], everything(tmp_path / "twice")[1]
    last = "step-00000014/model.safetensors"
    assert straight[last] == twice[last]
    none = run.replace(train=run.train.replace(patience=None))
    assert Trainer(none, tmp_path / "twice", resume=True).fit().stopped_early is False


def test_patience_that_comes_later_counts_from_there(tmp_path):
    """Also of a run of before there was any: its checkpoints say nothing of it."""
    plain = scripted_run((3.0, 4.0, 3.5, 5.0, 5.0), checkpoint_every=EVERY)
    with pytest.raises(Crash):
        Trainer(plain, tmp_path, on_event=crash_at("checkpoint", 4)).fit()
    result = Trainer(plain.replace(train=plain.train.replace(patience=2)), tmp_path, resume=True).fit()
    assert (result.step, result.best_step, result.stopped_early) == (10, 6, False)


def test_the_best_is_not_looked_for_from_the_middle_but_may_be_let_go(tmp_path):
    run = scripted_run((3.0, 4.0), keep_best=True)
    plain = run.replace(train=run.train.replace(keep_best=False))
    Trainer(run, tmp_path / "kept").fit()
    Trainer(plain, tmp_path / "plain").fit()
    with pytest.raises(ConfigError, match=r"train\.keep_best was False and is now True; change it back, or start"):
        Trainer(run, tmp_path / "plain", resume=True)
    assert [path.name for path in run_bests(tmp_path / "kept")] == ["best-00000002"]
    assert Trainer(plain, tmp_path / "kept", resume=True).fit().written_step == 4
    # Nobody takes it for what the run is.
    assert run_bests(tmp_path / "kept") == []


def test_weights_that_are_gone_or_damaged_are_told(tmp_path):
    run = scripted_run((3.0, 4.0), keep_best=True)
    best = Trainer(run, tmp_path).fit().best
    whole = (best / "model.safetensors").read_bytes()
    (best / "model.safetensors").write_bytes(whole[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"best-00000002/model\.safetensors: it is damaged"):
        Trainer(run, tmp_path, resume=True).fit()
    shutil.rmtree(best)
    with pytest.raises(CheckpointError, match=r"best-00000002 is gone, .*put it back, or .*train\.keep_best=false"):
        Trainer(run, tmp_path, resume=True)
    plain = run.replace(train=run.train.replace(keep_best=False))
    assert Trainer(plain, tmp_path, resume=True).fit().step == 4


def test_a_copy_of_a_checkpoint_is_nobodys_best(tmp_path):
    """Whatever somebody calls it: it is neither loaded nor removed."""
    Trainer(scripted_run((3.0, 4.0)), tmp_path).fit()
    copy = tmp_path / "checkpoints/best-00000002"
    shutil.copytree(checkpoints(tmp_path)[-1], copy)
    assert find_model(tmp_path) == checkpoints(tmp_path)[-1]
    Trainer(scripted_run((3.0, 4.0)), tmp_path, resume=True).fit()
    assert copy.is_dir()


def test_leftovers_of_the_best_are_removed(tmp_path):
    run = scripted_run((3.0, 4.0), keep_best=True)
    Trainer(run, tmp_path).fit()
    for name in (".best-00000009.x1y2_3z4", ".best-00000001.old", "best-00000009"):
        (tmp_path / "checkpoints" / name).mkdir()
    Trainer(run, tmp_path, resume=True).fit()
    assert [path.name for path in run_bests(tmp_path)] == ["best-00000002"]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


# What is refused

BESIDE = {
    "parallel.elastic.coordinator": Parallel(elastic=ElasticConfig(coordinator="127.0.0.1:1")),
    "parallel.diloco.master": Parallel(diloco=DiLoCoConfig(master="127.0.0.1:1")),
}


@pytest.mark.parametrize(
    ("wanted", "told"), [({"patience": 3}, "patience is 3"), ({"keep_best": True}, "keep_best is True")]
)
def test_what_cannot_be_looked_for_is_refused(tmp_path, make_run, wanted, told):
    with pytest.raises(ConfigError, match=rf"^{told}, and eval_every is None, so .*; set eval_every to the steps"):
        TrainConfig(eval_every=None, **wanted)
    with pytest.raises(ConfigError, match=rf"^train\.{told}, and no data are held out, .*Task\.validation_data"):
        Trainer(scripted_run((1.0,), holds_out=False, **wanted), tmp_path / "none")
    text = make_run(**wanted)
    with pytest.raises(ConfigError, match=r"no text are held out, .*set data\.validation_fraction above 0"):
        Trainer(text.replace(data=text.data.replace(validation_fraction=0.0)), tmp_path / "none")
    with pytest.raises(
        ConfigError, match=rf"^train\.{told}, and Unsaid does not say .* headline, accuracy; say so in Task"
    ):
        Trainer(scripted_run((1.0,), task=Unsaid, **wanted), tmp_path / "none")
    for name, parallel in BESIDE.items():
        with pytest.raises(
            ConfigError, match=rf"^train\.{told}, and {name} is '127.0.0.1:1', where processes come and go"
        ):
            Trainer(scripted_run((1.0,), **wanted).replace(parallel=parallel), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("patience", [0, -1])
def test_no_patience_is_none_and_not_0(patience):
    with pytest.raises(ConfigError, match=rf"patience is {patience}; it must be greater than or equal to 1"):
        TrainConfig(patience=patience)


# As a model


def test_a_run_as_a_model_is_its_best(tmp_path, make_run, monkeypatch):
    """A language model: the second evaluation is the better one of three, as its losses are told."""
    from anabranch.train import LanguageModel

    real = LanguageModel.evaluate

    def evaluate(self, model, data, context):
        return real(self, model, data, context) | {"nats_per_token": {2: 3.0, 4: 2.0, 6: 2.5}[context.step]}

    monkeypatch.setattr(LanguageModel, "evaluate", evaluate)
    settings = {"eval_every": 2, "checkpoint_every": 2, "keep_checkpoints": 9}
    Trainer(make_run(**settings), tmp_path / "whole").fit()
    trainer = Trainer(make_run(keep_best=True, **settings), tmp_path / "run")
    result = trainer.fit()
    assert find_model(tmp_path / "run") == result.best == tmp_path / "run/checkpoints/best-00000004"
    assert run_of(result.best) == tmp_path / "run"
    assert result.best / "model.safetensors" in files_of(tmp_path / "run")
    found, tokenizer = load_model(tmp_path / "run")
    at_4, _ = load_model(tmp_path / "whole/checkpoints/step-00000004")
    assert weights(found) == weights(at_4) == weights(trainer.model)
    assert tokenizer is not None
    # What follows from the step alone, such as how many experts may be taken, is that of the best as well.
    token_BL = torch.arange(16)[None]
    at_4.eval(), trainer.model.eval()
    assert torch.equal(at_4(token_BL).logits_BLV, trainer.model(token_BL).logits_BLV)


def test_no_model_is_saved_over_the_best(tmp_path, make_run):
    from anabranch.lm import save_model

    trainer = Trainer(make_run(keep_best=True, steps=3), tmp_path)
    best = trainer.fit().best
    model, tokenizer = load_model(best)
    for place, told in ((best, "would be taken for a checkpoint"), (best / "in", "lies inside the best weights")):
        with pytest.raises(CheckpointError, match=told):
            save_model(place, model, tokenizer)


# Several processes

SHARED = """
from scripted_evaluations import scripted_run
from anabranch.train import Trainer
for way in ("ddp", "fsdp"):
    run = scripted_run((5.0, 4.0, 4.5, 4.6, 1.0), others=(1.0, 2.0, 0.5, 0.1, 3.0), patience=2, keep_best=True, parallel=way)
    trainer = Trainer(run, "{folder}/" + way)
    result = trainer.fit()
    print(way, result.step, result.best_step, result.stopped_early, result.best.name)
"""


def test_processes_end_together_where_the_first_says(tmp_path):
    """What they measure may differ in the last bit; here it differs in all."""
    expected = scripted_run((5.0, 4.0, 4.5, 4.6, 1.0), patience=2, keep_best=True)
    one = Trainer(expected, tmp_path / "one").fit()
    outputs = run_ranks(SHARED.format(folder=tmp_path))
    assert outputs[0] == outputs[1] == "ddp 8 4 True best-00000004\nfsdp 8 4 True best-00000004\n"
    for way in ("ddp", "fsdp"):
        best = tmp_path / way / "checkpoints/best-00000004"
        assert [path.name for path in run_bests(tmp_path / way)] == [best.name]
        ours, theirs = load_file(best / "model.safetensors"), load_file(one.best / "model.safetensors")
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)
        # One process goes on with what two wrote, and has the best in the end.
        alone = expected.replace(train=expected.train.replace(parallel="none"))
        trainer = Trainer(
            alone.replace(task=Scripted.Config(losses=(5.0, 4.0, 4.5, 4.6, 1.0), others=(1.0, 2.0, 0.5, 0.1, 3.0))),
            tmp_path / way,
            resume=True,
        )
        assert trainer.fit().written_step == 4
        assert weights(trainer.model) == stored(best)


STAGES = """
from anabranch.train import Trainer, read_run_config
result = Trainer(read_run_config("{folder}/stages.config"), "{folder}/stages").fit()
print(result.step, result.best_step, result.stopped_early, repr(result.nats_per_token))
"""


def test_stages_of_a_pipeline_keep_the_whole_best(tmp_path, make_run, dense_model):
    run = make_run(dense_model, steps=8, eval_every=2, keep_best=True, patience=1, learning_rate=1.0)
    one = Trainer(run, tmp_path / "one").fit()
    (tmp_path / "stages.config").mkdir()
    run.replace(parallel=Parallel(pipeline=2)).save(tmp_path / "stages.config")
    outputs = run_ranks(STAGES.format(folder=tmp_path))
    assert outputs[0] == outputs[1]
    told = outputs[0].split()
    assert told[:3] == [str(one.step), str(one.best_step), str(one.stopped_early)]
    (ours, _), (theirs, _) = (load_model(tmp_path / name) for name in ("one", "stages"))
    for (name, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=2e-2, msg=name)
