"""The study of ExpertFlow: routes decoded in lock-step, what predictors are credited with, and the rules on made-up numbers."""

import numpy as np
import pytest

from anabranch.errors import DataError
from anabranch.serving.expertflow import Routes
from anabranch.studies.expertflow import BATCHES, SIZES, Decoded, Size, judge, make
from anabranch.studies.harness import Results
from claims import run_only

judge = run_only(judge)

SIZE = Size(prompt=2, decoded=3)
LENGTH, LAYERS, EXPERTS = 6, 2, 8


def made_routes(sequences: int) -> Routes:
    """Top 1; a token goes to expert (id + layer) % 8."""
    token_N = (np.arange(sequences * LENGTH) * 3 % 11).astype(np.int32)
    chosen_NLE = np.zeros((len(token_N), LAYERS, EXPERTS), bool)
    for layer in range(LAYERS):
        chosen_NLE[np.arange(len(token_N)), layer, (token_N + layer) % EXPERTS] = True
    sequence_N, position_N = np.divmod(np.arange(len(token_N)), LENGTH)
    sizes = ((EXPERTS,) * LAYERS, (1,) * LAYERS)
    return Routes(np.packbits(chosen_NLE, axis=-1), token_N, sequence_N, position_N.astype(np.int32), *sizes)


def knows(token_S: np.ndarray) -> np.ndarray:
    """What a predictor that is always right says of the decoded tokens."""
    prob_TLE = np.zeros((SIZE.decoded, LAYERS, EXPERTS), np.float32)
    for place, token in enumerate(token_S[SIZE.prompt : SIZE.prompt + SIZE.decoded]):
        for layer in range(LAYERS):
            prob_TLE[place, layer, (token + layer) % EXPERTS] = 1.0
    return prob_TLE


def test_who_knows_the_routes_is_right_and_others_are_as_counted_by_hand() -> None:
    decoded = Decoded(made_routes(8), SIZE, {"rpp": knows})
    assert decoded.accuracy("rpp", 4, extra=0).recall == 1.0
    for sequences, token in decoded.steps(4):
        assert [set(layer) for layer in decoded.expected(sequences, token)] == [
            set(layer) for layer in decoded.wanted(sequences, token)
        ]
    shares = []  # TLP: the union of a batch's routes one token before
    for sequences, token in decoded.steps(4):
        for layer in range(LAYERS):
            ids = decoded_ids(sequences, token), decoded_ids(sequences, token - 1)
            now, before = ({(one + layer) % EXPERTS for one in part} for part in ids)
            shares.append(len(now & before) / len(now))
    assert decoded.accuracy("tlp", 4, extra=0).recall == pytest.approx(np.mean(shares))


def decoded_ids(sequences: np.ndarray, token: int) -> list[int]:
    return [int((sequence * LENGTH + SIZE.prompt + token) * 3 % 11) for sequence in sequences]


def test_too_few_sequences_are_said_plainly() -> None:
    with pytest.raises(DataError, match=r"7 held-out sequences .* 8 are needed"):
        Decoded(made_routes(7), SIZE, {"rpp": knows}).accuracy("rpp", 4)
    with pytest.raises(DataError, match="0 held-out sequences"):
        Decoded(made_routes(4), Size(prompt=2, decoded=30), {"rpp": knows})


@pytest.mark.parametrize(("gap", "verdict"), [(0.2, "holds"), (0.1, "does not hold")])
def test_rules(gap: float, verdict: str) -> None:
    metrics = {"bacc_rpp_4": 0.9, "bacc_tlp_4": 0.5, "bacc_rpp_k_4": 0.8, "ts_gain": 1.05, "hit_lru_ahead_4_16": 0.55}
    for size in SIZES:
        for batch in BATCHES:
            hit = 0.5 + gap + 0.001 * batch
            values = {"lru": 0.5, "lru_layer": 0.45, "plec": hit, "belady_true": hit}
            metrics |= {f"hit_{name}_{size}_{batch}": value for name, value in values.items()}
    results = Results({arm.name: dict.fromkeys((0, 1), metrics) for arm in make(full=True).arms})
    verdicts = {claim.claim: claim.verdict for claim in judge(results)}
    of_lru = [found for claim, found in verdicts.items() if "LRU + 0.15" in claim]
    assert len(of_lru) == len(SIZES) * len(BATCHES)
    assert set(of_lru) == {verdict}
    assert verdicts["E1: the gap to LRU grows with the batch (BS 16 against 4)"] == "holds"
    assert verdicts["E3: the gain is larger with 128 experts than with 32"] == "does not hold"
