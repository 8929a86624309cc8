"""GraphVite: node embedding by online-augmented edge samples and parallel negative sampling over orthogonal blocks.

Zhu, Xu, Qu and Tang, "GraphVite: A High-Performance CPU-GPU Hybrid System for Node Embedding", WWW 2019, arXiv 1903.00757.

    V, C          vectors of nodes as heads and as tails of samples, [N, D]; the embedding is V
    augmentation  walks; two nodes at most s apart on one are a positive sample                 `augmentation`
    partition     nodes into P parts by degree in zig-zag; samples into P x P blocks            `partition`
    schedule      blocks of a step share no part, so they are trained at once                   `schedule`
    train         K negatives of weight w by degree^0.75 from the block's tail part, SGD        `train`
    collaboration the next pool of samples is made while one is trained                         `solver`

One schedule, three executors: CPU threads (`executor`), torch on any device (`torch_executor`), processes (`distributed`).

Departures from the paper and its code:

- A step has P blocks whatever the number of workers (the paper: as many as workers), so one result for any number of workers.
- The blocks of a pool hold the samples that its walks gave; the reference fills every block to one size and drops the rest.
- node2vec by rejection, without a table per edge (the same distribution, no O(sum of degree^2) of memory).
- The augmentation step is at most 10 where ``auto`` chooses it, also for graphs of fewer edges than nodes.
- A directed graph's negatives are drawn by the weight that comes in, its parts made by what goes in and out.
- Knowledge graphs and visualisation, which the repository also has, are not here.
"""

from anabranch.graph.graphvite.estimator import GraphVite
from anabranch.graph.graphvite.solver import Progress

__all__ = ["GraphVite", "Progress"]
