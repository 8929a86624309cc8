"""Pools that count who is asked, for tests of what is written down of them."""

import json

from anabranch.errors import BackendError
from anabranch.routers.router_r1.environment import Price, Reply


class Live:
    """A pool that counts who is asked."""

    def __init__(self, reply=None, most=0.0, **prices):
        self.prices = prices or {"small": Price(1.0), "large": Price(2.0, 1.0)}
        self.asked, self._reply, self._most = [], reply, most

    def most_usd(self, model, query):
        return self._most

    def reply(self, model, query):
        self.asked.append((model, query))
        return Reply(f"{model} says", 10, 5) if self._reply is None else self._reply(model, query)

    def close(self):
        pass


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def failing(*whether, transient=True):
    """A model that fails as often as it is told to, and then answers."""
    left = iter(whether)

    def reply(model, query):
        if next(left, False):
            error = BackendError("busy")
            error.is_transient = error.is_free = transient
            raise error
        return Reply("x", 0, 3)

    return Live(reply)
