"""Does a small model learn to know a subject from one drawing, do routed heads help, and what does each part of the recipe give?

"PVChat: Personalized Video Chat with One-Shot Learning", 2025, arXiv 2503.17069. The paper: accuracy .733 with a plain Q-former, .813 with
MoH, .901 with ReMoH; .464 with positives only, .584 with negatives, .781 and .901 with generated positives; the loss is NaN without
SPR and HAE, activation .217 without HAE and .552 with both (target .5).

Scaled down: Omniglot characters instead of people, since twenty people drew each; clips of 8 frames of 48 x 48 in which one to three of
them move; a model of half a million parameters that is pretrained on the clips of other alphabets. Identity here is a drawn character:
the numbers of the paper are not comparable, its orders are.

One run: a plain model is pretrained on Korean, Latin and Greek (the same for all arms of a seed); for each of 10 subjects of Balinese and
Early Aramaic it is copied, gets the arm's heads, which change nothing at first, and learns the subject from ONE drawing by one person, with
80 clips and the same 120 steps in all arms. Measured on 64 new clips of drawings by the 19 others, half of them without it, half of these
showing look-alikes; numbers are means over the subjects.

Arms:

    none         plain heads, all data, images first
    moh          mixture of heads: 2 of 3 routed heads of each token
    remoh        ReLU-routed heads with both losses, target 1/2
    positives    remoh, 80 clips of the drawing as it is, no negatives
    easy         remoh, 40 such clips and 40 of drawn others
    hard         remoh, 40 such clips, 20 of others and 20 of look-alikes
    videos       remoh, no images first; as many steps on clips
    dead-none    heads that are off at the start (bias -1/2), no losses; 300 steps of a small regression
    dead-spr     likewise, SPR
    dead-released   likewise, SPR and HAE as released
    dead-ours    likewise, SPR and HAE with a gradient
    ways-none    plain heads; of 20 subjects of evaluation alphabets, learned at once from one drawing each, which is it?
    ways-moh     the same with a mixture of heads
    ways-remoh   the same with ReLU-routed heads

How routers learn is the same in all arms, and was chosen by what share of heads was on, never by an answer: with seed 100, which is none
of the study's, on a base of 200 steps that answers everything alike. The paper's rates do not fit: its routers begin at the border, half
on by chance, and ours at z = 1, all on, so that heads change nothing at first. At 1/100 of the other rate z hardly moves from there; at 1
and 10 times it heads swing between on and off together, since tokens are much alike to a router of that base (the norm of their mean is ten
times that of their spread) and AdamW makes equal steps of the gradients of SPR and HAE, however weak those of answers are. While z comes
down from 1 the paper's beta grows at the paper's k without effect, and is far too large when it has one.
Of six short pilots (eleven settings, one subject each) the nearest to the target that no longer swung is frozen: 1/20 of the rate; k = .1
and beta = .1 at first, the class defaults of the paper's code; HAE at .05, of which the paper says nothing, since there it has no
gradient. Its activations were .45, .21 and .36: it MISSED the floor below. From a dead start k, beta and w are the paper's.

The last three run if they are asked for: Omniglot's twenty-way task (its ``all_runs.zip``), the first 4 of its 20 runs, as clips of 4 a
drawing that is to be told. 600 steps of 32 clips for all 20 subjects of a run.

The rule, fixed before any run. PRIMARY: existence, balanced, is higher with remoh than with none. A claim is about a paired difference over
seeds, ours - baseline - margin; it holds where that is above 0 by a two-sided paired t-test at 5% after Holm's correction over all such
claims that have run, does not hold where it is below 0 by the same test, and is not resolved otherwise or with fewer than five seeds. The
three claims about dead heads are of each run, which is deterministic: they hold if so in every seed, and do not hold if in none.

Floors, of means over seeds; a claim that misses one does not hold but is not resolved. A claim on how well subjects are told needs .6
(`LEARNED`) of the arm that is said to be as good or better: who says yes to all has .5, and who guesses has that with a standard error of
.02 in a seed, of 640 questions.
What positives alone do says something only if remoh, with negatives, has .6. Of twenty, .1 (`CHOOSES`) where chance is .05. A claim on
ReMoH needs routed heads that are on average, over attentions and subjects, within .1 of their target, each attention for itself: heads that
are on or off as a whole are at 0, 1/3, 2/3 or 1, and miss that. Where it is missed the claim does not fail either: nothing was routed. That
losses fail from a dead start counts where ours do not.

What is reported and judged by nobody: all four kinds of questions, images first against videos alone, and in the twenty-way task what the
nearest drawing says by `InkEmbedder`, which learns nothing.

NOT TO BE RUN YET: in its pilot routed heads miss their floor. Routers have to be tried again on a base of all 2,500 steps, and whether that
tells subjects at all; neither was done. The three arms of the twenty-way task, and the claims on them, were added before any run; their
file is not among the data that is shipped beside the project, so they cannot run until it is put there. 2026-12-02, before any run: rates
of routers, and floors.

It is planned for 5 seeds. Measured, in CPU seconds of one thread of a shared machine: 72 for a base of 200 steps, 14 to 16 for a subject.
From that, not measured: .25 CPU hours for the base of a seed and .04 for each arm that learns 10 subjects, so 3 CPU hours for five seeds
without the twenty-way task.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from anabranch.config import Config, Field, configclass, from_dict, to_dict
from anabranch.errors import DataError
from anabranch.files import sha256_of
from anabranch.heads.config import HeadRouting
from anabranch.heads.pvchat import (
    Learned,
    Learning,
    OneShotSet,
    Pretraining,
    PVChat,
    Rates,
    Score,
    Subject,
    exam,
    learn,
    measure,
    portraits,
    pretrain,
    read_drawings,
    read_trials,
    ways,
)
from anabranch.heads.pvchat.trials import LEARNING
from anabranch.heads.routed_heads import RoutedHeads
from anabranch.places import data_file
from anabranch.routing import RateBalance
from anabranch.studies.asked import Asked, judged
from anabranch.studies.floors import Floor, above_floors
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import every_seed
from anabranch.train import follow_steps

ArmName = Literal[
    "none",
    "moh",
    "remoh",
    "positives",
    "easy",
    "hard",
    "videos",
    "dead-none",
    "dead-spr",
    "dead-released",
    "dead-ours",
    "ways-none",
    "ways-moh",
    "ways-remoh",
]
# Those of Omniglot's twenty-way task, which is a file of its own.
WAYS: tuple[ArmName, ...] = ("ways-none", "ways-moh", "ways-remoh")
ARMS: dict[ArmName, str] = {
    "none": "plain heads",
    "moh": "mixture of heads, top 2 of 3",
    "remoh": "ReLU-routed heads",
    "positives": "positives only",
    "easy": "and drawn negatives",
    "hard": "and look-alikes",
    "videos": "no images first",
    "dead-none": "dead heads, no losses",
    "dead-spr": "dead heads, SPR",
    "dead-released": "dead heads, SPR and HAE as released",
    "dead-ours": "dead heads, SPR and HAE with a gradient",
    "ways-none": "of twenty, plain heads",
    "ways-moh": "of twenty, mixture of heads",
    "ways-remoh": "of twenty, ReLU-routed heads",
}
COLUMNS = (
    Column("balanced", "existence\nbalanced", ".3f"),
    Column("yes_share", "says\nyes", ".3f"),
    Column("appearance", "appearance\nexact", ".3f"),
    Column("action", "action\nexact", ".3f"),
    Column("location", "location\nexact", ".3f"),
    Column("activation", "routed\nheads on", ".3f"),
    Column("off_target", "off their\ntarget", ".3f"),
    Column("ways", "of twenty\nright", ".3f"),
    Column("ways_by_ink", "nearest\ndrawing", ".3f"),
)
TARGET = 0.5
# |activation - target| that counts as reached. Of three heads that are each on or off for all tokens, no number is as near to a half.
NEAR = 0.1
# Existence, balanced, from which on a model counts as having learned to tell subjects; who says yes to all has .5.
LEARNED = 0.6
# Likewise of the twenty-way task; by chance it is .05.
CHOOSES = 0.1
_DRAWINGS = "images/omniglot_background_small1.zip"
_SOURCE = "github.com/brendenlake/omniglot, python/images_background_small1.zip"
_RUNS = "images/omniglot_all_runs.zip"
_RUNS_SOURCE = "github.com/brendenlake/omniglot, python/one-shot-classification/all_runs.zip"


@configclass
class Drawings(Config):
    """Where the drawings come from.

    Attributes:
        place: a folder or a zip; None for Omniglot's small set in the data folder.
        known: groups whose subjects the model is pretrained on.
        new: groups of those that it learns to know.
    """

    place: str | None = None
    known: tuple[str, ...] = ("Greek", "Korean", "Latin")
    new: tuple[str, ...] = ("Balinese", "Early_Aramaic")

    def path(self) -> Path:
        """Of the drawings. Raises DataError if they are not there."""
        return data_file(_DRAWINGS, _SOURCE) if self.place is None else Path(self.place)

    def content_digest(self) -> str:
        """Of the file, or of all pictures of the folder."""
        return _digest(self.path())


def _digest(path: Path) -> str:
    """Names a file, or the files of a folder, by content."""
    if path.is_file():
        return sha256_of(path)[:16]
    files = sorted(each for each in path.rglob("*") if each.is_file())
    if not files:
        raise DataError(f"there are no drawings in {path}")
    return "-".join(sha256_of(each)[:8] for each in files[:64])


@configclass
class Runs(Config):
    """The twenty-way task.

    Attributes:
        place: a folder or a zip; None for Omniglot's in the data folder.
        names: of the runs.
        clips: of each drawing that is to be told.
        learning: how the subjects of a run are learned; its seed is the study's.
    """

    place: str | None = None
    names: tuple[str, ...] = ("run01", "run02", "run03", "run04")
    clips: int = Field(default=4, ge=1)
    learning: Learning = LEARNING

    def path(self) -> Path:
        """Of the runs. Raises DataError if they are not there."""
        return data_file(_RUNS, _RUNS_SOURCE) if self.place is None else Path(self.place)

    def content_digest(self) -> str:
        """Of the file, or of all files of the folder."""
        return _digest(self.path())


@configclass
class Size(Config):
    """What all arms share.

    Attributes:
        drawings: and groups.
        dim: of the model.
        steps: of pretraining.
        clips: that it is pretrained on.
        subjects: that each model learns, one at a time.
        image_steps, video_steps: of learning one.
        learned_clips: of learning one, positives and negatives together.
        exam_clips: by which it is measured.
        dead_steps: of the regression with dead heads.
        learning_rate: of personal tokens and words; other parts learn by `Rates` of it.
        router_rate: of what routes heads, times that.
        pressure_k, pressure_beta0: of SPR, but from a dead start.
        floor_w: of HAE, likewise.
    """

    drawings: Drawings = Drawings()
    dim: int = 64
    steps: int = Field(default=2500, ge=1)
    clips: int = Field(default=4000, ge=2)
    subjects: int = Field(default=10, ge=1)
    image_steps: int = Field(default=40, ge=1)
    video_steps: int = Field(default=80, ge=1)
    learned_clips: int = Field(default=80, ge=8)
    exam_clips: int = Field(default=64, ge=4)
    dead_steps: int = Field(default=300, ge=1)
    learning_rate: float = 1e-2
    router_rate: float = 0.05
    pressure_k: float = 0.1
    pressure_beta0: float = 0.1
    floor_w: float = 0.05


@configclass
class ArmConfig(Config):
    """One arm, and the size; ``runs`` of the arms of the twenty-way task."""

    arm: ArmName
    size: Size = Size()
    runs: Runs | None = None

    def heads(self) -> HeadRouting:
        """Those of this arm."""
        kinds: dict[str, Literal["topk", "none"]] = {"none": "none", "moh": "topk"}
        routing: Literal["relu", "topk", "none"] = kinds.get(self.arm.removeprefix("ways-"), "relu")
        size, target = self.size, TARGET if routing == "relu" else None
        control = RateBalance.Config(k=size.pressure_k, beta0=size.pressure_beta0, w=size.floor_w)
        # As the papers' codes begin is an option; here all arms begin as the model was pretrained.
        return HeadRouting(num_shared=5, routing=routing, top_k=2, target=target, control=control)

    def data(self, seed: int) -> OneShotSet.Config:
        """How many clips of what; equally many in all arms."""
        half, quarter = self.size.learned_clips // 2, self.size.learned_clips // 4
        counts = {
            "positives": (2 * half, 0, 0, 0),
            "easy": (half, 0, 0, half),
            "hard": (half, 0, quarter, half - quarter),
        }.get(self.arm, (half - quarter, quarter, quarter, half - quarter))
        plain, augmented, hard, easy = counts
        return OneShotSet.Config(
            positives=plain, augmented=augmented, hard_negatives=hard, easy_negatives=easy, seed=seed
        )

    def learning(self, seed: int) -> Learning:
        """The same number of steps in all arms."""
        size = self.size
        images = 0 if self.arm == "videos" else size.image_steps
        return Learning(
            data=self.data(seed),
            image_steps=images,
            video_steps=size.image_steps + size.video_steps - images,
            learning_rate=size.learning_rate,
            rates=self.rates(),
            seed=seed,
        )

    def rates(self) -> Rates:
        """Of the parts of a model, the same in all arms."""
        return Rates(router=self.size.router_rate)

    def control(self) -> RateBalance.Config:
        """The losses of an arm with dead heads."""
        pressure: Literal["smooth", "none"] = "none" if self.arm == "dead-none" else "smooth"
        floor: Any = {"dead-ours": "soft", "dead-released": "released"}.get(self.arm, "none")
        return RateBalance.Config(target=TARGET, pressure=pressure, floor=floor)


def make(full: bool = False, runs: Runs | None = None, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    tiny = Size(
        dim=32,
        steps=6,
        clips=24,
        subjects=1,
        image_steps=2,
        video_steps=3,
        learned_clips=8,
        exam_clips=8,
        dead_steps=20,
    )
    size = (Size() if full else tiny).replace(**changes)
    few = OneShotSet.Config(positives=1, augmented=1, hard_negatives=1, easy_negatives=1, wordings=1)
    quick = Runs(
        names=("run01",), clips=1, learning=LEARNING.replace(data=few, image_steps=1, video_steps=1, batch_size=4)
    )
    runs = runs or (Runs() if full else quick)
    return Study(
        name="pvchat",
        title="learning to know a drawn subject from one drawing, with routed heads",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=[
            Arm(name, about, ArmConfig(arm=name, size=size, runs=runs if name in WAYS else None))
            for name, about in ARMS.items()
        ],
        default_arms=tuple(name for name in ARMS if name not in WAYS),
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        revision=2,
    )


def run(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    """One arm: numbers over its subjects, or those of dead heads."""
    if config.arm.startswith("dead"):
        return _dead_heads(config, seed)
    return _of_twenty(config, seed, progress) if config.arm in WAYS else _personal(config, seed, progress)


def _personal(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    size = config.size
    progress("pretraining")
    base = _base(json.dumps(to_dict(size), sort_keys=True), seed)
    known = read_drawings(size.drawings.path(), groups=size.drawings.known)
    new = read_drawings(size.drawings.path(), groups=size.drawings.new)
    order = torch.randperm(len(new), generator=torch.Generator().manual_seed(seed)).tolist()
    scores, activations = [], []
    for number, row in enumerate(order[: size.subjects]):
        subject = new[row]
        progress(f"subject {number + 1} of {size.subjects}")
        model = copy.deepcopy(base).with_heads(config.heads(), seed=seed)
        # Nobody of the subject's alphabet is in the bank but those that are not learned here: all are strangers to the model.
        bank = portraits([other for other in [*known, *new] if other is not subject])
        with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder, warnings.catch_warnings():
            # That there are no negatives is what an arm is about.
            warnings.simplefilter("ignore", UserWarning)
            learn(model, {"<Ab>": subject.portrait(0)}, bank, folder, config.learning(seed), device="cpu")
        others = Subject(subject.name, subject.ink_NSS[1:])
        for module in model.routed():
            module.forget()
        questions = exam(model, "<Ab>", others, bank, clips=size.exam_clips, seed=seed + 1000)
        scores.append(measure(model, questions))
        activations += [module.report()["activation"] for module in model.routed()]
    return {**_means(scores), **_activation(activations), "zero": 0.0}


def _of_twenty(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    """The twenty-way task: shares over the tests of its runs."""
    size, runs = config.size, config.runs
    assert runs is not None, "its arms have runs"
    trials = read_trials(runs.path(), only=runs.names)
    progress("pretraining")
    base = copy.deepcopy(_base(json.dumps(to_dict(size), sort_keys=True), seed)).with_heads(config.heads(), seed=seed)
    bank = portraits(read_drawings(size.drawings.path(), groups=size.drawings.known))
    learning = runs.learning.replace(seed=seed, data=runs.learning.data.replace(seed=seed), rates=config.rates())
    found = []
    for number, trial in enumerate(trials):
        progress(f"run {number + 1} of {len(trials)}")
        with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
            made = ways(base, trial, bank, folder, learning, clips=runs.clips, device="cpu")
        if isinstance(made, Learned):
            raise KeyboardInterrupt
        found.append(made)
    return {
        "ways": sum(each.right for each in found) / len(found),
        "ways_by_ink": sum(each.right_by_ink for each in found) / len(found),
        "ways_chance": sum(1 / each.ways for each in found) / len(found),
        **_activation([rate for each in found for rate in each.activation_A]),
        "zero": 0.0,
    }


def _activation(rates: list[float]) -> Metrics:
    """Of attentions with routed heads, of all models of an arm: the mean, how far they are off their target, each for itself, and how
    much nearer than `NEAR` that is. A mean near the target would say nothing where half of them are all on and half all off."""
    if not rates:
        return {"activation": None, "off_target": None, "near": None}
    off = sum(abs(rate - TARGET) for rate in rates) / len(rates)
    return {"activation": sum(rates) / len(rates), "off_target": off, "near": NEAR - off}


def _means(scores: list[Score]) -> Metrics:
    """Over subjects."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    kinds = {kind: mean([score.kinds[kind].exact for score in scores]) for kind in scores[0].kinds}
    there = {f"{kind}_there": mean([score.kinds[kind].present for score in scores]) for kind in scores[0].kinds}
    return {
        **kinds,
        **there,
        "balanced": mean([score.balanced for score in scores]),
        "yes_share": mean([score.yes_share for score in scores]),
        "exact": mean([score.exact for score in scores]),
        # How much nearer to chance than 5 points.
        "chance": 0.05 - abs(mean([score.balanced for score in scores]) - 0.5),
    }


