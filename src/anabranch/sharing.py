"""How much of a limit one may have, beside others who share it."""

from collections.abc import Sequence

__all__ = ["even_shares", "most_beside"]


def most_beside(others: float, limit: float, share: float) -> float:
    """What one may have of ``limit`` in all, where the others have ``others`` of it: the part ``share`` of what they leave.

    One alone never takes the last place, and among n who take all they may there is room for another (dynamic thresholds, Choudhury and
    Hahne, IEEE/ACM Transactions on Networking 1998). A share of 1 shares nothing out.
    """
    return share * (limit - others)


def even_shares(wanted: Sequence[int], room: int) -> list[int]:
    """``room`` shared out evenly, to nobody more than is wanted (max-min fair); what cannot be halved goes to the first."""
    shares = [0] * len(wanted)
    short = [place for place, most in enumerate(wanted) if most > 0]
    while room > 0 and short:
        each = max(1, room // len(short))
        for place in short[:room]:
            more = min(each, wanted[place] - shares[place])
            shares[place] += more
            room -= more
        short = [place for place in short if shares[place] < wanted[place]]
    return shares
