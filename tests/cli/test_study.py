import contextlib
import dataclasses
import json
import signal

import pytest

from anabranch import studies
from anabranch.studies.harness import Arm, Column, Study
from anabranch.studies.paired import verdict_below
from anabranch.train.interrupt import Interrupts


def make(full=False, steps=10):
    def run(config, seed, progress):
        progress("half way")
        return {"bits_per_byte": config["base"] + 0.1 * seed + 0.01 * seed**2 * config["base"], "parameters": 10}

    def judge(results):
        return [
            results.claim(
                "bits_per_byte", ours="new", baseline="old", claim="new beats old", paper="-1", verdict=verdict_below
            )
        ]

    return Study(
        name="made_up",
        title="new against old",
        settings={"size": "full" if full else "smoke", "steps": steps},
        arms=[Arm("old", "the baseline", {"base": 2.0}), Arm("new", "ours", {"base": 1.0})],
        run=run,
        judge=judge,
        columns=[Column("bits_per_byte", "bits/byte"), Column("absent", "absent")],
        seeds=(0, 1),
    )


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "made_up", f"{__name__}:make")
    monkeypatch.setattr(studies, "find", lambda name, find=studies.find: make if name == "made_up" else find(name))


def test_table_verdict_and_files(here, work):
    code, out, err = here("study", "made_up", "--out", "studied")
    assert code == 0
    assert "new against old" in out
    assert "new beats old" in out
    assert "not resolved" in out
    assert "absent" not in out  # nothing measured it
    assert "old seed 0 (1 of 4): half way" in err
    assert (work / "studied" / "made_up.json").is_file()
    _, out, err = here("study", "made_up", "--out", "studied", "--quiet", "--json")
    assert err == ""
    assert json.loads(out) == json.loads((work / "studied" / "made_up.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("notes", [False, True])
@pytest.mark.parametrize("at", ["old seed 0", "new seed 0"])
def test_an_interrupted_one_shows_what_has_run(here, work, monkeypatch, number, notes, at):
    """In one line, whether the run under way notes signals, as trainings do, or not; and that run does not count."""

    def said(text):
        if text.endswith("half way") and at in text:
            with Interrupts() if notes else contextlib.nullcontext():
                signal.raise_signal(number)

    monkeypatch.setattr("anabranch.cli.study.say", said)
    out_folder = f"interrupted-{number}-{notes}-{at[:3]}"
    for options in ([], ["--json"]):
        code, out, err = here("study", "made_up", "--out", out_folder, *options)
        assert code == 130
        assert err == "interrupted\n"
        if at.startswith("old"):
            assert out == ""
        elif options:
            assert json.loads(out)["config"]["arms"].keys() == {"old", "new"}
            assert json.loads(out)["seeds"] == [0]
        else:
            assert "old" in out
            assert "not run" in out
    assert not list((work / out_folder).glob(f"made_up/{at[:3]}-seed*.json"))
    assert not (work / out_folder / "made_up.json").exists()


def test_an_interruption_leaves_what_was_judged_before(here, work, monkeypatch):
    """Claims of a whole study, perhaps committed, were written over by those of the one arm that had run again."""
    here("study", "made_up", "--out", "kept", "--quiet")
    files = [work / "kept" / "made_up.json", work / "kept" / "made_up" / "summary.json"]
    before = [path.read_bytes() for path in files]
    monkeypatch.setattr(studies, "find", lambda name: lambda **given: dataclasses.replace(make(**given), revision=2))

    def said(text):
        if text.endswith("half way") and "new seed 0" in text:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("anabranch.cli.study.say", said)
    code, out, _ = here("study", "made_up", "--out", "kept", "--json")
    assert code == 130
    assert json.loads(out)["claims"][0]["verdict"] == "not run"
    assert [path.read_bytes() for path in files] == before


def test_parts_of_it_and_judging_alone(here, work):
    code, out, _ = here("study", "made_up", "--out", "parts", "--arms", "old", "--seeds", "2-3", "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["seeds"] == [2, 3]
    here("study", "made_up", "--out", "parts", "--arms", "new", "--seeds", "2", "--quiet")
    _, out, _ = here("study", "made_up", "--out", "parts", "--judge-only", "--json")
    claim = json.loads(out)["claims"][0]
    assert claim["interval"] is None
    assert claim["verdict"] == "not resolved"
    assert claim["baseline"] == pytest.approx(2.28)


def test_smoke_does_not_touch_the_recorded_results(here, work):
    here("study", "made_up", "--quiet")
    assert (work / "runs" / "studies" / "made_up.json").is_file()
    assert not (work / "studies").exists()
    here("study", "made_up", "--full", "--quiet")
    assert json.loads((work / "studies" / "results" / "made_up.json").read_text())["config"]["size"] == "full"


def test_studies_are_listed(here):
    code, out, _ = here("study", "--json")
    assert code == 0
    assert "rexmoe" in json.loads(out)["studies"]
    assert "progressive scaling" in here("study")[1]


def test_compare_prints_a_row_per_design(here, work, tiny, data, monkeypatch):
    from anabranch.studies import training

    monkeypatch.setattr(training, "FINAL_TOKENS", 256)
    monkeypatch.setattr(training, "CURVE_TOKENS", 64)
    options = [*(option for option in tiny if "hidden_dim" not in option), *data]
    arguments = ["compare", "moe", "dense", "--out", "compared", "--steps", 2, "--seeds", "0,1", "--quiet", *options]
    code, out, _ = here(*arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["baseline"] == "moe"
    assert [row["design"] for row in found["rows"]] == ["moe", "dense"]
    assert found["rows"][1]["difference"]["interval"] is not None
    assert found["notes"] == []
    [alike] = found["runs"]
    assert alike["runs"] == {"moe": [0, 1], "dense": [0, 1]}
    # A run of another version counts, and is named.
    path = work / "compared" / "compare" / "dense-seed1.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "versions": {**record["versions"], "torch": "1.0"}}))
    code, out, _ = here(*arguments)
    told = " ".join(out.split())
    assert "note" in told
    assert f"other versions than here, torch 1.0 (here {record['versions']['torch']}): dense seed 1" in told
    assert "difference" in out
    assert out.splitlines()[-1].startswith("next")
    assert (work / "compared" / "compare-costs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compare_counts_no_run_of_another_mixture(here, work, tiny, data, monkeypatch):
    from anabranch.studies import training

    monkeypatch.setattr(training, "FINAL_TOKENS", 256)
    monkeypatch.setattr(training, "CURVE_TOKENS", 64)
    options = [option for option in tiny if "hidden_dim" not in option]
    domain = f'{{corpus = {{kind = "files", paths = ["{work}/text/%s"]}}}}'

    def compared(out, *domains):
        mixture = ", ".join(f"{name} = {domain % name}" for name in domains)
        corpus = ["--set=data.corpus.kind=mixture", f"--set=data.corpus.domains={{{mixture}}}"]
        rest = ["--set=data.validation_fraction=0.3", "--steps", 2, "--seeds", "0,1", "--json"]
        code, printed, told = here("compare", "moe", "dense", "--out", out, *options, *corpus, *rest)
        assert code == 0, told
        return [row["bits_per_byte"] for row in json.loads(printed)["rows"]], told

    one, _ = compared("mixed", "alpha")
    two, told = compared("mixed", "alpha", "beta")
    assert told.count("run again, since the run there is of another config: data.corpus.domains.beta was None") == 4
    assert two == compared("mixed-fresh", "alpha", "beta")[0] != one
    assert compared("mixed", "alpha", "beta")[1].count("done before") == 4


def test_a_law_is_fitted_to_what_is_published(here):
    code, out, _ = here("study", "parscale", "--fit", "--out", "none")
    assert code == 0
    assert "published, stack" in out
    assert "0.393" in out
    _, out, _ = here("study", "parscale", "--fit", "--out", "none", "--json")
    assert [row["losses"] for row in json.loads(out)["fit"]] == ["published, stack", "published, pile"]
    code, _, err = here("study", "made_up", "--fit")
    assert code == 2
    assert "study 'made_up' fits no law" in err


def test_power_says_how_many_seeds_tell_a_difference(here, work):
    code, _, err = here("study", "made_up", "--power", 0.1, "--out", "nothing")
    assert code == 2
    assert "no claim of study 'made_up' has two seeds in nothing" in err
    here("study", "made_up", "--seeds", "0-2", "--out", "pilot", "--quiet")
    code, out, _ = here("study", "made_up", "--power", 0.1, "--out", "pilot", "--json")
    assert code == 0
    [row] = json.loads(out)["claims"]
    assert (row["count"], row["needed"]) == (3, 5)
    code, out, _ = here("study", "made_up", "--power", 0.1, "--out", "pilot")
    assert code == 0
    assert "pairs for 0.1" in out
    code, _, err = here("study", "made_up", "--power", 0, "--out", "pilot")
    assert (code, err) == (2, "error: the effect is 0.0; it must be above 0, in the unit of the difference\n")
