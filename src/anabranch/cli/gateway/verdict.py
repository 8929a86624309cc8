"""How ``anabranch gateway eval`` ends: its verdict, kept beside the routers that were judged, and the command to type next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.cli.gateway.doors import GATEWAY, door
from anabranch.cli.output import fact, say, shell_word
from anabranch.errors import AnabranchError

if TYPE_CHECKING:
    from anabranch.routers.referee import Verdict
    from anabranch.routers.referee.verdict import Choice

SERVE = "anabranch gateway serve --config gateway.toml"

# What the other models would have said to the same questions, judged by a model: what a log alone cannot tell.
COLLECT = "anabranch gateway collect --config gateway.toml --judge MODEL --out outcomes.jsonl"


@dataclass(frozen=True)
class Ending:
    """Of one evaluation: what it was told.

    Attributes:
        data: outcomes.
        router: folder or file of the routers that were judged; None where they were made for it.
        strategy: names that were asked for; None for all.
        leaks: it may have been judged on what was learned from.
    """

    data: str
    router: Path | None
    strategy: list[str] | None
    leaks: bool

    def of(self, verdict: Verdict, *, is_log: bool = False) -> Verdict:
        """The verdict with the next command, kept where it can be and should be; else it is said why not.

        ``is_log``: what it was judged on has the answer of one model to a question, so that more may be asked where it is open.
        """
        if verdict.recommended is None:
            return verdict.replace(next=COLLECT)
        if self.router is None:
            return verdict.replace(next=COLLECT if is_log and verdict.is_open else self._unfitted(verdict))
        why = self._why_not_kept()
        if why and self.router.is_dir():
            say(f"what is recommended is not kept in {self.router}: {why}")
        is_kept = not why and self._keep(verdict)
        if is_log and verdict.is_open:
            return verdict.replace(next=COLLECT)
        if is_kept:
            return verdict.replace(next=_use(self.router))
        return verdict.replace(next=self._unkept(verdict.recommended))

    def _unkept(self, chosen: Choice) -> str:
        """Serve the one file that is recommended, or judge as it has to be judged to be kept."""
        assert self.router is not None
        is_folder = self.router.is_dir()
        if chosen.kind == "strategy" and chosen.setting is None and not self.leaks:
            file = self.router / f"{chosen.name}.safetensors" if is_folder else self.router
            return _use(file)
        folder = self.router if is_folder else self.router.parent
        is_kept = (folder / "manifest.json").is_file()
        return f"{door()} eval {shell_word(self.data)} --router {shell_word(folder)}" if is_kept else SERVE

    def _why_not_kept(self) -> str:
        if self.router is None or not self.router.is_dir():
            return "it is one router, not a folder of them"
        if self.strategy is not None:
            return f"only {', '.join(self.strategy)} was judged" if len(self.strategy) == 1 else "not all were judged"
        return "it was judged on questions that may have been learned from (--allow-leak)" if self.leaks else ""

    def _keep(self, verdict: Verdict) -> bool:
        from anabranch.routers.recommendation import keep_recommendation

        assert self.router is not None
        try:
            keep_recommendation(self.router, verdict)
        except AnabranchError as error:
            # What was found is worth more than where it lies.
            say(f"what is recommended is not kept: {error}")
            return False
        return True

    def _unfitted(self, verdict: Verdict) -> str:
        """Nothing is on the disk yet that could be served."""
        chosen, data = verdict.recommended, shell_word(self.data)
        if chosen is not None and chosen.kind == "strategy":
            return f"{door()} fit {data} --out routers --strategy {chosen.name}"
        if self.strategy == ["all"]:
            return SERVE
        return f"{door()} eval {data} --strategy all"


def _use(router: Path) -> str:
    """Have a router decide: for live requests, or, without the proxy, for a query."""
    where = f"--router {shell_word(router)}"
    return f"{SERVE} {where}" if door() == GATEWAY else f"{door()} route 'a question' {where}"


def print_verdict(verdict: Verdict | None) -> None:
    """Sentences, and the next command on a line of its own."""
    if verdict is None:
        return
    print()
    for sentence in verdict.sentences():
        fact("verdict", sentence)
    if verdict.next:
        fact("next", verdict.next)
