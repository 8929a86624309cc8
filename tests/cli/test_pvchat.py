"""``anabranch pvchat``, from a folder of drawings to an answer."""

import importlib
import json
import os
import signal

import pytest
from PIL import Image

from drawn_subjects import picture, write_drawings, write_runs

TINY = [
    "--set=model.dim=32",
    "--set=model.frames=4",
    "--set=model.num_queries=4",
    "--set=model.personal_tokens=2",
    "--set=batch_size=4",
    "--set=held_out=8",
    "--device",
    "cpu",
]
FEW = [
    "--set=data.positives=2",
    "--set=data.augmented=1",
    "--set=data.hard_negatives=2",
    "--set=data.easy_negatives=1",
    "--image-steps",
    "2",
    "--video-steps",
    "2",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    return write_drawings(tmp_path_factory.mktemp("drawn") / "drawings")


@pytest.fixture(scope="module")
def base(drawings, tmp_path_factory):
    """The run of a model that knows the subjects of the first group."""
    from anabranch.cli.main import main

    out = tmp_path_factory.mktemp("base") / "run"
    line = ["pvchat", "pretrain", str(drawings), "--groups", "one", "--out", str(out), "--steps", "2", "--clips", "8"]
    assert main([*line, *TINY, "--quiet"]) == 0
    return out


def test_from_drawings_to_an_answer(here, drawings, base, tmp_path):
    run = tmp_path / "run"
    code, out, err = here(
        "pvchat", "learn", base, "two/a:0", "--name", "<Ab>", "--bank", drawings, "--out", run, *FEW, "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert (told["status"], told["model"]) == ("finished", str(run / "model"))
    told = told["subjects"]["<Ab>"] | {"stages": told["stages"]}
    assert told["subject"] == "two/a"
    assert told["balance"]["clips"] == {"positive": 2, "augmented": 1, "hard": 2, "easy": 1}
    assert len(told["look_alikes"]) == 2
    assert all(found["subject"] != "two/a" for found in told["look_alikes"])
    assert {stage: found["step"] for stage, found in told["stages"].items()} == {"images": 2, "videos": 2}
    clips = tmp_path / "clips"
    code, out, err = here(
        "pvchat", "compose", drawings, "--subject", "two/a", "--out", clips, "--count", 2, "--frames", 4, "--json"
    )
    assert code == 0, err
    lines = [json.loads(line) for line in (clips / "clips.jsonl").read_text().splitlines()]
    assert lines == json.loads(out)["clips"]
    assert all(line["actors"][0]["subject"] == "two/a" for line in lines)
    asked = ["is <Ab> in the video ?", "where is <Ab> ?"]
    code, out, err = here("pvchat", "ask", run, clips / "0000.webp", *asked, "--json")
    assert code == 0, err
    assert [each["question"] for each in json.loads(out)["answers"]] == asked
    assert json.loads(out)["frames"] == 4
    answers = [each["answer"] for each in json.loads(out)["answers"]]
    code, out, _ = here("pvchat", "ask", run / "model", clips / "0000.webp", *asked)
    assert out.splitlines() == answers
    code, out, err = here(
        "pvchat", "eval", run, drawings, "--name", "<Ab>", "--subject", "two/a", "--without", 0, "--clips", 8, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert set(found["kinds"]) == {"existence", "appearance", "action", "location"}
    assert 0 <= found["balanced"] <= 1
    code, out, _ = here("pvchat", "eval", run, drawings, "--name", "<Ab>", "--subject", "two/a", "--clips", 8)
    assert code == 0
    assert "existence" in out
    assert "chance 0.5" in out


def test_a_second_subject_of_a_file(here, drawings, base, tmp_path):
    picture(77, 1).save(tmp_path / "cat.png")
    first, second = tmp_path / "first", tmp_path / "second"
    assert here("pvchat", "learn", base, "two/b", "--name", "<b>", "--bank", drawings, "--out", first, *FEW)[0] == 0
    line = [
        "pvchat",
        "learn",
        first,
        tmp_path / "cat.png",
        "--name",
        "<cat>",
        "--bank",
        drawings,
        "--out",
        second,
        *FEW,
    ]
    code, out, err = here(*line)
    assert code == 0, err
    assert "<cat>   cat: 2 positive, 1 augmented, 2 hard, 1 easy clips" in out
    assert f"next    anabranch pvchat ask {second} CLIP 'is <cat> here ?'" in out
    assert here("pvchat", "ask", second, tmp_path / "cat.png", "is <b> here ?", "is <cat> here ?")[0] == 0
    # A drawing of the bank is of who it is, though it is named by its file.
    line = ["pvchat", "learn", base, drawings / "two" / "c" / "1.png", "--name", "<c>", "--bank", drawings]
    code, out, _ = here(*line, "--out", tmp_path / "third", *FEW, "--json")
    found = json.loads(out)["subjects"]["<c>"]
    assert found["subject"] == "two/c"
    assert all(each["subject"] != "two/c" for each in found["look_alikes"])


def test_a_subject_of_a_clip(here, drawings, base, tmp_path):
    """From a clip that compose made to an answer about it."""
    line = [
        "pvchat",
        "compose",
        drawings,
        "--subject",
        "two/a",
        "--count",
        12,
        "--frames",
        6,
        "--out",
        tmp_path / "clips",
    ]
    assert here(*line)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "clips" / "clips.jsonl").read_text().splitlines()]
    file = tmp_path / "clips" / next(line["file"] for line in lines if len(line["actors"]) == 1)
    line = ["pvchat", "learn", base, file, "--name", "<Ab>", "--bank", drawings, "--out"]
    code, out, err = here(*line, tmp_path / "run", *FEW, "--json")
    assert code == 0, err
    told = json.loads(out)["subjects"]["<Ab>"]
    assert (told["subject"], told["views"]) == (file.stem, 6)
    assert told["balance"]["clips"] == {"positive": 2, "augmented": 1, "hard": 2, "easy": 1}
    code, out, err = here(*line, tmp_path / "again", *FEW)
    assert code == 0, err
    assert f"<Ab>   {file.stem}, cut out of 6 frames: 2 positive" in out
    assert here("pvchat", "ask", tmp_path / "run", file, "is <Ab> here ?")[0] == 0
    # Two blocks that go their ways.
    (tmp_path / "two").mkdir()
    for number in range(5):
        frame = Image.new("RGB", (60, 60))
        for at in ((5 + 6 * number, 5), (40 - 6 * number, 45)):
            frame.paste((250, 250, 250), (*at, at[0] + 9, at[1] + 9))
        frame.save(tmp_path / "two" / f"{number}.png")
    line = [
        "pvchat",
        "learn",
        base,
        tmp_path / "two",
        "--name",
        "<Ab>",
        "--bank",
        drawings,
        "--out",
        tmp_path / "x",
        *FEW,
    ]
    code, out, err = here(*line, "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "two: several things move in 5 of 5 frames; give a clip in which the subject alone moves" in err


def test_two_subjects_at_once(here, drawings, base, tmp_path):
    run = tmp_path / "run"
    line = [
        "pvchat",
        "learn",
        base,
        "two/a",
        "two/b:1",
        "--name",
        "<a>",
        "--name",
        "<b>",
        "--bank",
        drawings,
        "--out",
        run,
    ]
    code, out, err = here(*line, *FEW, "--json")
    assert code == 0, err
    assert {name: found["subject"] for name, found in json.loads(out)["subjects"].items()} == {
        "<a>": "two/a",
        "<b>": "two/b",
    }
    assert here("pvchat", "ask", run, drawings / "two" / "a" / "1.png", "are <a> and <b> here ?")[0] == 0


def test_what_there_is_to_be_warned_of(here, drawings, base, tmp_path):
    none = ["--set=data.hard_negatives=0", "--set=data.easy_negatives=0"]
    line = ["pvchat", "learn", base, "two/a", "--name", "<Ab>", "--bank", drawings, "--out", tmp_path / "run"]
    code, _, err = here(*line, *FEW, *none, "--quiet")
    assert code == 0
    assert err.strip() == "warning: <Ab> has no negatives: a model that never sees others says yes to everything"
    picture(1, 1).save(tmp_path / "a.png")
    code, _, err = here("pvchat", "ask", tmp_path / "run", tmp_path / "a.png", "is my <Ab> here ?")
    assert (code, err.strip()) == (0, "warning: the model does not know 'my' in 'is my <Ab> here ?'")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("pretrain {d}/no --out {t}/x", "there is no .*no; name a folder of drawings"),
        ("pretrain {d} --groups three --out {t}/x", "has no group 'three'; it has one, two"),
        ("pretrain {d} --groups one,, --out {t}/x", "--groups is 'one,,'"),
        ("pretrain {d} --out {d}/x", "would be lost"),
        ("pretrain {d} --out {b}", "already holds a run"),
        ("pretrain {d} --out {t}/x --resume", "no training run"),
        ("pretrain {d} --out {t}/x --set model.dim=33", "not a multiple of num_heads"),
        ("pretrain {d} --out {t}/x --set model.heads.num_shared=8", "num_shared is 8"),
        ("pretrain {d} --out {t}/x --set model.heads.target=1", "target is 1"),
        ("pretrain {d} --out {t}/x --set clip=9", "did you mean 'clips'"),
        ("learn {t}/none two/a --name <a> --bank {d} --out {t}/x", "there is no model in"),
        ("learn {d} two/a --name <a> --bank {d} --out {t}/x", "there is no model in"),
        ("learn {b} two/z --name <a> --bank {d} --out {t}/x", "neither a picture or clip nor a subject"),
        (
            "learn {b} {d}/two/a --name <a> --bank {d} --out {t}/x",
            "holds drawings of two/a in the bank; name one, as two/a:0",
        ),
        ("learn {b} {d}/two --name <a> --bank {d} --out {t}/x", "holds no frames"),
        ("learn {b} two/a:9 --name <a> --bank {d} --out {t}/x", "has drawings 0 to 2, not 9"),
        ("learn {b} two/a two/b --name <a> --bank {d} --out {t}/x", "2 references and 1 different names"),
        ("learn {b} two/a two/b --name <a> --name <a> --bank {d} --out {t}/x", "2 references and 1 different names"),
        ("learn {b} two/a --name a --bank {d} --out {t}/x", "must be a word in angle brackets"),
        ("learn {b} two/a --name <one/a> --bank {d} --out {t}/x", "in the vocabulary already"),
        ("learn {b} two/a --name <a> --bank {d} --out {b}", "would be lost"),
        ("learn {b} two/a --name <a> --bank {d} --out {t}/x --image-steps 0 --video-steps 0", "are both 0"),
        ("learn {b} two/a --name <a> --bank {d} --groups two --out {t}/x --set data.seed=-1", "seed is -1"),
        ("ask {b} {d}/one/a/0.png here", "names nobody"),
        ("ask {b} {d}/one/a/0.png <no>", "no subject is named '<no>'"),
        ("ask {b} {d}/one/a/9.png <one/a>", "cannot read"),
        ("ask {b} {d}/one <one/a>", "holds no frames"),
        ("ask {b}/checkpoints {d}/one/a/0.png <one/a>", "there is no model in"),
        ("eval {b} {d} --name <one/a> --subject one/z", "has no subject 'one/z'"),
        ("eval {b} {d} --name <no> --subject one/a", "no subject is named '<no>'"),
        ("compose {d} --out {t}/x --subject one/z", "has no subject 'one/z'"),
        ("compose {d} --out {d}", "would be lost"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(here, drawings, base, tmp_path, line, match):
    import re

    words = [word.format(d=drawings, b=base, t=tmp_path) for word in line.split()]
    code, out, err = here("pvchat", *words, *(["--quiet"] if words[0] in ("pretrain", "learn") else []))
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1, err
    assert re.search(match, err), err
    assert not (tmp_path / "x" / "model").exists()


def test_of_several_subjects_which_is_it(here, drawings, base, tmp_path):
    runs, out = write_runs(tmp_path / "runs", runs=2), tmp_path / "out"
    line = ["pvchat", "ways", base, runs, "--bank", drawings, "--out", out, "--clips", 1, "--set=batch_size=4", *FEW]
    code, told, err = here(*line, "--json", "--quiet")
    assert code == 0, err
    told = json.loads(told)
    assert told == json.loads((out / "ways.json").read_text())
    assert [each["name"] for each in told["runs"]] == ["run01", "run02"]
    assert told["chance"] == pytest.approx(1 / 3)
    assert told["right"] == pytest.approx(sum(each["right"] for each in told["runs"]) / 2)
    for each in told["runs"]:
        pairs = list(zip(each["chosen"], each["answers"], strict=True))
        assert each["right"] == pytest.approx(sum(one == other for one, other in pairs) / 3)
    # Nothing is learned anew.
    code, again, err = here(*line, "--resume", "--quiet")
    assert code == 0, err
    assert "run02" in again
    assert json.loads((out / "ways.json").read_text()) == told
    code, _, err = here(*line, "--only", "run07")
    assert code == 2
    assert "has no run 'run07'; it has run01, run02" in err
    code, _, err = here(*line, "--only", ",")
    assert code == 2
    assert "--only is ','; write names with commas between them" in err


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_trials_that_are_interrupted_end_with_the_code_of_the_signal(
    here, drawings, base, tmp_path, monkeypatch, name, code
):
    runs, out = write_runs(tmp_path / "runs", runs=1), tmp_path / "out"
    sent = []

    def stop(stage, event):
        # Once: the second would end the process.
        if not sent:
            sent.append(name)
            os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(importlib.import_module("anabranch.cli.pvchat.ways"), "shown", lambda *_: stop)
    line = ["pvchat", "ways", base, runs, "--bank", drawings, "--out", out, "--clips", 1, "--set=batch_size=4", *FEW]
    found, told, err = here(*line, "--quiet")
    assert (found, err) == (code, "")
    assert "the same line with --resume" in told


@pytest.mark.parametrize(
    "truth", [None, "mine", '{"file": "0000.webp"}', '[{"file": "2004.gif", "actors": []}]', "{", "1"]
)
def test_pictures_that_are_somebodys_are_not_replaced_by_clips(here, drawings, tmp_path, truth):
    """Whatever their names: a folder of numbers is how a camera writes, too."""
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "2004.gif").write_text("a photograph of 2004")
    if truth is not None:
        (clips / "clips.jsonl").write_text(truth)
    line = ["pvchat", "compose", drawings, "--out", clips, "--count", 1, "--frames", 2]
    code, _, err = here(*line)
    assert code == 2
    assert "which would be lost if it were replaced" in err
    assert (clips / "2004.gif").read_text() == "a photograph of 2004"


def test_clips_of_before_are_replaced_and_what_lies_beside_them_is_not(here, drawings, tmp_path):
    clips = tmp_path / "clips"
    line = ["pvchat", "compose", drawings, "--out", clips, "--frames", 2]
    assert here(*line, "--count", 2)[0] == 0
    assert here(*line, "--count", 1, "--kind", "gif")[0] == 0
    assert sorted(path.name for path in clips.iterdir()) == ["0000.gif", "clips.jsonl"]
    (clips / "0001.gif").write_text("mine")
    code, _, err = here(*line, "--count", 1)
    assert (code, "holds 0001.gif" in err) == (2, True)
    assert (clips / "0001.gif").read_text() == "mine"
