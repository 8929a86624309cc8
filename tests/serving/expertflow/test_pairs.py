"""Dual batches in an engine: tokens as ever, routes predicted once, and regrouped."""

from typing import Any

import numpy as np
import pytest

from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import SamplingConfig, generate, save_model
from anabranch.routing import record_routing
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.request import Sampling
from anabranch.serving.engine.llm import LLM
from anabranch.serving.expertflow import Routes, find_pools, offload
from anabranch.serving.expertflow.predictors import EncoderDecoder, Fingerprint, Frequency, Tlp
from anabranch.serving.expertflow.predictors.encdec import Settings
from anabranch.serving.expertflow.predictors.files import find_file, place_of
from anabranch.serving.expertflow.token_scheduler import TokenScheduler
from anabranch.serving.experts import ExpertsConfig
from expertflow_models import VOCAB, make_model, moe_config, prompts

GREEDY = Sampling(temperature=0, max_tokens=9)


class Counting(Tlp):
    """Notes who was predicted, and where."""

    def __init__(self, fingerprint: Fingerprint) -> None:
        super().__init__(fingerprint)
        self.asked: list[tuple[Any, int, int]] = []

    def predict(self, token_T: np.ndarray, rows: Any) -> np.ndarray | None:
        self.asked += [(row.key, len(row.ids), row.num_new) for row in rows]
        return super().predict(token_T, rows)


