"""Public sets of recorded outcomes, from the folder named by ANABRANCH_DATA."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from anabranch.places import data_file
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model, Pool
from anabranch.routers.data.csv import Columns, load_csv
from anabranch.routers.data.jsonl import load_jsonl
from anabranch.routers.data.prices import pool_of, read_prices
from anabranch.routers.data.splits import deduplicated
from anabranch.routers.money import Price


@dataclass(frozen=True, kw_only=True)
class RoutingSet:
    """Outcomes, the models they are of, and what to know about them.

    Attributes:
        data: without duplicates.
        pool: models with prices and sizes, in the order of the columns.
        about: where it comes from, its licence, and what misleads in it.
    """

    data: Recorded
    pool: Pool
    about: str


def llmrouter() -> RoutingSet:
    """Questions of 13 benchmarks on 9 open models of 7 to 70 billion parameters (ulab-uiuc/LLMRouter, MIT): 5,541 different ones.

    The published train and test files are merged, since 69 test questions are train questions too. Costs are GraphRouter's: the
    prompt (estimated from its bytes) and 512 tokens of answer, at the list prices of the set.
    """
    prices = read_prices(data_file("llm_routing/llmrouter_models.json"))
    parts = [
        load_jsonl(data_file(f"llm_routing/llmrouter_{part}.jsonl.gz"), prices=prices) for part in ("train", "test")
    ]
    data = deduplicated(merged(parts))
    about = (
        "LLMRouter (MIT), GPQA left out. Some scores near 0 tell of answers in the wrong format: routers partly learn which model "
        "obeys it. Costs are estimates: token counts were not recorded."
    )
    return RoutingSet(data=data, pool=pool_of(data.models, prices), about=about)


MMLU_COLUMNS = Columns(
    query="prompt",
    task="subject",
    score={"mixtral-8x7b-instruct": "mixtral_8x7b_instruct_correct", "gpt-4-1106": "gpt_4_1106_correct"},
)


def routellm_mmlu() -> RoutingSet:
    """MMLU on Mixtral-8x7B and GPT-4 (lm-sys/RouteLLM, Apache-2.0): right or wrong.

    Costs are of the prompt and a one-letter answer at the prices RouteLLM's paper reckons with (arXiv 2406.18665: 0.24 and
    24.7 dollars per million tokens).
    """
    prices = {
        name: Model(name=name, price=Price.of_dollars(dollars, dollars), parameters=parameters)
        for name, dollars, parameters in (("mixtral-8x7b-instruct", 0.24, 47.0), ("gpt-4-1106", 24.7, None))
    }
    data = deduplicated(load_csv(data_file("llm_routing/routellm_mmlu.csv.gz"), MMLU_COLUMNS))
    tokens_NM2 = np.ones((len(data), 2, 2))
    tokens_NM2[:, :, 0] = [[-(-len(text.encode()) // 4)] for text in data.query]
    rate_M = np.array([prices[name].price.input for name in data.models]) / 1e15
    data = dataclasses.replace(data, tokens_NM2=tokens_NM2, cost_NM=tokens_NM2.sum(2) * rate_M)
    about = "RouteLLM's MMLU (Apache-2.0; MMLU: MIT). Learned in-domain here, so not comparable with routers learned on arena votes."
    return RoutingSet(data=data, pool=pool_of(data.models, prices), about=about)


SETS: dict[str, Callable[[], RoutingSet]] = {"llmrouter": llmrouter, "routellm_mmlu": routellm_mmlu}


def merged(parts: list[Recorded]) -> Recorded:
    """Rows of all parts, one after another, with the models of the first. Raises InputError if a part lacks one of them."""
    parts = [part.only(parts[0].models) for part in parts]

    shared = [name for name in parts[0].signals if all(name in part.signals for part in parts)]

    def stacked(name: str) -> np.ndarray | None:
        found = [getattr(part, name) for part in parts]
        return None if any(value is None for value in found) else np.concatenate(found)

    return Recorded(
        query=tuple(text for part in parts for text in part.query),
        models=parts[0].models,
        task=tuple(task for part in parts for task in part.task),
        score_NM=np.concatenate([part.score_NM for part in parts]),
        cost_NM=stacked("cost_NM"),
        tokens_NM2=stacked("tokens_NM2"),
        latency_NM=stacked("latency_NM"),
        vector_ND=stacked("vector_ND"),
        answers=tuple(a for part in parts for a in part.answers) if all(part.answers for part in parts) else (),
        signals={name: np.concatenate([part.signals[name] for part in parts]) for name in shared},
    )
