"""`LLM`: text in, text out, without a server; the same scheduler, runner and loop."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import AnabranchError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.request import Finish, Output, Request, Sampling
from anabranch.serving.core.stream import joined
from anabranch.serving.engine.best_of import best_of
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.messages import Add, Close, Event, Refused
from anabranch.test_time import BudgetController, Sampled

Prompt = str | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one prompt was continued with.

    Attributes:
        prompt: token ids.
        tokens: new ones.
        text: of the new tokens; "" without a tokenizer.
        finish: why it ended.
        output: everything else the engine told: log probabilities, routing, cached tokens.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish: Finish
    output: Output


class LLM:
    """A model that continues many prompts at once.

        llm = LLM("runs/demo")
        for answer in llm.generate(["def add(", "import "], Sampling(temperature=0, max_tokens=32)):
            print(answer.text)

    Args:
        model: a path as `anabranch.lm.load_model` takes it, or a loaded decoder.
        tokenizer: of a loaded decoder.
        options: fields of `ServingConfig`, or for a loaded decoder also arguments of `Engine.of`.
    """

    def __init__(self, model: str | Path | Decoder, tokenizer: Tokenizer | None = None, **options: Any) -> None:
        if isinstance(model, Decoder):
            of_engine = (
                "sampler",
                "hooks",
                "controls",
                "tier",
                "memory",
                "host_blocks",
                "pool",
                "make_runner",
                "order",
                "depth_bank",
                "skipper",
            )
            parts = {name: options.pop(name) for name in of_engine if name in options}
            self.tokenizer = tokenizer
            self.engine = Engine.of(model, ServingConfig(**options), tokenizer=tokenizer, **parts)
        else:
            # It runs in this process, which a plan of `memory` counts.
            config = ServingConfig(model=str(model), **{"process": False, **options})
            self.engine, self.tokenizer = config.load()
        self._events: list[Event] = []
        self._loop = self.engine.loop(self._events.extend)
        self._numbers = itertools.count()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None, **request: Any
    ) -> list[Generation]:
        """Continue each prompt, given as text or token ids; results are in order.

        Args:
            prompts: what to continue.
            sampling: for all, or one for each.
            request: further fields of each `Request`, such as ``record_routing``.

        Raises:
            InputError: a prompt or a grammar can never run, or a prompt is text and there is no tokenizer.
            BusyError: too many grammars are asked for at a time.
            AnabranchError: the engine failed.
        """
        each = [sampling] * len(prompts) if sampling is None or isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise InputError(f"there are {len(each)} samplings for {len(prompts)} prompts; give one, or one for each")
        requests = [
            Request(id=f"llm-{next(self._numbers)}", prompt=self._ids(prompt), sampling=one or Sampling(), **request)
            for prompt, one in zip(prompts, each, strict=True)
        ]
        self._events.clear()
        for one in requests:
            self._loop.put(Add(one))
        self._loop.run(until_idle=True)
        return self._gathered(requests)

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        sampling: Sampling | Sequence[Sampling | Mapping[str, Any]] | None = None,
        **request: Any,
    ) -> list[Generation]:
        """Answer conversations by the model's own chat template; results are in order.

        Args:
            conversations: each in OpenAI's form, ``[{"role": "user", "content": "..."}]``.
            sampling: for all, or one for each; fields of `Sampling` will do.
            request: as of `generate`.

        Raises what `generate` does; InputError without a tokenizer, TokenizerError for messages that the template refuses.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InputError("the model has no tokenizer, and a conversation is text; use generate with token ids")
        prompts = [
            tuple(tokenizer.encode_chat(tokenizer.apply_chat_template([dict(one) for one in messages])))
            for messages in conversations
        ]
        if sampling is None or isinstance(sampling, Sampling):
            return self.generate(prompts, sampling, **request)
        each = [one if isinstance(one, Sampling) else Sampling(**one) for one in sampling]
        return self.generate(prompts, each, **request)

    def best_of(
        self, prompts: Sequence[Prompt], rules: BudgetController, sampling: Sampling | None = None, **how: Any
    ) -> list[Sampled]:
        """As many answers to each prompt as pay, and the best of them; results are in order.

        Args:
            prompts: what to continue.
            rules: of `anabranch.test_time`: what is known of such prompts, what a right answer is worth and what a sample costs.
            sampling: of every answer, at a temperature above 0; with a seed the n-th answer is drawn with that seed and n more.
            how: ``select`` (`majority` by default), ``same`` (what an answer comes to, for votes), ``verify`` (from the place of a prompt
                and its new answers to whether each is right; the first that is right is given), and fields of each `Request`.

        Raises what `generate` does; InputError for a temperature of 0.
        """
        return best_of(self, prompts, rules, sampling, **how)

    def _gathered(self, requests: Sequence[Request]) -> list[Generation]:
        outputs: dict[str, Output] = {}
        for event in self._events:
            if isinstance(event, Refused):
                raise event.reason
            if isinstance(event, Output):
                outputs[event.id] = joined(outputs[event.id], event) if event.id in outputs else event
        return [self._generation(request, outputs[request.id]) for request in requests]

    def _generation(self, request: Request, output: Output) -> Generation:
        if output.finish is None or output.finish is Finish.ERROR:
            raise AnabranchError(output.error or "the engine gave no reason for an error")
        text = "" if self.tokenizer is None else self.tokenizer.decode(output.tokens)
        return Generation(prompt=request.prompt, tokens=output.tokens, text=text, finish=output.finish, output=output)

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self.tokenizer is None:
            raise InputError("a prompt is text, but the model has no tokenizer; give token ids")
        return tuple(self.tokenizer.encode_prompt(prompt))

    def close(self) -> None:
        """Free what the engine holds."""
        self._loop.put(Close())
        self._loop.run()
