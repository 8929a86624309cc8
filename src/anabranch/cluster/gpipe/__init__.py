"""GPipe: a sequential model in stages, through which micro-batches stream (Huang et al., arXiv 1811.06965).

    pipe = GPipe(model, stages=4, micro_batches=8)
    loss = pipe.step(x, target, loss_fn)

One idea a file: `pipe` is the interface, `micro_batches` cuts a batch, `chunk` runs a contiguous part of the model forward and backward,
`skips` are connections between layers that are not neighbours, `batch_norm` defers statistics, `ties` are parameters that several stages
have, `costs` weighs layers; `stage` goes through a column of the schedule, over the mailboxes of `local` or the messages of `distributed`.
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.cluster.gpipe.pipe import GPipe
from anabranch.cluster.gpipe.skips import Pop, Stash
from anabranch.cluster.gpipe.stage import StageError

__all__ = ["GPipe", "Pop", "StageError", "Stash"]
