"""A small IC-Cache that asks nobody, for tests of its parts."""

import numpy as np

from anabranch.routers.contract.query import Query
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.ic_cache import Arm, ExamplePool, ICCache
from anabranch.routers.ic_cache.critic import Critic
from anabranch.routers.ic_cache.router import Router
from anabranch.routers.ic_cache.threshold import Threshold
from anabranch.routers.retrieve import Exact

EMBEDDER = Hashed.Config(dim=64).build()


def made(**fields):
    """Arms small and large, of which the former is given examples, and the latter's answers are kept. Its clock stands at 1,000 s."""
    config = ICCache.Config(
        pool=ExamplePool.Config(domains=("",), trust={"large": 1}),
        index=Exact.Config(),
        router=Router.Config(critic=Critic.Config(hidden=(8,)), temperature=0.0, explore=0.0),
        threshold=Threshold.Config(share=0.0),
        **fields,
    )
    arms = [Arm(name="small", cost=0.1, context=200), Arm(name="large", cost=1.0)]
    return ICCache(config, arms=arms, embed=EMBEDDER.embed, clock=lambda: 1000.0)


def prefer(cache, arm):
    """Let the router think so much of one arm that it takes it."""
    cache.router.critic.utilities = lambda x_I: np.array([float(name == arm) for name in cache.router.arms])


def teach(cache, text, answer, **fields):
    """Offer an answer of the large model's."""
    [admission] = cache.update_cache([Query(text=text, **fields)], [answer])
    return admission
