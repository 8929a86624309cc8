"""When more answers stop paying: TTSPM (arXiv 2505.20522), its mixture of easy and hard questions, and the controller that goes by them.

    from anabranch.test_time import TTSPM, BetaTTSPM

    curve = TTSPM(kind="parallel", f_max=0.8, p=0.3)
    curve.saturation(0.01)                        # 9: from there on one more sample solves less than one question in a hundred
    BetaTTSPM().fit(correct_QM).budget(v=1.0, c=0.002)

Needs numpy alone.
"""

from anabranch.test_time.controller import Allowance, BudgetController, Reason
from anabranch.test_time.costs import CostModel, ParallelCost, SequentialCost, best_mix
from anabranch.test_time.curves import TTSPM, BetaTTSPM, Curve
from anabranch.test_time.fitting import fit_many
from anabranch.test_time.hits import ends_at_first, first_counts, hit_at, hit_curve, survival_curve, vote_curve
from anabranch.test_time.priors import Priors
from anabranch.test_time.runners import History, Sample, Sampled, mixed, parallel, sequential
from anabranch.test_time.selectors import best_judged, first_verified, logprob_weighted, majority
from anabranch.test_time.stopping import (
    Spent,
    effective_samples,
    is_decided,
    play_fixed,
    play_global,
    play_oracle,
    play_question,
    play_votes,
    regret,
    verified_accuracy,
    vote_probability,
)
from anabranch.test_time.two_state import TwoStateTTSPM
from anabranch.test_time.verify import CodeVerifier, gsm8k_answer, is_gsm8k_right

__all__ = [
    "TTSPM",
    "Allowance",
    "BetaTTSPM",
    "BudgetController",
    "CodeVerifier",
    "CostModel",
    "Curve",
    "History",
    "ParallelCost",
    "Priors",
    "Reason",
    "Sample",
    "Sampled",
    "SequentialCost",
    "Spent",
    "TwoStateTTSPM",
    "best_judged",
    "best_mix",
    "effective_samples",
    "ends_at_first",
    "first_counts",
    "first_verified",
    "fit_many",
    "gsm8k_answer",
    "hit_at",
    "hit_curve",
    "is_decided",
    "is_gsm8k_right",
    "logprob_weighted",
    "majority",
    "mixed",
    "parallel",
    "play_fixed",
    "play_global",
    "play_oracle",
    "play_question",
    "play_votes",
    "regret",
    "sequential",
    "survival_curve",
    "verified_accuracy",
    "vote_curve",
    "vote_probability",
]
