"""`OneShotSet`: from one reference and a bank of others to clips, questions and answers by which a model learns to know a subject.

    made = OneShotSet(OneShotSet.Config(), "<Ab>", reference, bank)
    made.report().yes_share                     # of the questions whether <Ab> is there
    images, videos = made.part("images"), made.part("videos")

Positives keep the identity of the reference; hard negatives are those of the bank that look most like it, made into clips the same way;
easy negatives are drawn from the rest. Whoever learns from positives alone says yes to everything, so that is warned of.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import torch

from anabranch.bounds import Seed
from anabranch.config import Config as BaseConfig
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, DataError
from anabranch.heads.pvchat.clips import Clip
from anabranch.heads.pvchat.cut_out import views_of
from anabranch.heads.pvchat.drawings import Portrait
from anabranch.heads.pvchat.generators import Composed, Embedder, Generator, InkEmbedder, Warped, is_of_people, nearest
from anabranch.heads.pvchat.questions import KINDS, OF_IMAGES, Kind, answer_to, check_name, question

__all__ = ["Balance", "OneShotSet", "Part", "Row", "ask_all", "look_alikes"]

Source = Literal["positive", "augmented", "hard", "easy"]
# Of the drawings of one look-alike: several are as good as the same.
_MOST_OF_ONE = 2


@dataclass(frozen=True)
class Row:
    """A question about a clip.

    Attributes:
        clip: its number in the part.
        kind: of the question.
        question, answer: in words.
        present: whether the subject is in the clip.
        wording: rows of one clip and one wording are asked together.
    """

    clip: int
    kind: Kind
    question: str
    answer: str
    present: bool
    wording: int = 0


@dataclass(frozen=True, eq=False)
class Part:
    """Clips and the rows about them: of one stage.

    Attributes:
        name: of the subject.
        clips: in order.
        rows: in the order of their clips.
    """

    name: str
    clips: list[Clip]
    rows: list[Row]


@dataclass(frozen=True)
class Balance:
    """What a set holds.

    Attributes:
        clips: how many of each source.
        rows: (with the subject, without it) of each kind of question.
        yes_share: of the questions of existence; NaN without any.
        warnings: what is wrong with it, in sentences.
    """

    clips: dict[str, int]
    rows: dict[str, tuple[int, int]]
    yes_share: float
    warnings: tuple[str, ...] = ()

    @property
    def positive_to_negative(self) -> float:
        """Clips with the subject for each without it; infinite without negatives."""
        without = self.clips["hard"] + self.clips["easy"]
        return (self.clips["positive"] + self.clips["augmented"]) / without if without else float("inf")


class OneShotSet:
    """See the module. The same arguments give the same set.

    Args:
        config: how much of what.
        name: of the subject, in angle brackets.
        reference: the one picture (or what else the generators take) of the subject; of one that was cut out of a clip (`cut_out`) clips
            are made of all that was seen of it.
        bank: others. Those of the reference's own subject are left out, and one that is given twice, be it as two equal drawings of one
            subject, counts once.
        positives: makes clips of the reference as it is, and of negatives; default `Composed` beside others of the bank.
        augmented: makes clips of the reference drawn anew; default `Warped`.
        embedder: by which hard negatives are found.
        consent: the people whose pictures are generated have agreed; generators of people are not used without.

    Attributes:
        clips: with the source of each.
        found: (subject, cosine) of the hard negatives, the nearest first.

    Raises ConfigError for a name that is none, or a generator of people without consent, DataError for negatives that cannot be made
    or a generator that gives something else than it should. Warns (UserWarning) where there are no negatives, or no positives.
    """

    @configclass
    class Config(BaseConfig):
        """How much of what.

        Attributes:
            positives: clips of the reference as it is.
            augmented: of it drawn anew.
            hard_negatives: of those that look most like it.
            easy_negatives: of any others.
            wordings: of each kind of question to each clip.
            seed: of everything.
        """

        positives: int = Field(default=20, ge=0, le=100_000)
        augmented: int = Field(default=20, ge=0, le=100_000)
        hard_negatives: int = Field(default=20, ge=0, le=100_000)
        easy_negatives: int = Field(default=20, ge=0, le=100_000)
        wordings: int = Field(default=4, ge=1, le=1000)
        seed: Seed = 0

        def __post_init__(self) -> None:
            if not self.positives + self.augmented + self.hard_negatives + self.easy_negatives:
                raise ConfigError(
                    "positives, augmented, hard_negatives and easy_negatives are all 0; a set needs clips"
                )

    def __init__(
        self,
        config: Config,
        name: str,
        reference: Any,
        bank: Sequence[Any] = (),
        *,
        positives: Generator | None = None,
        augmented: Generator | None = None,
        embedder: Embedder | None = None,
        consent: bool = False,
    ) -> None:
        self.config, self.name, self.reference = config, check_name(name), reference
        self.subject = _subject_of(reference)
        self.bank = [other for other in _once(bank) if _subject_of(other) != self.subject]
        plain = Composed(others=tuple(self.bank))
        self._positives = plain if positives is None else positives
        self._augmented = Warped(plain) if augmented is None else augmented
        self._embedder = InkEmbedder() if embedder is None else embedder
        self._check_consent(consent)
        wanted = config.hard_negatives + config.easy_negatives
        if wanted and not self.bank:
            raise DataError(
                f"{wanted} negatives are to be made, and the bank holds nobody but {self.subject}; give others, or set both numbers to 0"
            )
        self.found: list[tuple[str, float]] = []
        self.clips: list[tuple[Source, Clip]] = [
            *self._made("positive", self._positives, views_of(reference), config.positives),
            *self._made("augmented", self._augmented, views_of(reference), config.augmented),
            *self._made("hard", self._positives, self._look_alikes(), config.hard_negatives),
            *self._made("easy", self._positives, self._others(), config.easy_negatives),
        ]
        for warning in self.report().warnings:
            warnings.warn(warning, stacklevel=2)

    def _check_consent(self, consent: bool) -> None:
        for part in (self._positives, self._augmented, self._embedder):
            if is_of_people(part) and not consent:
                raise ConfigError(
                    f"{type(part).__name__} works on pictures of people; give consent=True once those who are shown have agreed"
                )

    # Clips

    def _generator(self, what: str) -> torch.Generator:
        """A stream of its own for each purpose, so that more of one thing changes nothing of another."""
        words = f"{self.config.seed} {self.name} {self.subject} {what}"
        seed = int.from_bytes(blake2b(words.encode(), digest_size=7).digest(), "big")
        return torch.Generator().manual_seed(seed)

    def _look_alikes(self) -> list[Any]:
        """Those of the bank that are nearest."""
        count, seed = self.config.hard_negatives, self.config.seed
        found = look_alikes(self.reference, self.bank, count, embedder=self._embedder, seed=seed)
        self.found = [(_subject_of(other), cosine) for other, cosine in found]
        return [other for other, _ in found]

    def _others(self) -> list[Any]:
        count = self.config.easy_negatives
        rows = torch.randint(max(len(self.bank), 1), (count,), generator=self._generator("who else")).tolist()
        return [self.bank[row] for row in rows]

    def _made(self, source: Source, make: Generator, references: list[Any], count: int) -> list[tuple[Source, Clip]]:
        if not count:
            return []
        clips = make.clips(references, count, self._generator(source))
        what = f"{type(make).__name__} was asked for {count} clips ({source})"
        if len(clips) != count or not all(isinstance(clip, Clip) for clip in clips):
            raise DataError(f"{what} and gave {len(clips)} things; it must give as many, each a Clip")
        for clip in clips:
            is_there = clip.actor(self.subject) is not None
            if is_there != (source in ("positive", "augmented")):
                raise DataError(f"{what}, and one says that {self.subject} is {'' if is_there else 'not '}in it")
        return [(source, clip) for clip in clips]

    # Rows

    def part(self, stage: Literal["images", "videos"]) -> Part:
        """What a stage learns from: first frames with the questions that one frame can answer, or clips with all."""
        clips = [clip.first_frame() if stage == "images" else clip for _, clip in self.clips]
        kinds = OF_IMAGES if stage == "images" else KINDS
        generator = self._generator(stage)
        return Part(self.name, clips, ask_all(clips, self.name, self.subject, kinds, self.config.wordings, generator))

    def report(self) -> Balance:
        """How many clips and rows of each, and what is wrong with that."""
        clips: Counter[str] = Counter(source for source, _ in self.clips)
        counts = {source: clips[source] for source in ("positive", "augmented", "hard", "easy")}
        rows: dict[str, tuple[int, int]] = {}
        part = self.part("videos")
        for kind in KINDS:
            present = [row.present for row in part.rows if row.kind == kind]
            rows[kind] = (sum(present), len(present) - sum(present))
        yes, no = rows["existence"]
        told = []
        if not counts["hard"] + counts["easy"]:
            told.append(f"{self.name} has no negatives: a model that never sees others says yes to everything")
        if not counts["positive"] + counts["augmented"]:
            told.append(f"{self.name} has no positives: a model that never sees it says no to everything")
        return Balance(counts, rows, yes / (yes + no) if yes + no else float("nan"), tuple(told))


def look_alikes(
    reference: Any, bank: Sequence[Any], count: int, *, embedder: Embedder | None = None, seed: int = 0
) -> list[tuple[Any, float]]:
    """Those of ``bank`` that look most like ``reference``, with their cosines, the nearest first: two of one subject at most.

    There may be fewer than ``count``. Raises as `nearest`.
    """
    found: list[tuple[Any, float]] = []
    taken: Counter[str] = Counter()
    # So many that some are left when most drawings of the nearest subjects are passed over.
    for row, cosine in nearest(embedder or InkEmbedder(), reference, bank, 20 * count, seed=seed) if count else ():
        subject = _subject_of(bank[row])
        if taken[subject] < _MOST_OF_ONE and len(found) < count:
            taken[subject] += 1
            found.append((bank[row], cosine))
    return found


def ask_all(
    clips: Sequence[Clip],
    name: str,
    subject: str,
    kinds: Sequence[Kind],
    wordings: int,
    generator: torch.Generator,
) -> list[Row]:
    """Rows about ``subject``, called ``name``: every clip is asked all ``kinds``, each in so many wordings that are drawn.

    What a clip cannot answer, such as an action in one frame, is not asked.
    """
    rows = []
    for number, clip in enumerate(clips):
        actor = clip.actor(subject)
        for turn in range(wordings):
            for kind in kinds:
                wording = int(torch.randint(2**31, (), generator=generator))
                answer = answer_to(kind, name, actor)
                if clip.is_image and kind not in OF_IMAGES:
                    continue
                if answer is not None:
                    rows.append(Row(number, kind, question(kind, name, wording), answer, actor is not None, turn))
    return rows


def _once(bank: Sequence[Any]) -> list[Any]:
    """The bank without what is in it a second time: references that are learned at once are often drawings of the bank too."""
    first: dict[Any, Any] = {}
    for other in bank:
        key: Any = id(other)
        if isinstance(other, Portrait):
            drawn = other.ink_SS.detach().cpu().contiguous()
            key = other.subject, tuple(drawn.shape), blake2b(drawn.numpy().tobytes()).digest()
        first.setdefault(key, other)
    return list(first.values())


def _subject_of(reference: Any) -> str:
    """The subject of a reference. Raises DataError for what says none."""
    subject = getattr(reference, "subject", None)
    if not isinstance(subject, str) or not subject:
        raise DataError(
            f"a reference of type {type(reference).__name__} says no subject; give it one, as a Portrait has"
        )
    return subject
