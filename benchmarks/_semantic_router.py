"""The peer of benchmarks/coe.py: aurelio-labs' semantic-router, in an environment of its own.

    python benchmarks/_semantic_router.py FILE.npz      # arrays: train_ND, train_label_N, test_ND (texts are row numbers)

Reads lines from standard input: ``predict NAME`` answers with a JSON list of routes, ``time N`` with seconds per decision. Routes are the
labels, utterances the rows of train; the encoder looks vectors up, so that nothing is embedded. Decisions are awaited on an event loop,
which is its quicker way. Routers whose names end in ``+fit`` are calibrated by its ``fit()`` as its documentation advises, on labelled
queries that it has not seen: each tenth row of train is asked there in place of being an utterance. ``time`` is that of ``default+fit``.
"""

import asyncio
import json
import sys
import time
from collections import defaultdict

import numpy as np
import semantic_router
from semantic_router import IndexedRouter, Route
from semantic_router.encoders import DenseEncoder

# Of so many rows one is kept from the utterances of a router that is calibrated, for its calibration.
HELD = 10


class Known(DenseEncoder):
    """Vectors that were computed before, by text."""

    vectors: dict

    def __call__(self, docs):
        return [self.vectors[text] for text in docs]

    async def acall(self, docs):
        return [self.vectors[text] for text in docs]


def routes_of(labels):
    """A route for each label, of the texts that have it."""
    utterances = defaultdict(list)
    for text, label in labels.items():
        utterances[label].append(text)
    return [Route(name=name, utterances=texts) for name, texts in utterances.items()]


async def main() -> None:
    data = np.load(sys.argv[1])
    train = {f"train {row}": vector for row, vector in enumerate(data["train_ND"])}
    test = {f"test {row}": vector for row, vector in enumerate(data["test_ND"])}
    labels = dict(zip(train, map(str, data["train_label_N"]), strict=True))
    unseen = [text for row, text in enumerate(train) if row % HELD == HELD - 1]
    held = frozenset(unseen)
    encoder = Known(name="known", vectors={**train, **test})
    settings = {"default": {}, "sum32": {"top_k": 32, "aggregation": "sum"}, "max": {"aggregation": "max"}}
    routers = {}
    for name, options in settings.items():
        routers[name] = IndexedRouter(encoder=encoder, routes=routes_of(labels), **options)
        rest = {text: label for text, label in labels.items() if text not in held}
        fitted = IndexedRouter(encoder=encoder, routes=routes_of(rest), **options)
        await fitted.afit(unseen, [labels[text] for text in unseen])
        routers[f"{name}+fit"] = fitted
    print(json.dumps({"ready": list(routers), "version": semantic_router.__version__}), flush=True)
    texts = list(test)
    for line in sys.stdin:
        command, argument = line.split()
        if command == "predict":
            print(json.dumps([(await routers[argument].acall(text)).name for text in texts]), flush=True)
        else:
            asked = texts[: int(argument)]
            started = time.perf_counter()
            for text in asked:
                await routers["default+fit"].acall(text)
            print(json.dumps((time.perf_counter() - started) / len(asked)), flush=True)


asyncio.run(main())
