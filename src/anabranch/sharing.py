"""How much of a limit one may have, beside others who share it."""

__all__ = ["most_beside"]


def most_beside(others: float, limit: float, share: float) -> float:
    """What one may have of ``limit`` in all, where the others have ``others`` of it: the part ``share`` of what they leave.

    One alone never takes the last place, and among n who take all they may there is room for another (dynamic thresholds, Choudhury and
    Hahne, IEEE/ACM Transactions on Networking 1998). A share of 1 shares nothing out.
    """
    return share * (limit - others)
