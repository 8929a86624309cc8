"""What several gateways on one Redis know together: rates, what is under way, breakers that opened, answers that were kept.

    link        the connection: it answers soon, or it is away, which is said once
    leases      what is under way in one process and counts in all, and what they are told when there is time
    counts      requests and tokens a minute, and requests at a time, of each key
    rooms       likewise of each deployment that has limits of its own
    breakers    which deployments others found out of order
    answers     what the exact cache holds
    meanings    what the semantic cache holds
    clears      that an operator has cleared them

Nothing here is needed: while Redis is away, each process goes on with what it knows itself.
"""

from anabranch.gateway.shared.answers import SharedAnswers
from anabranch.gateway.shared.breakers import SharedBreakers
from anabranch.gateway.shared.counts import RedisCounts
from anabranch.gateway.shared.link import AwayError, Link
from anabranch.gateway.shared.meanings import SharedMeanings
from anabranch.gateway.shared.rooms import RedisRooms
from anabranch.gateway.shared.shared import Shared

__all__ = [
    "AwayError",
    "Link",
    "RedisCounts",
    "RedisRooms",
    "Shared",
    "SharedAnswers",
    "SharedBreakers",
    "SharedMeanings",
]
