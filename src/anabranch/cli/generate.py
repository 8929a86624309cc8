"""``anabranch generate``: continue a prompt."""

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from anabranch.cli.continuing import (
    AS_MODEL_SAYS,
    AS_STORED,
    PLAIN,
    WHOLE,
    Adapted,
    Deep,
    Loading,
    Sampled,
    engine_alone,
    running,
    tokens_of,
)
from anabranch.cli.option_sets import takes_sets
from anabranch.cli.options import AsJson, Model, Seed, Streams
from anabranch.cli.output import print_json, say, visible
from anabranch.cli.over_ranks import Context, over_ranks
from anabranch.cli.rewired import KeptState, Rewired, Turned, is_plain, library_fields
from anabranch.errors import ConfigError
from anabranch.extras import require

# What neither the user nor the model says.
_USUAL = {"temperature": 0.8}
_AS_THEY_ARE, _NOWHERE = Turned(), KeptState()


@takes_sets(temperature="0.8", top_p="1", turned="once before generation, then every 128 tokens")
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue; - reads stdin.")],
    max_tokens: Annotated[int, typer.Option(metavar="N", min=0, help="Maximum number of new tokens.")] = 128,
    sampled: Sampled = AS_MODEL_SAYS,
    seed: Seed = 0,
    streams: Streams = None,
    context: Context = None,
    turned: Turned = _AS_THEY_ARE,
    kept: KeptState = _NOWHERE,
    adapted: Adapted = PLAIN,
    deep: Deep = WHOLE,
    loading: Loading = AS_STORED,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt.

    Text is printed as it is generated. --json gives text and token_ids of the continuation. Sampling defaults come from the model's
    generation_config.json.

    With --depth (Dr.LLM) or --skipper (FTP), the prompt decides which blocks run, or which tokens each block computes. --json then has a
    field depth with path (the blocks that new tokens run) and computed (tokens of the prompt that each block computed).

    With torchrun --nproc-per-node N -m anabranch generate ... --context N, each of N processes keeps all weights and a share of the keys
    and values, so the text may be longer than fits into one process.

    --rewire needs a mixture of experts. --json then has a field rewiring with what each update of the routers did. --rewire-save keeps how
    the routers are turned, and --rewire-load goes on with it. See the page Rewiring.
    """
    require("lm", by="anabranch generate")
    from anabranch.serving.load import check_depth

    apart = engine_alone(sampled, streams, loading, deep, adapted)
    depth = deep.config()
    rewiring = turned.config({"--context": context, **{**apart, "--expert-budget": None}})
    told = kept.read(model, rewires=rewiring is not None)
    plain = is_plain(rewiring, loading.quantize, loading.expert_budget)
    ran: dict[str, Any] = {}
    with ExitStack() as stack:
        ranks = stack.enter_context(over_ranks(context, loading.device, apart))
        talks = ranks is None or ranks.is_first
        text = ranks.text(prompt) if ranks else sys.stdin.read() if prompt == "-" else prompt
        if not text:
            raise ConfigError("--prompt is empty; give at least one character")
        model = ranks.checkpoint(model) if ranks else model
        fields = {**sampled.of(model, _USUAL), "max_tokens": max_tokens, "seed": seed}
        if ranks or rewiring:
            fields = library_fields(fields, "--context" if ranks else "--rewire", talks=talks)
        check_depth(depth, model)
        adapted.check(model)
        adapters = adapted.config()
        loaded = loading.load(model, ranks.device if ranks else None, is_plain=plain, adapters=adapters)
        tokenizer: Any = loaded.tokenizer
        used = loaded.model.streams_of(streams)[0]
        prompt_ids = tokenizer.encode_prompt(text)
        if rewiring is not None and loaded.experts is not None:
            stack.callback(loaded.experts.close)
        rewired = None
        if rewiring is not None:
            rewired = Rewired(loaded.model, rewiring, tokenizer.stop_ids, told, kept.rewire_load)
        started = time.perf_counter()
        if ranks is not None:
            tokens = ranks.tokens(loaded.model, prompt_ids, {**fields, "stop": tuple(tokenizer.stop_ids)})
        elif rewired is not None:
            tokens = rewired.tokens(prompt_ids, fields)
        else:
            room = len(prompt_ids) + max_tokens
            engine = stack.enter_context(running(loaded, room, streams=streams, depth=depth, adapters=adapters))
            if engine.info.max_positions < len(prompt_ids) + max_tokens:
                say(f"note: keys and values have room for {engine.info.max_positions} tokens, so the text ends there")
            more: dict[str, Any] = {"depth": engine.info.depth, "told": ran, "adapted": adapted, "asked": text}
            tokens = tokens_of(engine, prompt_ids, fields, streams=streams, **more)
        ids = _shown(text, tokens, tokenizer, talks=talks and not as_json)
        if rewired is not None:
            rewired.save(kept.rewire_save)
    if not talks:
        return
    seconds = time.perf_counter() - started
    for note in () if rewired is None else rewired.notes():
        say(note)
    if as_json:
        print_json(
            {
                "text": tokenizer.decode(ids),
                "token_ids": ids,
                "prompt": text,
                "prompt_token_ids": prompt_ids,
                "streams": used,
                "seconds": round(seconds, 3),
                **({} if rewired is None else {"rewiring": rewired.report()}),
                **({"depth": {"num_layers": len(loaded.model.blocks), **ran}} if ran else {}),
            }
        )
        return
    if sys.stderr.isatty():
        say(f"\n{len(ids)} tokens, {len(ids) / max(seconds, 1e-9):.1f} tokens/s")


def _shown(text: str, tokens: Iterator[int], tokenizer: Any, *, talks: bool) -> list[int]:
    """The new tokens; with ``talks`` the prompt and they are printed as they come."""
    # A file gets what the model said, a terminal what it can bear.
    show = visible if sys.stdout.isatty() else str
    decoder = tokenizer.stream()
    # What cannot be continued is refused here, with nothing printed.
    ids = list(itertools.islice(tokens, 1))
    if not talks:
        return [*ids, *tokens]
    print(show(text), end="", flush=True)
    for token in ids:
        print(show(decoder.push(token)), end="", flush=True)
    for token in tokens:
        ids.append(token)
        print(show(decoder.push(token)), end="", flush=True)
    print(show(decoder.flush()))
    return ids
