"""``anabranch experts fit-predictor``: learn to foresee which experts a model's tokens go to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.cli.options import AsJson, Device, Dtype, ExpertBudget, Model, Quantize, Quiet, Seed, load_parts
from anabranch.cli.output import duration, fact, print_json, say, table, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import DataError
from anabranch.extras import require
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.serving.expertflow import Routes
    from anabranch.serving.expertflow.predictors import Fingerprint, RoutePredictor
    from anabranch.serving.load import Loaded

# Of recorded routes, whose prompts nobody knows.
MIDDLE = 1 << 30


def fit_predictor(
    model: Model,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="Text, Parquet or JSON lines for inputs; or recorded routing of this model: a trace of anabranch report, or an "
            ".npz of --save-routes.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="File for the predictor. Default: in the model's folder, where serve finds it."
        ),
    ] = None,
    kind: Annotated[
        Literal["encdec", "frequency"],
        typer.Option(help="The paper's network, or a table of how often each token id goes to each expert."),
    ] = "encdec",
    inputs: Annotated[
        int, typer.Option(metavar="N", min=2, help="Number of inputs to continue. The paper: 10000.")
    ] = 256,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Continuations per input, as in the paper.")] = 3,
    input_length: Annotated[int, typer.Option(metavar="L", min=1, help="Tokens per input.")] = 64,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Maximum number of new tokens in a continuation.")
    ] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", min=0, help="Sampling temperature. Default: as the model says, else 1."),
    ] = None,
    hold_out: Annotated[
        float,
        typer.Option(metavar="F", min=0.001, max=0.9, help="Share of the inputs that are held out for evaluation."),
    ] = 0.1,
    batch: Annotated[
        int, typer.Option(metavar="B", min=1, help="Sequences that decode together in the evaluation.")
    ] = 4,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum number of training steps.")] = 3000,
    seconds: Annotated[float, typer.Option(metavar="S", min=0.001, help="Maximum seconds of training.")] = 180.0,
    save_routes: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also save the recorded routing (.npz), to train on it again.")
    ] = None,
    seed: Seed = 0,
    quantize: Quantize = None,
    expert_budget: ExpertBudget = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a predictor of the experts that a model's tokens will use in every layer, before the first layer runs.

    The model continues inputs with sampling, and the routing of their tokens is recorded: the data set of the ExpertFlow paper. The
    predictor is evaluated on held-out inputs, together with the paper's baselines TLP (the previous token's experts) and SLP (the
    previous layer's), and the frequency of experts.
    """
    require("lm", by="anabranch experts fit-predictor")
    from anabranch.lm.folder import files_of
    from anabranch.serving.expertflow.predictors.files import FILE, place_of

    place = Path(out) if out is not None else place_of(model)
    # A predictor of before gives way.
    of_model = [path for path in files_of(model) if path.name != FILE]
    check_apart([place, save_routes], [*of_model, *(source for source in sources if Path(source).is_file())])
    if save_routes is not None and Path(save_routes).suffix != ".npz":
        raise DataError(f"--save-routes is {save_routes!r}; its name must end with .npz")
    # Not with a predictor of before, which may be damaged or another model's.
    loaded = load_parts(model, dtype, device, quantize, expert_budget, predictor="router_lookahead")
    try:
        fingerprint = _fingerprint(model, loaded)
        begin = time.perf_counter()
        if all(_has_routes(source) for source in sources):
            fit_on, judged_on, prompt = *_recorded(sources, hold_out, seed), MIDDLE
        else:
            sampled = {"temperature": temperature, "max_tokens": max_tokens}
            prompts = _inputs(sources, loaded, inputs, input_length)
            fit_on, judged_on = _sampled(model, loaded, prompts, samples, sampled, hold_out, seed, quiet)
            prompt = input_length
        recorded_s = time.perf_counter() - begin
        predictor = _fitted(kind, fingerprint, loaded, fit_on, steps, seconds, seed, quiet or as_json)
    finally:
        if loaded.experts is not None:
            loaded.experts.close()
    accuracy = _judged(predictor, fingerprint, loaded, fit_on, judged_on, prompt, batch)
    # Both are known to be good before anything is written.
    if save_routes is not None:
        _write_routes(fit_on, judged_on, save_routes)
    place.parent.mkdir(parents=True, exist_ok=True)
    predictor.save(place)  # type: ignore[attr-defined]
    sizes = {"fitted_on": _size(fit_on), "judged_on": _size(judged_on)}
    spent = {"record_s": round(recorded_s, 3), "fit_s": round(time.perf_counter() - begin - recorded_s, 3)}
    if as_json:
        about = {"model": model, "out": str(place), "kind": kind, "fingerprint": fingerprint.to_dict()}
        print_json({**about, **sizes, **spent, "batch": batch, "accuracy": accuracy})
        return
    fact(
        "model",
        f"{model}   {fingerprint.num_layers} routed layers, top {max(fingerprint.top_k)} of {max(fingerprint.num_experts)}",
    )
    words = [f"{one['sequences']:,} sequences, {one['tokens']:,} tokens" for one in sizes.values()]
    fact("routes", f"{words[0]}; held out: {words[1]}   ({duration(recorded_s)})")
    headers = [f"batches of {batch}", "B_acc\nrecall", "precision", "experts\npredicted", "wanted"]
    rows = [
        [name, f"{one['recall']:.3f}", f"{one['precision']:.3f}", f"{one['predicted']:.1f}", f"{one['wanted']:.1f}"]
        for name, one in accuracy.items()
    ]
    table(headers, rows)
    where = "" if out is None else f" --set engine.experts.predictor={out}"
    wrote(str(place), f"anabranch serve {model} --expert-budget SIZE{where}")


