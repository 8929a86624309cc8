"""What ``anabranch serve`` tells whoever started it: where it loads, how it will compute, where it answers."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from anabranch.cli.output import binary_size, fact, print_json
from anabranch.config import to_dict
from anabranch.serving.rewiring import LIMITED

if TYPE_CHECKING:
    from anabranch.serving.core.client import EngineInfo
    from anabranch.serving.http.serve import ServeConfig


class Told:
    """The three times that a server that starts has something to say (`ServeConfig.serve`).

    Args:
        config: as it is served.
        as_json: one object when it is ready, and nothing before.
        quiet: nothing before it is ready.
    """

    def __init__(self, config: ServeConfig, *, as_json: bool, quiet: bool) -> None:
        self._config, self._as_json, self._waits = config, as_json, not as_json and not quiet
        self._experts: dict[str, Any] = {}
        self._depth: dict[str, Any] = {}
        self._rewiring: dict[str, Any] = {}

    def bound(self, url: str) -> None:
        """The port is open, the model not there."""
        if self._waits:
            from anabranch.lm.folder import run_of

            engine = self._config.engine
            # Of a training run it is told which of its checkpoints.
            name = engine.model if run_of(engine.model) is not None else engine.name or engine.model
            fact("loading", f"{name}   {url} answers 503 until it is ready", to=sys.stderr)

    def known(self, info: EngineInfo) -> None:
        """The model is there."""
        engine = self._config.engine
        self._experts.update(info.experts)
        if info.rewires:
            limit = to_dict(engine.rewiring.limit)
            self._rewiring.update(to_dict(engine.rewiring.rewiring), limits={name: limit[name] for name in LIMITED})
        if info.routes_depth:
            self._depth.update(control=engine.depth.control, max_depth=info.max_depth)
        if info.skips_tokens:
            self._depth.update(skipper=str(engine.depth.skipper))
        if self._depth:
            self._depth.update(usual=info.depth, num_layers=info.num_layers)

    def ready(self, url: str) -> None:
        """It answers."""
        if self._as_json:
            said = {"experts": self._experts, "depth": self._depth, "rewiring": self._rewiring}
            told = {name: facts for name, facts in said.items() if facts}
            print_json({"url": url, "page": f"{url}/", "pid": os.getpid(), **told})
        else:
            for name, facts, words in (
                ("experts", self._experts, _experts),
                ("depth", self._depth, _depth),
                ("rewiring", self._rewiring, _rewiring),
            ):
                if facts:
                    fact(name, words(facts))
            fact("serving", f"{url}/v1   page {url}/   (Ctrl-C stops)")
            fact("next", f"curl -s {url}/v1/models")
        sys.stdout.flush()


def _experts(experts: dict[str, Any]) -> str:
    """How experts come, in words; ``experts`` as `EngineInfo` has it."""
    held, total = (binary_size(experts[name]) for name in ("budget_bytes", "all_bytes"))
    words = [f"{held} of {total} in memory", f"policy {experts['policy']}"]
    if experts["predictor"] is None:
        words.append("no predictor")
    elif experts["sees_all_layers"]:
        words.append(f"predictor {experts['predictor']}")
    else:
        words.append(
            f"predictor {experts['predictor']}, which sees one layer ahead (anabranch experts fit-predictor makes one for all)"
        )
    if experts["dual_batch"]:
        words.append(f"dual batches of {experts['dual_batch']}{', regrouped' if experts['regroup'] else ''}")
    return ", ".join(words)


def _depth(routed: dict[str, Any]) -> str:
    words = []
    if "control" in routed:
        words.append(f"routed to at most {routed['max_depth']}   control {routed['control']:g}")
    if "skipper" in routed:
        words.append(f"prompts pruned by {routed['skipper']}")
    words.append(f"requests that do not say: {routed['usual']}")
    return f"{routed['num_layers']} blocks, {', '.join(words)}"


def _rewiring(rewired: dict[str, Any]) -> str:
    each = "the prompt alone" if rewired["interval"] is None else f"the prompt and each {rewired['interval']} tokens"
    steps, most = rewired["steps"], rewired["limits"]["steps"]
    own = f", at most {most} where a request says so" if most > steps else ""
    return f"of requests that say rewire, by {each}   {steps} steps of {rewired['eta']:g}{own}"
