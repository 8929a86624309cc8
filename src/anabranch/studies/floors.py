"""Floors under claims: that ours is no worse than a baseline says nothing where ours has learned nothing, whatever the baseline has."""

from collections.abc import Sequence
from dataclasses import replace

from anabranch.studies.harness import Claim, Results

# Metric, arm, and what its mean over the arm's seeds must reach.
Floor = tuple[str, str, float]


def above_floors(results: Results, claims: Sequence[Claim], floors: Sequence[Sequence[Floor]]) -> list[Claim]:
    """``claims``, of which none holds that has a floor which is not reached: it is not resolved then.

    Args:
        results: what has run.
        claims: as they were judged.
        floors: of each claim, in the same order; none for one that no failure of both arms can make hold.
    """
    return [
        replace(claim, verdict="not resolved") if claim.verdict == "holds" and not _is_above(results, under) else claim
        for claim, under in zip(claims, floors, strict=True)
    ]


def _is_above(results: Results, floors: Sequence[Floor]) -> bool:
    return all(results.mean(arm, metric).mean >= least for metric, arm, least in floors)
