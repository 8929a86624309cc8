"""``anabranch generate``: continue a prompt."""

import itertools
import sys
import time
from typing import Annotated

import typer

from anabranch.cli.options import AsJson, Device, Dtype, Model, Seed, Streams, load, sampling_of
from anabranch.cli.output import print_json, say, visible
from anabranch.errors import ConfigError
from anabranch.extras import require


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue; - reads stdin.")],
    max_tokens: Annotated[int, typer.Option(metavar="N", min=0, help="Most new tokens.")] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", min=0, help="0 takes the likeliest token. Default: as the model says, else 0.8."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Sample among the K likeliest. Default: as the model says, else all."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Sample among the likeliest that make up P. Default: as the model says, else 1."
        ),
    ] = None,
    seed: Seed = 0,
    streams: Streams = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt.

    Text comes as it is made. With --json: text and token_ids of the continuation alone. A model says how it is sampled from in its
    generation_config.json.
    """
    require("lm", by="anabranch generate")
    from anabranch.lm import SamplingConfig, stream

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ConfigError("--prompt is empty; give at least one character")
    network, tokenizer = load(model, dtype, device)
    used = network.streams_of(streams)[0]
    said = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = SamplingConfig(
        **sampling_of(model, said, {"temperature": 0.8}), max_tokens=max_tokens, stop=tokenizer.stop_ids, seed=seed
    )
    prompt_ids = tokenizer.encode_prompt(text)
    # A file gets what the model said, a terminal what it can bear.
    show = visible if sys.stdout.isatty() else str
    decoder, ids, started = tokenizer.stream(), [], time.perf_counter()
    steps = stream(network, [prompt_ids], sampling, num_streams=streams)
    # What cannot be continued is refused here, with nothing printed.
    first = list(itertools.islice(steps, 1))
    if not as_json:
        print(text, end="", flush=True)
    for step in itertools.chain(first, steps):
        ids += step.tokens
        if not as_json:
            print(show(decoder.push(step.tokens[0])), end="", flush=True)
    seconds = time.perf_counter() - started
    if as_json:
        print_json(
            {
                "text": tokenizer.decode(ids),
                "token_ids": ids,
                "prompt": text,
                "prompt_token_ids": prompt_ids,
                "streams": used,
                "seconds": round(seconds, 3),
            }
        )
        return
    print(decoder.flush())
    if sys.stderr.isatty():
        say(f"\n{len(ids)} tokens, {len(ids) / max(seconds, 1e-9):.1f} tokens/s")
