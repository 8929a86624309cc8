"""Does a small model learn to know a subject from one drawing, do routed heads help, and what does each part of the recipe give?

"PVChat: Personalized Video Chat with One-Shot Learning", 2025, arXiv 2503.17069. The paper: accuracy .733 with a plain Q-former, .813 with
MoH, .901 with ReMoH; .464 with positives only, .584 with negatives, .781 and .901 with generated positives; the loss is NaN without
SPR and HAE, activation .217 without HAE and .552 with both (target .5).

Scaled down: Omniglot characters instead of people, since twenty people drew each; clips of 8 frames of 48 x 48 in which one to three of
them move; a model of half a million parameters that is pretrained on the clips of other alphabets. Identity here is a drawn character:
the numbers of the paper are not comparable, its orders are.

One run: a plain model is pretrained on Korean, Latin and Greek (the same for all arms of a seed); for each of 10 subjects of Balinese and
Early Aramaic it is copied, gets the arm's heads, which change nothing at first, and learns the subject from ONE drawing by one person, with
80 clips and the same steps in all arms. Measured on 64 new clips of drawings by the 19 others, half of the clips without it, half of these
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

The last three run if they are asked for: Omniglot's twenty-way task (its ``all_runs.zip``), the first 4 of its 20 runs, as clips of 4 a
drawing that is to be told. 600 steps of 32 clips for all 20 subjects of a run.

The rule, fixed before any run. PRIMARY: existence, balanced, is higher with remoh than with none. A claim is about a paired difference over
seeds, ours - baseline - margin; it holds where that is above 0 by a two-sided paired t-test at 5% after Holm's correction over all such
claims that have run, does not hold where it is below 0 by the same test, and is not resolved otherwise or with fewer than five seeds. The
three claims about dead heads are of each run, which is deterministic: they hold if so in every seed, and do not hold if in none.

What is reported and judged by nobody: all four kinds of questions, images first against videos alone, and in the twenty-way task what the
nearest drawing says by `InkEmbedder`, which learns nothing.

Not run yet. The three arms of the twenty-way task, and the claims on them, were added before any run. It is planned for 5 seeds.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
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
    Column("ways", "of twenty\nright", ".3f"),
    Column("ways_by_ink", "nearest\ndrawing", ".3f"),
)
TARGET = 0.5
# |activation - target| that counts as reached.
NEAR = 0.1
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
        # As the papers' codes begin is an option; here all arms begin as the model was pretrained.
        return HeadRouting(num_shared=5, routing=routing, top_k=2, target=TARGET if routing == "relu" else None)

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
            seed=seed,
        )

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
    return {**_means(scores), "activation": sum(activations) / len(activations) if activations else None, "zero": 0.0}


def _of_twenty(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    """The twenty-way task: shares over the tests of its runs."""
    size, runs = config.size, config.runs
    assert runs is not None, "its arms have runs"
    trials = read_trials(runs.path(), only=runs.names)
    progress("pretraining")
    base = copy.deepcopy(_base(json.dumps(to_dict(size), sort_keys=True), seed)).with_heads(config.heads(), seed=seed)
    bank = portraits(read_drawings(size.drawings.path(), groups=size.drawings.known))
    learning = runs.learning.replace(seed=seed, data=runs.learning.data.replace(seed=seed))
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
        "zero": 0.0,
    }


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
    activation = heads.report()["activation"]
    return {"activation": activation, "off_target": abs(activation - TARGET)}


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


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    end = "from a dead start the share of heads that are on ends"
    return [
        *judged(results, _CLAIMS),
        _off_target(results, "dead-ours", f"{end} within 0.1 of its target with our HAE", ".552 of .5", reached=True),
        _off_target(results, "dead-released", f"{end} further off with HAE as released", "-", reached=False),
        _off_target(results, "dead-spr", f"{end} further off with SPR alone", ".217 of .5", reached=False),
        _same(results),
    ]


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
