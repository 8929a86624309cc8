"""Contract checks that ship: what every part that fits a seam must do, ours and anyone's.

    from anabranch.testing import check_feed_forward

    def test_contract():
        check_feed_forward(MyLayer.Config(num_experts=8))

Each check builds the part, puts it through its paces on tiny inputs, and raises AssertionError that says what is broken.
`run_ranks` and `Ranks` run a function in several processes, for what happens between ranks, with ``mbit`` over links of a rate; `hosts` are
network namespaces for any other program.
Tolerances: 1e-4 where the same numbers are summed in another order, 2e-2 (of the loss) for bf16.
"""

from anabranch.extras import require

require("lm", by=__name__)

import torch

from anabranch.cluster.hosts import Hosts, NoHostsError, can_make_hosts, hosts
from anabranch.cluster.ranks import RankError, Ranks, run_ranks
from anabranch.gateway.providers.checks import check_provider
from anabranch.routers.checks import check_strategy
from anabranch.testing.model import check_attention, check_block, check_feed_forward, check_linear, check_streams
from anabranch.testing.pool import check_pool
from anabranch.testing.routing import check_balancer, check_router, check_routing, check_score, check_select
from anabranch.train.parallel_contract import check_parallel
from anabranch.train.task_contract import check_task

__all__ = [
    "DEVICES",
    "Hosts",
    "NoHostsError",
    "RankError",
    "Ranks",
    "can_make_hosts",
    "check_attention",
    "check_balancer",
    "check_block",
    "check_feed_forward",
    "check_linear",
    "check_parallel",
    "check_pool",
    "check_provider",
    "check_router",
    "check_routing",
    "check_score",
    "check_select",
    "check_strategy",
    "check_streams",
    "check_task",
    "hosts",
    "run_ranks",
]

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
