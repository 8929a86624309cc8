"""Experts spread over ranks give what one pool gives."""

import pytest
import torch

from anabranch.nn.pool import ExpertPool
from anabranch.routing.decision import Routing
from anabranch.serving.elasticmoe.exchange import Mailbox, Owner, Peer, ShardedExperts
from anabranch.serving.elasticmoe.plan import place, plan_scale
from anabranch.serving.elasticmoe.wire import ChannelClosedError, pair
from anabranch.testing import DEVICES

E, D, F, K = 7, 16, 24, 3


@pytest.fixture(scope="module")
def pool():
    return ExpertPool(E, D, F, init_std=0.3, generator=torch.Generator().manual_seed(0)).requires_grad_(False)


def group(pool, placement, rows=64, device="cpu"):
    """A `ShardedExperts` of each rank, all in this process and on one device: threads answer for the others."""
    owners = []
    for held in placement.experts[0]:
        index = torch.tensor(held, dtype=torch.int64)
        owners.append(Owner([(pool.w13[index].to(device), pool.w2[index].to(device))]))
    ranks, channels = [], []
    for rank in range(len(owners)):
        peers = []
        for other in range(len(owners)):
            if other != rank:
                ours, theirs = pair()
                mailbox = Mailbox(rows, K, D, torch.float32)
                owners[other].serve(theirs, Mailbox(rows, K, D, torch.float32, mailbox.fd))
                peers.append(Peer(other, ours, mailbox))
                channels += [ours, theirs]
        spread = ShardedExperts(0, rank, owners[rank], peers, E)
        spread.place(placement, device)
        ranks.append(spread)
    return ranks, channels


def routed(items: int, unused: bool = False, device: str = "cpu"):
    generator = torch.Generator().manual_seed(1)
    x_ND, score_NE = torch.randn(items, D, generator=generator), torch.rand(items, E, generator=generator)
    weight_NK, index_NK = score_NE.topk(K)
    if unused:
        skip = torch.rand(items, K, generator=generator) < 0.5
        weight_NK, index_NK = weight_NK.masked_fill(skip, 0.0), index_NK.masked_fill(skip, -1)
    return x_ND.to(device), Routing(index_NK.to(device), weight_NK.to(device), score_NE.to(device))


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_equal_to_one_pool(pool, devices, weight_on, unused, device):
    placement = plan_scale(place(E, 1, (5,)), range(5, 5 + devices), expert_bytes=(1,)).new  # slots in disorder
    ranks, channels = group(pool, placement, device=device)
    with torch.inference_mode():
        for items in (0, 1, 11, 150):  # more than a mailbox holds
            x_ND, routing = routed(items, unused)
            expected = pool(x_ND, routing, weight_on=weight_on)
            here = routed(items, unused, device)
            for spread in ranks:
                found = spread(*here, weight_on=weight_on)
                assert found.device.type == device
                torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=1e-5)
    assert int(ranks[0].load_E.sum()) == sum(int((routed(n, unused)[1].index_NK >= 0).sum()) for n in (0, 1, 11, 150))
    for channel in channels:
        channel.close()


def test_more_ranks_than_experts(pool):
    placement = place(E, 1, range(9))
    ranks, channels = group(pool, placement)
    x_ND, routing = routed(5)
    with torch.inference_mode():
        torch.testing.assert_close(ranks[8](x_ND, routing), pool(x_ND, routing), atol=1e-6, rtol=1e-5)
    for channel in channels:
        channel.close()


def test_an_owner_that_fails_and_one_that_is_gone(pool):
    ranks, channels = group(pool, place(E, 1, (0, 1)))
    x_ND, routing = routed(5)
    ranks[1].owner.layers = []
    with torch.inference_mode(), pytest.raises(RuntimeError, match="rank 1: IndexError"):
        ranks[0](x_ND, routing)
    for channel in channels:
        channel.close()
    with torch.inference_mode(), pytest.raises(ChannelClosedError):
        ranks[0](x_ND, routing)
