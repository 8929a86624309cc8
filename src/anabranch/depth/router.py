"""`DepthRouter`: a pretrained model, and routers beside it that decide which of its blocks a sequence runs (Dr.LLM, arXiv 2510.12773).

router = DepthRouter.attach(model, bank)
tokens = router.generate(prompt, SamplingConfig(temperature=0), depth="routed")
print(router.report())
"""
# Shapes: B sequences, L positions, N blocks, V vocabulary

import time
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from anabranch.bounds import shown
from anabranch.depth.decisions import check_depth_path, path_of
from anabranch.depth.report import DepthReport, DepthUse
from anabranch.depth.routed import PLAIN, Decider, check_control, routed_pass
from anabranch.depth.stack import BlockStack, run_path, stack_of
from anabranch.errors import ConfigError
from anabranch.lm.cache import KeyValueCache
from anabranch.lm.generate import SamplingConfig, Step, evaluating, pad_left, sample
from anabranch.lm.token_ids import check_token_ids
from anabranch.nn.visits import Path
from anabranch.routing.trace import RoutingTrace
from anabranch.routing.trace_builder import TraceBuilder
from anabranch.routing.trace_schema import TraceLayer

__all__ = ["Decide", "Depth", "DepthRouter"]

# Which blocks run: as the routers say, each once, or a path (or one for each sequence).
Depth = str | Path
# When routers decide: once, on the prompt, or on every new token again.
Decide = Literal["prompt", "step"]