@lru_cache(maxsize=1)
def _base(size_text: str, seed: int) -> PVChat:
    """The pretrained model of a seed, which all its arms begin from: made once in a process, since arms of a seed follow each other."""
    size = from_dict(Size, json.loads(size_text))
    config = Pretraining(model=PVChat.Config(dim=size.dim), clips=size.clips, steps=size.steps, held_out=0, seed=seed)
    subjects = read_drawings(size.drawings.path(), groups=size.drawings.known)
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        model, _ = pretrain(subjects, folder, config, device="cpu")
    return model.eval()


def _dead_heads(config: ArmConfig, seed: int) -> Metrics:
    """An attention of 8 heads, 3 of them routed and off at the start, learns to do what another does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        teacher, attention = (nn.MultiheadAttention(32, 8, batch_first=True) for _ in range(2))
    heads = RoutedHeads(attention, 5, target=TARGET, control=config.control(), seed=seed)
    assert heads.gate is not None
    with torch.no_grad():
        score: Any = heads.gate.router.score
        score.bias.fill_(-0.5)
        score.weight.normal_(std=1e-5, generator=generator)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    hooks = follow_steps(optimizer, heads, config.size.dead_steps)
    for _ in range(config.size.dead_steps):
        x_BLD = torch.randn(8, 16, 32, generator=generator)
        with torch.no_grad():
            wanted = teacher(x_BLD, x_BLD, x_BLD, need_weights=False)[0]
        made = heads(x_BLD, x_BLD, x_BLD, need_weights=False)[0]
        loss = (made - wanted).square().mean() + heads.losses()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hooks.remove()
    heads.eval().forget()
    with torch.no_grad():
        x_BLD = torch.randn(64, 16, 32, generator=generator)
        heads(x_BLD, x_BLD, x_BLD, need_weights=False)
    return _activation([heads.report()["activation"]])


# Metric and arm of ours, those of the baseline, the margin, the claim, and what the paper says.
_RISES = "accuracy rises"
_CLAIMS: tuple[Asked, ...] = (
    (
        "balanced",
        "remoh",
        "balanced",
        "none",
        0.0,
        "PRIMARY: ReMoH knows more subjects than plain heads",
        ".901 against .733",
    ),
    ("balanced", "remoh", "balanced", "moh", -0.005, "ReMoH is at most half a point behind MoH", ".901 against .813"),
    (
        "chance",
        "positives",
        "zero",
        "positives",
        0.0,
        "with positives only existence is within 5 points of chance",
        ".464",
    ),
    (
        "yes_share",
        "positives",
        "zero",
        "positives",
        0.9,
        "with positives only more than 90% of the answers are yes",
        "-",
    ),
    (
        "balanced",
        "easy",
        "balanced",
        "positives",
        -0.01,
        f"{_RISES} with drawn negatives (within a point)",
        ".464 to .584",
    ),
    ("balanced", "hard", "balanced", "easy", -0.01, f"{_RISES} with look-alikes (within a point)", "-"),
    (
        "balanced",
        "remoh",
        "balanced",
        "hard",
        -0.01,
        f"{_RISES} with drawings made anew (within a point)",
        ".584 to .901",
    ),
    (
        "ways",
        "ways-remoh",
        "ways_chance",
        "ways-remoh",
        0.0,
        "of twenty, ReMoH chooses right more often than chance",
        "-",
    ),
    ("ways", "ways-remoh", "ways", "ways-none", 0.0, "of twenty, ReMoH chooses right more often than plain heads", "-"),
    ("ways", "ways-remoh", "ways", "ways-moh", -0.01, "of twenty, ReMoH is at most a point behind MoH", "-"),
)


# What must be so that a claim says something: that routed heads were near their target, and that what is said to win has learned.
_ROUTED: Floor = ("near", "remoh", 0.0)
_ROUTED_WAYS: Floor = ("near", "ways-remoh", 0.0)
_KNOWS, _KNOWS_EASY, _KNOWS_HARD = (("balanced", arm, LEARNED) for arm in ("remoh", "easy", "hard"))
_FLOORS: tuple[tuple[Floor, ...], ...] = (
    (_ROUTED, _KNOWS),
    (_ROUTED, _KNOWS),
    # Who learns nothing from any data says yes to everything too.
    (_KNOWS,),
    (_KNOWS,),
    (_KNOWS_EASY,),
    (_KNOWS_HARD,),
    (_KNOWS,),
    (_ROUTED_WAYS,),
    (_ROUTED_WAYS, ("ways", "ways-remoh", CHOOSES)),
    (_ROUTED_WAYS, ("ways", "ways-remoh", CHOOSES)),
)
# That losses fail says nothing where no losses would do.
_WORKS: tuple[Floor, ...] = (("near", "dead-ours", 0.0),)


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    end = "from a dead start the share of heads that are on ends"
    dead = [
        _off_target(results, "dead-ours", f"{end} within 0.1 of its target with our HAE", ".552 of .5", reached=True),
        _off_target(results, "dead-released", f"{end} further off with HAE as released", "-", reached=False),
        _off_target(results, "dead-spr", f"{end} further off with SPR alone", ".217 of .5", reached=False),
    ]
    asked = [_if_routed(results, *each) for each in zip(judged(results, _CLAIMS), _FLOORS, strict=True)]
    return [
        *above_floors(results, asked, _FLOORS),
        *above_floors(results, dead, [(), _WORKS, _WORKS]),
        _same(results),
    ]


def _if_routed(results: Results, claim: Claim, floors: tuple[Floor, ...]) -> Claim:
    """``claim``, which does not fail either where its routed heads were off their target: then those were not tried."""
    tried = all(results.mean(arm, metric).mean >= least for metric, arm, least in floors if metric == "near")
    return claim if tried or claim.verdict != "does not hold" else replace(claim, verdict="not resolved")


def _off_target(results: Results, arm: str, claim: str, paper: str, *, reached: bool) -> Claim:
    """How far an arm ended from its target, the worst seed against the limit."""
    found = list(results.values(arm, "off_target").values())
    if not found:
        return Claim.not_run(claim, paper)
    worst = max(found) if reached else min(found)
    return Claim.against(NEAR, claim, paper, worst, every_seed([(value <= NEAR) == reached for value in found]))


def _same(results: Results) -> Claim:
    """Whether HAE as released changes anything."""
    claim, paper = "HAE as released ends as SPR alone does, in every seed", "not seen there"
    ours, alone = (results.values(arm, "activation") for arm in ("dead-released", "dead-spr"))
    common = sorted(ours.keys() & alone.keys())
    if not common:
        return Claim.not_run(claim, paper)
    means = [sum(values[seed] for seed in common) / len(common) for values in (alone, ours)]
    verdict = every_seed([ours[seed] == alone[seed] for seed in common])
    return Claim(claim, paper, means[0], means[1], means[1] - means[0], None, verdict)
