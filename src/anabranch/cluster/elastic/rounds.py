"""What all ranks of a layout do together beside steps, each its part: who has told, and what is said when all have.

Where ranks are lost before that everybody does it again in the next layout, also who had told: so what is told counts in its epoch alone.
What is said when all have told holds whoever is lost afterwards.
"""

from collections.abc import Callable, Sequence

from anabranch.cluster.elastic.wire import Header

__all__ = ["Rounds"]


class Rounds:
    """Of one training.

    Args:
        note: called with what happens, and its details.

    Attributes:
        newest: where the newest checkpoint is, and of which step; None where there is none.
    """

    def __init__(self, note: Callable[..., None]) -> None:
        self.newest: str | None = None
        self._note = note
        self._told: dict[str, dict[int, Header]] = {}

    def has_epoch(self) -> None:
        """What was told in an older epoch is dropped with it."""
        self._told.clear()

    def heard(self, rank: int, header: Header, ranks: Sequence[int]) -> dict[int, Header]:
        """What is said to whom when a rank has told of its part, in the epoch that holds. Raises ValueError for what nobody tells."""
        kind = header["kind"]
        if kind == "manifest":
            why = None if header["why"] is None else f"rank {rank}: {header['why']}"
            return _all(ranks, self._saved(header, why))
        what = str(header["what"])
        of = self._told.setdefault(what, {})
        of[rank] = header
        if any(one not in of for one in ranks):
            return {}
        del self._told[what]
        if kind == "done":
            return _all(ranks, {"kind": "done", "what": what})
        failed = next((one for one in ranks if of[one]["why"] is not None), None)
        if failed is not None:
            return _all(ranks, self._saved(header, f"rank {failed}: {of[failed]['why']}"))
        # The first rank makes the files a checkpoint, and tells.
        return {ranks[0]: {"kind": "manifest", "files": [str(of[one]["file"]) for one in ranks]}}

    def missing(self, what: str, ranks: Sequence[int]) -> list[int]:
        """Who has not told; of what all have told the first rank, which makes of it what it is for."""
        of = self._told.get(what)
        return [ranks[0]] if of is None else [one for one in ranks if one not in of]

    def wrote(self, where: str, version: int) -> None:
        """One rank has written all."""
        self.newest = f"{where} (step {version})"

    def _saved(self, header: Header, why: str | None) -> Header:
        self._note("saved", version=header["version"], why=why)
        if why is None:
            self.wrote(str(header["folder"]), int(header["version"]))
        return {"kind": "saved", "why": why}


def _all(ranks: Sequence[int], said: Header) -> dict[int, Header]:
    return dict.fromkeys(ranks, said)
