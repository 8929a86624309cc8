"""``anabranch experts fit-predictor``: from text, from a trace, from kept routes; what is written is what serve finds."""

import json

import pytest

from anabranch.serving.expertflow.predictors import load_predictor

QUICK = ["--inputs", 6, "--samples", 2, "--input-length", 8, "--max-tokens", 5, "--steps", 3]


@pytest.fixture
def model(trained, work):
    yield "trained"
    (work / "trained" / "route-predictor.safetensors").unlink(missing_ok=True)


@pytest.fixture
def kept(here, model, work):
    """Routes that were kept, whichever test comes first."""
    if not (work / "kept.npz").exists():
        line = ["text", *QUICK, "--kind", "frequency", "--out", "f.safetensors", "--save-routes", "kept.npz"]
        assert here("experts", "fit-predictor", model, *line, "--quiet")[0] == 0


def test_a_predictor_is_fitted_on_sampled_routes_and_lies_where_serve_finds_it(here, model, work):
    code, out, err = here(
        "experts", "fit-predictor", model, "text/alpha", "text/beta/1.py", *QUICK, "--json", "--save-routes", "kept.npz"
    )
    assert (code, err.count("\n")) == (0, err.count("continuation")), err
    said = json.loads(out)
    assert said["out"] == "trained/route-predictor.safetensors"
    assert list(said["accuracy"]) == ["encdec", "tlp", "slp", "frequency"]
    assert all(0 <= one["recall"] <= 1 and 0 < one["wanted"] for one in said["accuracy"].values())
    # One input of six is held out; the last token of a continuation goes nowhere.
    assert [said[part]["sequences"] for part in ("fitted_on", "judged_on")] == [10, 2]
    assert said["fitted_on"]["tokens"] <= 10 * (8 + 4)
    made = load_predictor(work / said["out"])
    assert made.fingerprint.to_dict() == {**said["fingerprint"], **made.fingerprint.to_dict()}
    # The same again, on what was kept, in place of the old one.
    code, out, _ = here("experts", "fit-predictor", model, "kept.npz", "--kind", "frequency", "--hold-out", 0.5)
    assert code == 0
    assert load_predictor(work / said["out"]).kind == "frequency"
    assert "wrote   trained/route-predictor.safetensors" in out
    assert "frequency" in out and "encdec" not in out  # noqa: PT018


@pytest.mark.slow
def test_a_trace_of_a_report_serves_as_well(here, model, work):
    pytest.importorskip("matplotlib")
    assert here("report", model, "--out", "rep", "--tokens", 256, "--quiet")[0] == 0
    code, out, _ = here(
        "experts", "fit-predictor", model, "rep/trace.parquet", "--steps", 2, "--out", "p.safetensors", "--quiet"
    )
    assert code == 0
    assert "--set engine.experts.predictor=p.safetensors" in out
    assert load_predictor(work / "p.safetensors").kind == "encdec"


def test_with_a_budget_the_routes_are_the_same(here, model):
    said = []
    for more in ((), ("--expert-budget", "20KB")):
        code, out, _ = here(
            "experts",
            "fit-predictor",
            model,
            "text",
            *QUICK,
            "--kind",
            "frequency",
            "--out",
            "f.safetensors",
            "--json",
            *more,
        )
        assert code == 0
        said.append(json.loads(out)["accuracy"])
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("text --input-length 5000", "the model reads"),
        ("text --save-routes r.csv", "must end with .npz"),
        ("kept.npz --save-routes ./kept.npz", "would be lost"),
        ("none.npz", "does not hold recorded routes"),
        ("text --out trained/config.json", "would be lost"),
        ("text --expert-budget 1KB", "budget"),
        ("text --expert-budget much", "--expert-budget is 'much'"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(line, message, here, model, work, kept):
    code, _, err = here("experts", "fit-predictor", model, *line.split(), "--inputs", 4, "--quiet")
    assert (code, message in err.splitlines()[-1]) == (2, True), err
    assert not (work / "trained" / "route-predictor.safetensors").exists()