def run(model: Any, engine: Any, experts: ExpertsConfig, asked: list[list[int]], **more: Any) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    scheduler = TokenScheduler() if experts.regroup else None
    config = {"num_blocks": 200, "block_tokens": 4, "max_seqs": 8, "expert_budget": "1GiB", "experts": experts, **more}
    llm = LLM(model, hooks=[engine], order=engine.pair(scheduler).order, **config)
    return [list(each.tokens) for each in llm.generate(asked, GREEDY)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return generate(make_model(), prompts(7), SamplingConfig(max_tokens=9, temperature=0.0))


@pytest.mark.parametrize("regroup", [True, False])
@pytest.mark.parametrize("num_blocks", [200, 14])
@pytest.mark.parametrize("size", [1, 3])
def test_tokens_are_as_ever_and_each_token_is_predicted_once(
    size: int, num_blocks: int, regroup: bool, expected: list[list[int]]
) -> None:
    """Also where requests are sent back for want of blocks."""
    model = make_model()
    predictor = Counting(find_pools(model).fingerprint(f"vocab:{VOCAB}"))
    engine = offload(model, find_pools(model).layout.total_bytes // 4, predictor=predictor)
    experts = ExpertsConfig(predictor="tlp", dual_batch=size, regroup=regroup)
    assert run(model, engine, experts, prompts(7), num_blocks=num_blocks, prefix_cache=False) == expected
    ones = [asked for asked in predictor.asked if asked[2] == 1]
    if num_blocks == 200:
        # Those of two tokens more than once would have gone on twice.
        assert len(ones) == len(set(ones))
    counters = engine.stats().counters
    given, regrouped = counters["expert_unit_loads_given"], counters["expert_unit_loads_regrouped"]
    assert (0 < regrouped <= given) if regroup else regrouped == given == 0
    assert counters["expert_hits"] > 0


def test_the_cache_sees_the_second_step_while_the_first_one_runs(expected: list[list[int]]) -> None:
    model, seen = make_model(), []
    engine = offload(model, find_pools(model).layout.total_bytes // 4, predictor="tlp")
    begin_step = engine.cache.begin_step

    def note(steps: Any, certain: int) -> None:
        seen.append(certain // engine.layout.num_layers)
        begin_step(steps, certain)

    engine.cache.begin_step = note  # type: ignore[method-assign]
    experts = ExpertsConfig(predictor="tlp", dual_batch=3)
    assert run(model, engine, experts, prompts(6), max_batched_tokens=64) == expected[:6]
    # Prompts; then steps in pairs, of which the first knows both.
    assert seen[1:7] == [2, 1, 2, 1, 2, 1]


def test_an_encoder_decoder_predicts_in_pairs_what_it_predicts_alone(expected: list[list[int]]) -> None:
    model = make_model()
    fingerprint = find_pools(model).fingerprint(f"vocab:{VOCAB}")
    predictor = EncoderDecoder(fingerprint, VOCAB, Settings(dim=16, feed_forward=16, heads=2, window=8))
    said: dict[tuple[Any, int], np.ndarray] = {}
    predict = predictor.predict

    def note(token_T: np.ndarray, rows: Any) -> np.ndarray | None:
        found = predict(token_T, rows)
        if found is not None and all(row.num_new == 1 for row in rows):
            said.update({(tuple(row.ids), 1): prob for row, prob in zip(rows, found, strict=True)})
        return found

    predictor.predict = note  # type: ignore[method-assign]
    engine = offload(model, None, predictor=predictor)
    assert run(model, engine, ExpertsConfig(predictor="x", dual_batch=2), prompts(7)) == expected
    in_pairs, said = said, {}
    predictor._states.clear()
    llm = LLM(model, hooks=[engine], num_blocks=200, block_tokens=4, max_seqs=8)
    engine.pairs = None
    assert [list(each.tokens) for each in llm.generate(prompts(7), GREEDY)] == expected
    assert in_pairs.keys() == said.keys()
    for key, prob_LE in said.items():
        np.testing.assert_allclose(in_pairs[key], prob_LE, atol=1e-5)


@pytest.mark.parametrize("predictor", ["router_lookahead", "slp", None])
def test_what_knows_no_step_cannot_pair(predictor: str | None) -> None:
    with offload(make_model(), None, predictor=predictor) as engine, pytest.raises(ConfigError, match="dual-batch"):
        engine.pair(TokenScheduler())


# A folder, as `serve` loads it


def fitted(model: Any, place: Any) -> EncoderDecoder:
    with record_routing(model) as recorder:
        generate(model, prompts(4), SamplingConfig(max_tokens=6))
    routes = Routes.from_trace(recorder.trace())
    fingerprint = find_pools(model).fingerprint(f"vocab:{VOCAB}")
    made = EncoderDecoder(fingerprint, VOCAB, Settings(steps=2, dim=16, feed_forward=16, heads=2)).fit(routes)
    made.save(place)
    Frequency(fingerprint, VOCAB).fit(routes).save(place.with_name("frequency.safetensors"))
    return made


def load(path: Any, **experts: Any) -> LLM:
    options = {"expert_budget": "100KiB", "num_blocks": 200, "dtype": "float32", "max_seqs": 8}
    return LLM(path, **options, experts=ExpertsConfig(**experts))


def test_a_predictor_beside_the_model_is_the_default(tmp_path: Any, expected: list[list[int]]) -> None:
    model, folder = make_model(), tmp_path / "m"
    save_model(folder, model)
    said = []
    for step in range(2):
        llm = load(folder)
        said.append(llm.engine.info.experts)
        llm.close()
        if not step:
            assert find_file(folder) is None
            fitted(model, place_of(folder))
    assert find_file(folder) == folder / "route-predictor.safetensors"
    assert [(one["predictor"], one["sees_all_layers"]) for one in said] == [
        ("router_lookahead", False),
        ("encdec", True),
    ]
    assert said[0]["budget_bytes"] == 100 * 1024 < said[0]["all_bytes"]
    assert {(one["policy"], one["dual_batch"], one["regroup"]) for one in said} == {("plec", None, False)}


@pytest.mark.parametrize(
    "experts",
    [
        {"dual_batch": 3},
        {"dual_batch": 2, "regroup": False, "least": 0.1},
        {"predictor": "none"},
        {"policy": "lru", "dual_batch": 2, "regroup": False, "drop_cache": True},
        {"policy": "belady", "predictor": "FREQUENCY"},
        *(
            pytest.param({"policy": policy, "workers": 1}, marks=pytest.mark.slow)
            for policy in ("lru_ahead", "lfu", "cache_moe", "se_moe")
        ),
    ],
)
def test_no_setting_changes_a_token(experts: dict[str, Any], tmp_path: Any, expected: list[list[int]]) -> None:
    model, folder = make_model(), tmp_path / "m"
    save_model(folder, model)
    fitted(model, place_of(folder))
    if experts.get("predictor") == "FREQUENCY":
        experts = {**experts, "predictor": str(folder / "frequency.safetensors")}
    llm = load(folder, **experts)
    assert [list(each.tokens) for each in llm.generate(prompts(7), GREEDY)] == expected
    llm.close()


def test_a_predictor_of_another_model_is_refused_by_name(tmp_path: Any) -> None:
    folder = tmp_path / "m"
    save_model(folder, make_model())
    fitted(make_model(moe_config(num_experts=8)), place_of(folder))
    for experts in ({}, {"predictor": str(place_of(folder))}):
        with pytest.raises(
            CheckpointError, match=r"m/route-predictor\.safetensors was made for a model of another exp"
        ):
            load(folder, **experts)
    assert load(folder, predictor="tlp").engine.info.experts["predictor"] == "tlp"
    with pytest.raises(ConfigError, match="'frequency' has to be fitted"):
        load(folder, predictor="frequency")
    with pytest.raises(ConfigError, match="no predictor 'nothing' and no such file"):
        load(folder, predictor="nothing")
    place_of(folder).unlink()
    with pytest.raises(ConfigError, match="the predictor is 'router_lookahead'; fit one"):
        load(folder, dual_batch=2)


def test_a_config_reads_back(tmp_path: Any) -> None:
    from anabranch.config import from_dict, to_dict

    config = ServingConfig(expert_budget="1MiB", experts=ExpertsConfig(dual_batch=2, predictor="tlp"))
    assert from_dict(ServingConfig, to_dict(config)) == config