class DepthRouter:
    """Generation at a depth that routers choose, that a caller gives, or that is the model's.

    The model is neither copied nor changed; in training mode it is put in evaluation for the time of a pass. Use `attach`.

    Attributes:
        stack: the model's blocks.
        bank: the routers; None where there are none, and depth is then ``full`` or a path.
    """

    def __init__(self, stack: BlockStack, bank: Decider | None = None) -> None:
        self.stack, self.bank = stack, bank
        self.reset()

    @classmethod
    def attach(cls, model: Any, bank: Any = None) -> Self:
        """Put routers beside a model.

        Args:
            model: what `stack_of` knows, or a stack.
            bank: a `anabranch.depth.dr_llm.RouterBank` or anything with its ``decide``; a folder of one of this model; or None.

        Raises ConfigError for a model whose blocks are not known, and for a bank that cannot decide, is of another model, or is the
        baseline ``features="first"``, which decides on whole prompts alone.
        """
        stack = stack_of(model)
        if isinstance(bank, str | FilePath):
            bank = _load(bank, stack)
        if bank is not None and not callable(getattr(bank, "decide", None)):
            raise ConfigError(
                f"bank is a {type(bank).__name__}, which has no method decide(layer, x_BLD, mask_BL, control); give a RouterBank, its "
                "folder, or None"
            )
        for name, own in (("num_blocks", stack.num_blocks), ("width", stack.width)):
            theirs = getattr(bank, name, own)
            if theirs != own:
                raise ConfigError(f"the routers have {name}={theirs}, and the model {own}; they are of another model")
        if getattr(getattr(bank, "config", None), "features", "previous") == "first":
            raise ConfigError(
                "these routers see the states before the first block alone (features=first), which is a baseline that anabranch depth eval "
                "measures; train routers with features=previous to generate with them"
            )
        # Empty, or not there, where routers are of no certain model.
        theirs = getattr(getattr(bank, "config", None), "fingerprint", "")
        if theirs and theirs != stack.fingerprint():
            raise ConfigError(
                f"the routers are of another model of the same sizes: fingerprint {theirs}, and this one has {stack.fingerprint()}"
            )
        return cls(stack, bank)

    def reset(self) -> None:
        """Forget what has been counted and recorded."""
        self._use = DepthUse(self.stack.num_blocks)
        self._trace = TraceBuilder(scores=True)

    def report(self) -> DepthReport:
        """How often blocks ran, and what the routers took, since `reset`."""
        return self._use.report()

    def trace(self) -> RoutingTrace:
        """The routers' decisions since `reset`: a layer for each block (skip, execute, repeat), an item for each sequence."""
        return self._trace.trace()

    def generate(
        self,
        prompt: Sequence[int] | Sequence[Sequence[int]],
        config: SamplingConfig | None = None,
        *,
        depth: Depth = "routed",
        control: float = PLAIN,
        decide: Decide = "prompt",
    ) -> Any:
        """The new tokens of a prompt, or of each of several.

        Args:
            prompt: token ids, or several prompts, which need not be equally long.
            config: how tokens are chosen, and how many.
            depth: ``"routed"``; ``"full"``, each block once; or the blocks to run in order, one path for all prompts or one for each.
            control: of routed depth, without training anything again: -1 skips all blocks, -0.5 is what the routers say, 0.5 is the whole
                model, 1 repeats all.
            decide: of routed depth: once on the ``"prompt"``, for all tokens that follow; or on every new token of its own (``"step"``).

        Raises ConfigError (a ValueError) for a path that cannot be, routed depth without routers, what is neither, and prompts that are no
        token ids.
        """
        given: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise ConfigError(f"prompt is {shown(given)}; give token ids, or several lists of them")
        several = len(given) > 0 and isinstance(given[0], Sequence) and not isinstance(given[0], str)
        prompts: Any = given if several else [given]
        results: list[list[int]] = [[] for _ in prompts]
        for step in self.stream(prompts, config, depth=depth, control=control, decide=decide):
            for row, token in zip(step.rows, step.tokens, strict=True):
                results[row].append(token)
        return results if several else results[0]

    @torch.inference_mode()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplingConfig | None = None,
        *,
        depth: Depth = "routed",
        control: float = PLAIN,
        decide: Decide = "prompt",
    ) -> Iterator[Step]:
        """Like `generate` of several prompts, but yields each step as it is made. Sequences that stop leave the batch."""
        config = config or SamplingConfig()
        if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
            raise ConfigError(f"prompts is {shown(prompts)}; give lists of token ids")
        paths = self.paths(depth, len(prompts))
        control = check_control(control)
        if decide not in get_args(Decide):
            raise ConfigError(f"decide is {shown(decide)}; it must be one of {', '.join(get_args(Decide))}")
        check_token_ids(prompts, self.stack.vocabulary)
        token_BL, mask_BL = pad_left(prompts, self.stack.device)
        generator = torch.Generator(device=self.stack.device).manual_seed(config.seed)
        cache = self.stack.new_cache(token_BL.shape[1] + config.max_tokens)
        rows, first = list(range(len(prompts))), self._use.sequences
        self._use.sequences += len(prompts)
        for _ in range(config.max_tokens if prompts else 0):
            with evaluating(self.stack.module):
                items = [first + row for row in rows]
                if paths is None or (depth == "routed" and decide == "step"):
                    logits_BV, paths = self._route(token_BL, mask_BL, cache, control, items)
                else:
                    logits_BV = self._run(token_BL, mask_BL, cache, paths)
            next_B = sample(logits_BV, config, generator)
            going = [token not in config.stop for token in next_B.tolist()]
            if not all(going):
                keep_B = torch.tensor(going, device=next_B.device)
                next_B = next_B[keep_B]
                rows = [row for row, on in zip(rows, going, strict=True) if on]
                paths = [path for path, on in zip(paths, going, strict=True) if on]
                cache.keep_rows(keep_B)
            if not rows:
                return
            yield Step(list(rows), next_B.tolist())
            token_BL, mask_BL = next_B.unsqueeze(1), None

    def paths(self, depth: Depth, batch: int) -> list[tuple[int, ...]] | None:
        """The path of each of ``batch`` sequences; None for what routers decide.

        Raises ConfigError for a path that cannot be, and for routed depth without routers.
        """
        if isinstance(depth, str):
            if depth == "full":
                return [tuple(range(self.stack.num_blocks))] * batch
            if depth != "routed":
                raise ConfigError(f"depth is {shown(depth)}; it must be 'routed', 'full', or a list of blocks")
            if self.bank is None:
                raise ConfigError(
                    "depth is 'routed', and no routers are attached; attach a bank, or take 'full' or a path"
                )
            return None
        checked: Any = check_depth_path(depth, self.stack.num_blocks, batch)
        return list(checked) if checked and isinstance(checked[0], tuple) else [checked] * batch

    def _run(
        self, token_BL: Tensor, mask_BL: Tensor | None, cache: KeyValueCache, paths: list[tuple[int, ...]]
    ) -> Tensor:
        """logits_BV of the last position."""
        started = time.perf_counter()
        logits_BLV = run_path(self.stack, token_BL, paths, cache=cache, attention_mask=mask_BL, last_only=True)
        self._note(paths, token_BL, mask_BL, started)
        return logits_BLV[:, -1]

    def _route(
        self, token_BL: Tensor, mask_BL: Tensor | None, cache: KeyValueCache, control: float, items: Sequence[int]
    ) -> tuple[Tensor, list[tuple[int, ...]]]:
        """(logits_BV of the last position, the paths that routers chose)."""
        assert self.bank is not None, "paths() refuses this"
        started, position = time.perf_counter(), cache.length
        made = routed_pass(
            self.stack, self.bank, token_BL, attention_mask=mask_BL, cache=cache, control=control, last_only=True
        )
        paths = [path_of(decisions) for decisions in made.decision_BN.tolist()]
        self._use.router_s += made.router_s
        self._note(paths, token_BL, mask_BL, started)
        self._record(made.decision_BN, made.probability_BN3, items, position)
        return made.logits_BLV[:, -1], paths

    def _note(self, paths: Sequence[Sequence[int]], token_BL: Tensor, mask_BL: Tensor | None, started: float) -> None:
        """Count a pass that has just run."""
        self._use.seconds += time.perf_counter() - started
        lengths = [token_BL.shape[1]] * len(paths) if mask_BL is None else mask_BL.sum(1).tolist()
        for path, length in zip(paths, lengths, strict=True):
            self._use.add(path, length)

    def _record(self, decision_BN: Tensor, probability_BN3: Tensor, items: Sequence[int], position: int) -> None:
        """Keep decisions for `trace`."""
        for block in range(self.stack.num_blocks):
            decision_B1, probability_B3 = decision_BN[:, block : block + 1], probability_BN3[:, block]
            self._use.add_decisions(decision_B1.flatten().tolist())
            self._trace.add(
                TraceLayer(layer=block, name=f"depth.{block}", num_destinations=3, top_k=1),
                decision_B1.numpy(),
                probability_B3.gather(1, decision_B1).numpy(),
                item_N=list(items),
                position_N=position,
                score_NE=probability_B3.numpy(),
            )


def _load(folder: str | FilePath, stack: BlockStack) -> Any:
    """The routers of a folder. Raises ConfigError or CheckpointError where they are of another model, or none."""
    from anabranch.depth.dr_llm.bank import RouterBank

    return RouterBank.load(folder, stack)