def _fingerprint(model: str, loaded: Loaded) -> Fingerprint:
    from anabranch.serving.expertflow import find_pools
    from anabranch.serving.expertflow.expertflow import tokenizer_fingerprint

    if loaded.experts is not None:
        return loaded.experts.fingerprint
    return find_pools(loaded.model, model).fingerprint(tokenizer_fingerprint(loaded.tokenizer, loaded.model))


def _has_routes(source: str) -> bool:
    """Whether a file holds routes, not text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from anabranch.routing.trace import METADATA_KEY

    path = Path(source)
    if path.suffix != ".parquet" or not path.is_file():
        return path.suffix == ".npz"
    try:
        return METADATA_KEY in (pq.read_metadata(path).metadata or {})
    except (pa.ArrowException, OSError):
        # Whoever reads it says what is wrong with it.
        return False


def _recorded(sources: list[str], hold_out: float, seed: int) -> tuple[Routes, Routes]:
    """Of files: routes to learn from and to be judged on."""
    from anabranch.routing import RoutingTrace
    from anabranch.serving.expertflow import Routes
    from anabranch.serving.expertflow.predictors.sampled import held_out

    parts = [
        Routes.load(source) if source.endswith(".npz") else Routes.from_trace(RoutingTrace.read(source))
        for source in sources
    ]
    routes = Routes.concatenate(parts)
    if (routes.token_N < 0).any():
        raise DataError(f"{', '.join(sources)} has no token ids, which routes are predicted from")
    return tuple(map(routes.take, held_out(len(routes.starts) - 1, hold_out, seed)))  # type: ignore[return-value]


def _inputs(sources: list[str], loaded: Loaded, number: int, length: int) -> list[list[int]]:
    """The first ``length`` tokens of windows, taken from all over the texts, each with as many."""
    from anabranch.data import corpus_at, corpus_windows

    assert loaded.tokenizer is not None, "it was looked for"
    made: list[list[int]] = []
    for at, source in enumerate(sources):
        left = -(-(number - len(made)) // (len(sources) - at))
        windows: Any = corpus_windows(
            corpus_at(source).build(), loaded.tokenizer, length, batch_size=64, num_windows=left
        )
        made += [ids for batch in windows if batch.token_BL.shape[1] == length for ids in batch.token_BL.tolist()]
    if len(made) < number:
        say(f"note: {', '.join(sources)} has {len(made)} inputs of {length} tokens, not {number}")
    return made


def _sampled(
    model: str,
    loaded: Loaded,
    inputs: list[list[int]],
    samples: int,
    said: dict[str, Any],
    hold_out: float,
    seed: int,
    quiet: bool,
) -> tuple[Routes, Routes]:
    """The paper's data set, in two parts: no input is in both."""
    from anabranch.cli.options import sampling_of
    from anabranch.serving.core.request import Sampling
    from anabranch.serving.expertflow.predictors.sampled import held_out, sample_routes

    sampling = Sampling(**sampling_of(model, {**said, "top_k": None, "top_p": None}, {"temperature": 1.0}))
    parts, done = [], 0
    with Progress(len(inputs) * samples, "continuation", quiet=quiet) as progress:
        for places in held_out(len(inputs), hold_out, seed):
            parts.append(
                sample_routes(
                    loaded.model,
                    [inputs[place] for place in places],
                    samples=samples,
                    sampling=sampling,
                    stop_tokens=loaded.tokenizer.stop_ids if loaded.tokenizer is not None else (),
                    seed=seed + done,
                    hooks=[] if loaded.experts is None else [loaded.experts],
                    progress=lambda now, before=done: progress.update(before + now),  # type: ignore[misc]
                )
            )
            done += len(places) * samples
    return parts[0], parts[1]


