"""GLIDER: LoRA experts that were trained apart, chosen by the query as a whole (its instruction) and by each token (gates or prototypes).

    pool = GliderPool.load("adapters")              # a folder of peft's folders
    pool.onto(model)
    model(token_BL, state=pool.rows(queries, token_BL.shape[1]))

    z_e(u) = local_e(u) + a(q) cos(g_e, q)          the same second term at every layer and token of a row
    w      = the best k of softmax(z), made to sum to 1
    y      = W u + sum_e w_e scale_e B_e A_e u

"Glider: Global and Local Instruction-Driven Expert Router", 2024, arXiv 2410.07172. Gates are those of PHATGOOSE (arXiv 2402.05859),
prototypes those of Arrow (arXiv 2405.11157).
"""

from anabranch.adapters.gated import GatedLowRank
from anabranch.adapters.glider.baselines import merged_experts
from anabranch.adapters.glider.calibration import Calibration
from anabranch.adapters.glider.choosing import GliderConfig
from anabranch.adapters.glider.clusters import Clusters, merge_clusters
from anabranch.adapters.glider.embed import HiddenStates, TextEmbedder, TextFeatures
from anabranch.adapters.glider.endpoint import ChatWriter, EndpointEmbedder
from anabranch.adapters.glider.explaining import Explained, Explanation, explain
from anabranch.adapters.glider.folder import describe_expert
from anabranch.adapters.glider.gates import GateMethod
from anabranch.adapters.glider.matcher import Match, Matcher
from anabranch.adapters.glider.pool import GliderPool
from anabranch.adapters.glider.score import GliderScore, bias_rows
from anabranch.adapters.glider.settings import Plugins, PoolSettings, TextEndpoint, read_settings
from anabranch.adapters.glider.vectors import activations_of_rows, arrow_prototype, mean_activations, standardised
from anabranch.adapters.glider.writing import prompt_of

__all__ = [
    "Calibration",
    "ChatWriter",
    "Clusters",
    "EndpointEmbedder",
    "Explained",
    "Explanation",
    "GateMethod",
    "GatedLowRank",
    "GliderConfig",
    "GliderPool",
    "GliderScore",
    "HiddenStates",
    "Match",
    "Matcher",
    "Plugins",
    "PoolSettings",
    "TextEmbedder",
    "TextEndpoint",
    "TextFeatures",
    "activations_of_rows",
    "arrow_prototype",
    "bias_rows",
    "describe_expert",
    "explain",
    "mean_activations",
    "merge_clusters",
    "merged_experts",
    "prompt_of",
    "read_settings",
    "standardised",
]
