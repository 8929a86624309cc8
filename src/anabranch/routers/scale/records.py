"""What a run did and what it cost, call by call and step by step: `Trace`, which can be written down and read back.

trace.answer                   what the last box holds
trace.totals.solving           tokens of the steps' answers;  .overhead: of outlines, selection and scores;  .lost: of calls that failed
trace.totals.all               equals what a ledger has of the same calls
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from anabranch.errors import DataError

VERSION = 1

Stage = Literal["outline", "select", "score", "solve"]
STAGES: tuple[Stage, ...] = ("outline", "select", "score", "solve")


@dataclass(frozen=True, slots=True)
class Tokens:
    """What calls came to.

    Attributes:
        prompt, completion: tokens.
        cost: dollars.
        calls: how many.
    """

    prompt: int = 0
    completion: int = 0
    cost: float = 0.0
    calls: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.cost + other.cost,
            self.calls + other.calls,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """One call of a model.

    Attributes:
        stage: what for.
        index: candidate of an outline, or step, from 0.
        attempt: from 0.
        model: that was asked.
        system: 1 or 2.
        status: ``ok``, or the name of the error it ended with.
        is_replayed: it was not made, but taken from the journal of a run before.
        prompt_tokens, completion_tokens, cost, latency_s: as `Answered` has them; 0 of one that failed (see `Totals.lost`).
    """

    stage: Stage
    index: int
    attempt: int
    model: str
    system: int
    status: str = "ok"
    is_replayed: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    latency_s: float = 0.0

    @property
    def tokens(self) -> Tokens:
        """What it came to."""
        return Tokens(self.prompt_tokens, self.completion_tokens, self.cost, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step.

    Attributes:
        text: what was to be done.
        score: difficulty, 0 to 1; None where nobody asked.
        p1, p2: chances of success; None likewise.
        system: that answered: 1 or 2.
        wanted: that the rule wanted.
        is_forced: the last one, which is System 2's whatever its score.
        is_scored: its score was measured; False where it counts as hard for want of one.
        answer: its final content, without thoughts.
        prompt_tokens, completion_tokens, cost, latency_s: of all calls of the step's answer that came, not of its score.
        samples: answers that were drawn of the system.
        agreed: of those, that come to the same as the one that was taken.
        stopped: why no more were drawn; None of a system that gives one.
    """

    text: str
    score: float | None
    p1: float | None
    p2: float | None
    system: int
    wanted: int
    is_forced: bool
    is_scored: bool
    answer: str
    prompt_tokens: int
    completion_tokens: int
    cost: float
    latency_s: float
    samples: int = 1
    agreed: int = 1
    stopped: str | None = None

    def facts(self, index: int) -> dict[str, Any]:
        """Without its texts."""
        told = asdict(self)
        del told["text"], told["answer"]
        return {"index": index, **told}


@dataclass(frozen=True, slots=True)
class Totals:
    """What a run came to.

    Attributes:
        overhead: of outlines, selection and scoring.
        solving: of the steps' answers.
        lost: of calls that failed, as far as whoever made them tells it (``ask.spent``).
    """

    overhead: Tokens
    solving: Tokens
    lost: Tokens = field(default_factory=Tokens)

    @property
    def all(self) -> Tokens:
        """All of it."""
        return self.overhead + self.solving + self.lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A run.

    Attributes:
        problem: its digest.
        outline: which candidate was chosen, from 0; None where the problem was taken as one step.
        num_candidates: outlines that could be read.
        steps: done, in order.
        calls: made, in the order they ended.
        lost: see `Totals`.
        notes: what went otherwise than meant, in short words, in order.
        is_degraded: less was done than the rules wanted, for want of room, time, or an answer.
        is_whole: the last step was done.
        text: what the last step's answer says, or the last that there is.
        answer: what its last box holds; None without one.
    """

    problem: str
    outline: int | None
    num_candidates: int
    steps: Sequence[StepRecord]
    calls: Sequence[CallRecord]
    lost: Tokens = field(default_factory=Tokens)
    notes: Sequence[str] = ()
    is_degraded: bool = False
    is_whole: bool = True
    text: str = ""
    answer: str | None = None

    @property
    def totals(self) -> Totals:
        """Sums over its calls."""
        came = [one for one in self.calls if one.status == "ok"]
        solving = sum((one.tokens for one in came if one.stage == "solve"), Tokens())
        overhead = sum((one.tokens for one in came if one.stage != "solve"), Tokens())
        return Totals(overhead, solving, self.lost)

    @property
    def tokens_per_step(self) -> float:
        """Tpi of the paper: completion tokens of all calls, by steps."""
        return self.totals.all.completion / max(1, len(self.steps))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `from_dict` reads it back equal."""
        told = {
            name: getattr(self, name) for name in ("problem", "outline", "num_candidates", "is_degraded", "is_whole")
        }
        return {
            "version": VERSION,
            **told,
            "text": self.text,
            "answer": self.answer,
            "notes": list(self.notes),
            "lost": asdict(self.lost),
            "steps": [asdict(one) for one in self.steps],
            "calls": [asdict(one) for one in self.calls],
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Raises DataError for what is no trace of this version."""
        if not isinstance(table, Mapping) or table.get("version") != VERSION:
            version = table.get("version") if isinstance(table, Mapping) else None
            raise DataError(f"the trace has version {version!r}; this program reads {VERSION}")
        fields = {name: value for name, value in table.items() if name != "version"}
        try:
            fields["steps"] = tuple(StepRecord(**one) for one in fields["steps"])
            fields["calls"] = tuple(CallRecord(**one) for one in fields["calls"])
            fields["lost"], fields["notes"] = Tokens(**fields["lost"]), tuple(fields["notes"])
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise DataError(f"the trace is none: {error}") from None
