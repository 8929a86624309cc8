"""What each of Anthropic's models takes, told by its name: the way it thinks, sampling, structured output.

| from | thinking | sampling | structured output |
|---|---|---|---|
| before 3.7 | none | yes | by a tool |
| 3.7 to 4.5 | a budget of tokens | yes; from 4.1 on temperature or top_p, not both | 4.5: by a schema |
| 4.6 | a budget, or adaptive with an effort | likewise | by a schema |
| 4.7 on | adaptive with an effort | none | by a schema |

A name without a version (a proxy's own) is taken for a model that thinks by a budget.
"""

import re
from dataclasses import dataclass

_VERSION = re.compile(r"claude-(?:[a-z]{1,20}-){0,4}(\d)(?:[-.](\d{1,2}))?(?!\d)")


@dataclass(frozen=True, slots=True)
class Takes:
    """What a model takes.

    Attributes:
        budget: ``thinking.budget_tokens``.
        adaptive: ``thinking.type`` adaptive and ``output_config.effort``.
        sampling: ``temperature``, ``top_p``, ``top_k``.
        one_of_two: of temperature and top_p.
        schema: ``output_config.format``, and ``strict`` of tools.
        xhigh: that effort.
    """

    budget: bool = True
    adaptive: bool = False
    sampling: bool = True
    one_of_two: bool = False
    schema: bool = False
    xhigh: bool = False


def takes(model: str) -> Takes:
    """See the module."""
    found = _VERSION.search(model.lower())
    if found is None:
        return Takes(schema=True)
    version = int(found[1]), int(found[2] or 0)
    return Takes(
        budget=(3, 7) <= version < (4, 7),
        adaptive=version >= (4, 6),
        sampling=version < (4, 7),
        one_of_two=version >= (4, 1),
        schema=version >= (4, 5),
        xhigh=version >= (4, 7),
    )
