"""The arm ``smollm2`` of the study of Dr.LLM: a pretrained model, and the exact next token, which has too many outcomes for luck."""

import hashlib
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from anabranch.data import Tokenizer
from anabranch.depth import DepthRouter
from anabranch.depth.dr_llm import (
    FitConfig,
    NextToken,
    Question,
    RouterBank,
    SearchConfig,
    baselines_at,
    influence_of,
    labels_of,
    measure,
    reference_of,
    search_paths,
)
from anabranch.depth.stack import BlockStack, stack_of
from anabranch.errors import DataError
from anabranch.files import parse_json, sha256_of
from anabranch.lm import SamplingConfig
from anabranch.places import data_file
from anabranch.studies.apart import TRIES, parted, runs_of
from anabranch.studies.dr_llm_small import facts_of, fitted, teller
from anabranch.studies.harness import Metrics, Progress
from anabranch.studies.small_model import SHA256, find_weights

if TYPE_CHECKING:
    from anabranch.studies.dr_llm import Size

GSM8K = "qa/gsm8k_train.jsonl.gz"
# Of the contexts, in parts of ten.
SHARES = {"gsm8k": 4, "python": 4, "copy": 1, "count": 1}
# Of decoding: prompts, new tokens of each, and times that all is done.
DECODED, NEW_TOKENS, TIMES = 8, 48, 3
MOST_ROUTER_SHARE, MORE_THAN_LAYERS = 0.01, 0.02
LATE = 2.0
T = TypeVar("T")


def inputs() -> str:
    """Names what is read: the weights, the questions, and Python's documentation, which differs from version to version."""
    told = f"{SHA256} {sha256_of(data_file(GSM8K))} {documentation_digest()}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def run(size: "Size", seed: int, progress: Progress) -> Metrics:
    """Search, train routers, measure them beside baselines, and time them."""
    from anabranch.lm.gguf import load_gguf

    progress("loading SmolLM2")
    model, tokenizer = load_gguf(find_weights(), dtype=getattr(torch, size.dtype))
    assert tokenizer is not None, "the file has one"
    stack = stack_of(model.eval())
    searched, held_out = contexts_of(tokenizer, size, seed)
    progress("search")
    # A right path that is 2 shorter would end the search, and the claim is about 3. Late moves first, since they are cheap.
    config = SearchConfig(simulations=size.simulations, probe=size.probe, stop_saving=None, late=LATE, seed=seed)
    found = search_paths(stack, searched, NextToken(), config, progress=teller(progress, 10))
    labels = labels_of(found.rows, flips=found.keeps_flips)
    progress("routers")
    bank, f1 = fitted(stack, labels, FitConfig(epochs=size.epochs, seed=seed))
    progress("held-out contexts")
    reference = reference_of(stack, held_out)
    made = measure(stack, held_out, bank, reference=reference)
    beside = baselines_at(
        stack, held_out, made.layers_per_token, influence_of(stack, searched), reference=reference, seed=seed
    )
    progress("timing")
    return {
        **facts_of(found),
        "macro_f1": f1,
        "agreement": made.agreement,
        "accuracy": made.accuracy,
        "base_accuracy": made.full_accuracy,
        "nats": made.nats_per_token,
        "base_nats": made.full_nats_per_token,
        "layers": made.layers_per_token,
        "saved_layers": stack.num_blocks - made.layers_per_token,
        **{f"agreement_{name}": one.agreement for name, one in beside.items()},
        **timed(stack, bank, held_out),
    }


def timed(stack: BlockStack, bank: RouterBank, questions: Sequence[Question]) -> Metrics:
    """Decoding at routed against full depth, of the same prompts, one at a time; the quicker of several rounds of each."""
    router = DepthRouter.attach(stack, bank)
    prompts = [question.prompt for question in questions[:DECODED]]
    config = SamplingConfig(temperature=0, max_tokens=NEW_TOKENS, stop=())
    seconds: dict[Any, list[float]] = {"full": [], "routed": []}
    for _ in range(TIMES):
        for depth, taken in seconds.items():
            router.reset()
            started = time.perf_counter()
            for prompt in prompts:
                router.generate(prompt, config, depth=depth)
            taken.append(time.perf_counter() - started)
    # The last round was a routed one.
    report = router.report()
    ratio, layers = min(seconds["routed"]) / min(seconds["full"]), report.layers_per_token / stack.num_blocks
    return {
        "decode_time_ratio": ratio,
        "decode_layer_ratio": layers,
        "spare_decode_time": layers + MORE_THAN_LAYERS - ratio,
        "router_share": report.router_share,
        "spare_router_time": MOST_ROUTER_SHARE - report.router_share,
    }


