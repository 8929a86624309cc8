"""ParScale: P parallel streams of one decoder, told apart by learned prefixes, merged by a learned gate.

"Parallel Scaling Law for Language Models", 2025, arXiv 2505.10475.

With streams p = 1 ... P of the same weights:
  prefixes   in front of the keys and values of every layer stand m learned entries of stream p; they are not rotated, real tokens keep
             positions 0, 1, ...; every query sees all of them and its causal past
  gate       w = softmax(W_2 silu(W_1 [H_1; ...; H_P] + b_1) + b_2) in fp32, smoothed to (1 - eps) w + eps / P
  output     H = sum over p of w_p H_p, then the language model's head, once
Parameters grow by 2 L h_kv m d_h P + (P d + 1) d + (d + 1) P, FLOPs by the factor P; weights are read once for all streams.

Departures: the released code cannot train; the network that makes the prefixes in training is ours (`PrefixMLP`). Evidence:
`anabranch study parscale`.
"""

from anabranch.experts.parscale.cost import HARDWARE, Cost, Hardware, cost_model, measure_hardware
from anabranch.experts.parscale.formats import export_parscale, load_parscale
from anabranch.experts.parscale.law import PAPER_LOSSES, Law, diversity, fit_parallel_law
from anabranch.experts.parscale.recipe import add_streams, fold, init_from_tokens, remove_streams, set_streams
from anabranch.experts.parscale.streams import ParScale
from anabranch.experts.parscale.wrap import WrappedModel, wrap

__all__ = [
    "HARDWARE",
    "PAPER_LOSSES",
    "Cost",
    "Hardware",
    "Law",
    "ParScale",
    "WrappedModel",
    "add_streams",
    "cost_model",
    "diversity",
    "export_parscale",
    "fit_parallel_law",
    "fold",
    "init_from_tokens",
    "load_parscale",
    "measure_hardware",
    "remove_streams",
    "set_streams",
    "wrap",
]
