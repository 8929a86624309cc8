"""LoRA-Mixer: experts that are LoRA adapters of one's own or of others, in the projections of a model, chosen for each token.

    model, tokenizer = load_model("SmolLM2-135M")
    load_mixture({"law": "law-lora", "sql": "sql-lora"}, model)     # any model: one of ours, or a module of torch with linear layers
    fit_router(model, rows, "runs/router", train=TrainConfig(steps=200))
    write_peft("as-law", static_mixture(model, mixture_report(model, rows.batches(8)).weights_of(0)))

    y = W x + sum_e w_e(x) (alpha_e / r_e) B_e A_e x,    p(x) = softmax(R x)

w is p in training and the best three of it, made to sum to 1, afterwards. One router serves q, k and v of a block, which read the same;
what experts add flows on through the attention or the state space ("serial"). The routing loss is `SpecialisationLoss`.

"LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing", 2025, arXiv 2507.00029.
"""

from anabranch.adapters.beside import passing
from anabranch.adapters.lora_mixer.layer import MixedLowRank, labelled_rows, preservation
from anabranch.adapters.lora_mixer.load import load_mixture, mixed_layers
from anabranch.adapters.lora_mixer.loss import SoftThenTopK, SpecialisationLoss
from anabranch.adapters.lora_mixer.task import Labelled, MixtureTask
from anabranch.adapters.lora_mixer.training import fit_joint, fit_router, load_fitted
from anabranch.adapters.static import mu, static_mixture

__all__ = [
    "Labelled",
    "MixedLowRank",
    "MixtureTask",
    "SoftThenTopK",
    "SpecialisationLoss",
    "fit_joint",
    "fit_router",
    "labelled_rows",
    "load_fitted",
    "load_mixture",
    "mixed_layers",
    "mu",
    "passing",
    "preservation",
    "static_mixture",
]
