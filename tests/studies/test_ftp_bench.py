"""A seed of the study of FTP: what its arms share, what is read back, and what they measure."""

import pytest

from anabranch.errors import BackendError, ConfigError
from anabranch.studies import ftp_bench
from anabranch.studies.ftp import AGREE, OUTSIDE, ArmConfig, make, run
from anabranch.studies.ftp_bench import Bench, Size
from anabranch.studies.ftp_rows import made_rows

TINY = make().arms[0].config.size


def test_arms_of_a_seed_share_rows_and_what_was_searched():
    bench, again = Bench(TINY, 1, lambda text: None), Bench(TINY, 1, lambda text: None)
    assert bench.judged == again.judged != Bench(TINY, 2, lambda text: None).judged
    assert not set(bench.judged) & {*bench.calibration, *bench.learned}
    searched = bench.skipper("static_searched")
    dynamic, tuned, hidden = (bench.skipper(name) for name in ("dynamic_searched", "dynamic_tuned", "hidden"))
    assert searched.schedule == dynamic.schedule == hidden.schedule
    assert tuned.router.state_dict()["first.bias"].equal(dynamic.router.state_dict()["first.bias"])
    assert (dynamic.router.num_parameters, hidden.router.config.inputs) == (450, "hidden")
    for name in ("random", "static", "static_searched", "dynamic_tuned"):
        assert bench.skipper(name).sparsity == pytest.approx(0.3, abs=1e-9)


def test_arms_that_are_their_own_baselines():
    found = {
        name: run(ArmConfig(arm=name, size=TINY), 0, lambda text: None) for name in ("agree_22", "agree_40", "anywhere")
    }
    for name in ("agree_22", "agree_40"):
        made = found[name]
        # A block passes over whole tokens of 22.
        assert made["skipped"] == pytest.approx(AGREE[name], abs=0.05)
        assert made["saved_shortgpt"] <= made["saved"] + 1e-9
        assert made["zero"] == 0
        assert all(0 <= made[key] <= 1 for key in made if key.startswith("agreement"))
    assert found["agree_22"]["saved"] < found["agree_40"]["saved"]
    made = found["anywhere"]
    for name in ("truncation", "static", "static_searched"):
        assert made[f"closeness_{name}"] == -made[f"gap_{name}"]
    assert made["closeness"] == -made["gap"]
    # The rows of each kind are those of its bench, and the tokens asked for are FTP's.
    assert Bench(TINY, 0, lambda text: None, "anywhere").sparsity == 0.3
    assert Bench(TINY, 0, lambda text: None, "contexts", 0.22).skipper("static").sparsity == pytest.approx(0.22)


@pytest.mark.parametrize("arm", OUTSIDE)
def test_outside_arms_read_text(arm):
    with pytest.raises(ConfigError, match=f"the arm {arm} reads text, and the made model's rows are none"):
        run(ArmConfig(arm=arm, size=TINY), 0, lambda text: None)


def test_outside_arms_and_the_dense_model_beside_them_are_in_float32(kept, monkeypatch):
    """Packages run in it; all else is in the type of the study."""
    loaded, asked = ftp_bench.loaded, []
    monkeypatch.setattr(ftp_bench, "loaded", lambda dtype: (asked.append(dtype), loaded(dtype))[1])
    monkeypatch.delenv("ANABRANCH_KVPRESS", raising=False)
    with pytest.raises(BackendError, match="ANABRANCH_KVPRESS is not set"):
        run(ArmConfig(arm="kvpress", size=kept), 0, lambda text: None)
    assert set(asked) == {"float32"}
    asked.clear()
    run(ArmConfig(arm="static", size=kept), 0, lambda text: None)
    assert asked == ["bfloat16"]


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The size of the real model's way with the made one: what is fitted is kept on disk."""
    stack = ftp_bench._made(0)
    monkeypatch.setattr(ftp_bench, "loaded", lambda dtype: (stack, None))
    monkeypatch.setattr(ftp_bench, "rows_of", lambda kind, counts, seed, tokenizer, sparsity: made_rows(counts, seed))
    monkeypatch.setattr(ftp_bench, "cache_folder", lambda: tmp_path)
    return TINY.replace(model="smollm2")


def test_what_an_arm_has_fitted_others_read_back(kept, tmp_path, monkeypatch):
    first = Bench(kept, 1, lambda text: None).skipper("dynamic_tuned")
    [place] = tmp_path.rglob("*.jsonl")
    held = place.read_bytes()
    for name in ("search_schedule", "finetune_schedule"):
        was = getattr(ftp_bench, name)

        def read_alone(*given, was=was, memo, **more):
            before = dict(memo)
            found = was(*given, memo=memo, **more)
            assert dict(memo) == before, "it has measured something"
            return found

        monkeypatch.setattr(ftp_bench, name, read_alone)
    monkeypatch.setattr(ftp_bench, "train_router", lambda *_, **__: pytest.fail("it has learned before"))
    again = Bench(kept, 1, lambda text: None).skipper("dynamic_tuned")
    assert again.schedule == first.schedule
    for name, value in first.router.state_dict().items():
        assert value.equal(again.router.state_dict()[name])
    assert place.read_bytes() == held


def test_nothing_is_read_back_of_another_fit(kept, tmp_path):
    """Another seed, share, size or kind of rows is another file."""
    others = [
        (kept, 1, "questions", None),
        (kept, 2, "questions", None),
        (kept, 1, "questions", 0.2),
        (kept.replace(dtype="float32"), 1, "questions", None),
        (kept.replace(generations=kept.generations + 1), 1, "questions", None),
        (kept.replace(context_calibration=kept.context_calibration + 1), 1, "contexts", None),
    ]
    for size, seed, kind, sparsity in others:
        Bench(size, seed, lambda text: None, kind, sparsity).skipper("static_searched")
    assert len(list(tmp_path.rglob("*.jsonl"))) == len(others)


def test_shortgpt_has_at_least_the_work_and_contexts_their_own_number_of_rows():
    bench = Bench(TINY, 0, lambda text: None)
    assert bench.measure("shortgpt").work >= bench.measure("dynamic_tuned").work
    counts = Size(calibration=7, context_calibration=3, learned=2, judged=4)
    assert [counts.counts(kind).calibration for kind in ("questions", "contexts", "anywhere")] == [7, 3, 7]
    made = Bench(TINY.replace(context_calibration=2), 0, lambda text: None, "contexts")
    assert (len(made.calibration), len(made.learned), len(made.judged)) == (2, TINY.learned, TINY.judged)