def contexts_of(tokenizer: Tokenizer, size: "Size", seed: int) -> tuple[list[Question], list[Question]]:
    """Contexts to search, and others to measure, mixed, none of them twice.

    Those to measure are of other questions and topics, and share no run of 16 tokens with one that is searched. Raises DataError where
    there are not so many.
    """
    draw = random.Random(f"contexts {seed}")

    def encoded(texts: Iterator[str]) -> Iterator[tuple[int, ...]]:
        return (tuple(tokenizer.encode(text, parse_special=False)) for text in texts)

    sources = {
        "gsm8k": encoded(_shuffled(_questions(), draw)),
        "copy": encoded(_made(_copied, draw)),
        "count": encoded(_made(_counted, draw)),
    }
    sections, others = parted(list(encoded(iter(documentation_sections()))), draw)
    searched = _windows({**sources, "python": _shuffled(sections, draw)}, size.contexts, size.context, draw)
    taken = set[tuple[int, ...]]().union(*(runs_of(one.prompt + one.answer) for one in searched))
    sources["python"] = _shuffled(others, draw)
    return searched, _windows(sources, size.test_contexts, size.context, draw, taken)


def _windows(
    sources: Mapping[str, Iterator[tuple[int, ...]]],
    wanted: int,
    length: int,
    draw: random.Random,
    taken: Collection[tuple[int, ...]] = (),
) -> list[Question]:
    """So many tokens and the one behind them, that have none of the ``taken`` runs."""
    order = [name for name, share in SHARES.items() for _ in range(share)]
    found: dict[tuple[int, ...], Question] = {}
    for _ in range(TRIES * wanted):
        if len(found) == wanted:
            break
        name = order[len(found) % len(order)]
        tokens = next(sources[name], ())
        if len(tokens) <= length:
            continue
        start = draw.randrange(len(tokens) - length)
        window = tokens[start : start + length + 1]
        if window[:-1] not in found and runs_of(window).isdisjoint(taken):
            found[window[:-1]] = Question(f"{name}-{len(found)}", window[:-1], window[-1:])
    if len(found) < wanted:
        raise DataError(f"only {len(found)} contexts were found that share no text; the study needs {wanted}")
    mixed = list(found.values())
    draw.shuffle(mixed)
    return mixed


def _questions() -> list[str]:
    import gzip

    with gzip.open(data_file(GSM8K), "rt", encoding="utf-8") as file:
        rows = [parse_json(line) for line in file if line.strip()]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]


def documentation_sections() -> list[str]:
    """Of Python's documentation, as every Python carries it."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def documentation_digest() -> str:
    """Names it by content, which differs from version to version."""
    return hashlib.sha256("\0".join(documentation_sections()).encode()).hexdigest()[:16]


def _shuffled(texts: Sequence[T], draw: random.Random) -> Iterator[T]:
    """Without end, in another order each time; of none none."""
    while texts:
        yield from draw.sample(texts, len(texts))


def _made(make: Callable[[random.Random], str], draw: random.Random) -> Iterator[str]:
    while True:
        yield make(draw)


_WORDS = (
    "red blue green stone river cloud apple chair seven north light water paper glass music tree winter bread".split()
)


def _copied(draw: random.Random) -> str:
    """A line of words over and over."""
    line = " ".join(draw.choices(_WORDS, k=draw.randint(4, 9)))
    return f"{line}\n" * 24


def _counted(draw: random.Random) -> str:
    """Numbers in equal steps."""
    start, step = draw.randrange(1000), draw.randint(1, 9)
    return ", ".join(str(start + step * place) for place in range(80))