def _fitted(
    kind: str,
    fingerprint: Fingerprint,
    loaded: Loaded,
    routes: Routes,
    steps: int,
    seconds: float,
    seed: int,
    quiet: bool,
) -> RoutePredictor:
    from anabranch.serving.expertflow.predictors import EncoderDecoder, Frequency
    from anabranch.serving.expertflow.predictors.encdec import Settings

    vocab_size = loaded.model.config.vocab_size
    if (routes.num_experts, routes.top_k) != (fingerprint.num_experts, fingerprint.top_k):
        raise DataError(
            f"the routes are of a model with {list(routes.num_experts)} experts by layer, top {list(routes.top_k)}; this one has "
            f"{list(fingerprint.num_experts)}, top {list(fingerprint.top_k)}"
        )
    if routes.token_N.max() >= vocab_size:
        raise DataError(
            f"the routes are of token {routes.token_N.max()}, and the model's tokens are 0 to {vocab_size - 1}"
        )
    if kind == "frequency":
        return Frequency(fingerprint, vocab_size).fit(routes)
    settings = Settings(steps=steps, seconds=seconds, seed=seed)
    return EncoderDecoder(fingerprint, vocab_size, settings).fit(routes, (lambda text: None) if quiet else say)


def _judged(
    predictor: RoutePredictor,
    fingerprint: Fingerprint,
    loaded: Loaded,
    fit_on: Routes,
    routes: Routes,
    prompt: int,
    batch: int,
) -> dict[str, dict[str, float]]:
    """B_acc of the predictor on what it has not seen, and of those that it must be better than."""
    from anabranch.serving.expertflow.predictors import Frequency, Slp, Tlp
    from anabranch.serving.expertflow.predictors.accuracy import decode_accuracy

    others: list[RoutePredictor] = [Tlp(fingerprint), Slp(fingerprint)]
    if not isinstance(predictor, Frequency):
        others.append(Frequency(fingerprint, loaded.model.config.vocab_size).fit(fit_on))
    found = {each.kind: decode_accuracy(each, routes, prompt=prompt, batch=batch) for each in (predictor, *others)}
    return {name: vars(accuracy) for name, accuracy in found.items()}


def _write_routes(fit_on: Routes, judged_on: Routes, path: str) -> None:
    from anabranch.serving.expertflow import Routes

    Routes.concatenate([fit_on, judged_on]).save(path)


def _size(routes: Routes) -> dict[str, int]:
    return {"sequences": len(routes.starts) - 1, "tokens": len(routes)}
