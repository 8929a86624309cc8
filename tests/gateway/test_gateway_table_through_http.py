"""Routing by HTTP earns what the referee says: the same routers and outcomes, through a running gateway and replayed answers."""

import json

import numpy as np
import openai
import pytest

from anabranch.cli.main import main
from anabranch.gateway.providers.recorded import write_answers
from gateway_process import served
from made_outcomes import made_outcomes, write_outcomes

USD = {"small": (0.1, 0.4), "medium": (0.5, 2.0), "large": (2.5, 10.0)}  # a million tokens, in and out
STRATEGIES = ("knn", "ridge", "cluster", "task")


def with_tokens(data, seed=0):
    """The same questions, each answer with lengths, and a cost that is exactly theirs."""
    draw = np.random.default_rng(seed)
    tokens_NM2 = draw.integers(5, 2000, (len(data), len(data.models), 2))
    price_M2 = np.array([USD[name] for name in data.models]) / 1e6
    return type(data)(
        query=data.query,
        models=data.models,
        task=data.task,
        score_NM=data.score_NM,
        tokens_NM2=tokens_NM2.astype(float),
        cost_NM=(tokens_NM2 * price_M2).sum(-1),
    )


def record(folder, data):
    """One recording a model: what it answered each question with, and how many tokens that took."""
    for column, model in enumerate(data.models):
        tokens = {text: tuple(map(int, data.tokens_NM2[row, column])) for row, text in enumerate(data.query)}
        write_answers(folder / f"{model}.jsonl", {text: str(row) for row, text in enumerate(data.query)}, tokens)


def config(folder):
    models = "\n".join(
        f'[[models]]\nname = "{name}"\nmax_tokens = 2000\nprice = {{ input_usd = {usd[0]}, output_usd = {usd[1]} }}\n'
        f'deployments = [{{ provider = {{ kind = "replay", path = "{folder}/{name}.jsonl" }} }}]'
        for name, usd in USD.items()
    )
    routers = "\n".join(f'[strategies.{name}]\nrouter = "{folder}/routers/{name}.safetensors"' for name in STRATEGIES)
    path = folder / "gateway.toml"
    path.write_text(
        f'require_key = false\nstore = "{folder}/gateway.db"\n[cache]\nexact = false\n{models}\n{routers}\n'
    )
    return path


def test_the_referees_table_comes_out_of_a_running_gateway(tmp_path, capsys):
    learned, test = with_tokens(made_outcomes(240, seed=0)), with_tokens(made_outcomes(60, seed=1), seed=1)
    record(tmp_path, test)
    flags = [flag for name in STRATEGIES for flag in ("--strategy", name)]
    routers, outcomes = str(tmp_path / "routers"), str(write_outcomes(tmp_path / "test.jsonl", test))
    learned_path = str(write_outcomes(tmp_path / "train.jsonl", learned))
    assert main(["gateway", "fit", learned_path, "--out", routers, *flags, "--hold-out", "0", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["gateway", "eval", outcomes, "--test", outcomes, "--router", routers, "--json", "--quiet"]) == 0
    table = {row["name"]: row for row in json.loads(capsys.readouterr().out)["strategies"]}

    price = {name: np.array(usd) / 1e6 for name, usd in USD.items()}
    with (
        served("--config", str(config(tmp_path))) as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        for name in STRATEGIES:
            scores, costs = [], []
            for row, text in enumerate(test.query):
                raw = client.chat.completions.with_raw_response.create(
                    model=f"auto/{name}",
                    messages=[{"role": "user", "content": text}],
                    extra_headers={"x-task": test.task[row]},
                )
                answer, model = raw.parse(), raw.headers["x-route-model"]
                assert raw.headers.get("x-route-bypassed") is None
                assert answer.choices[0].message.content == str(row)
                scores.append(test.score_NM[row, test.models.index(model)])
                costs.append(price[model] @ (answer.usage.prompt_tokens, answer.usage.completion_tokens))
            assert np.mean(scores) == pytest.approx(table[name]["score"], abs=1e-9)
            assert np.mean(costs) == pytest.approx(table[name]["cost"], abs=1e-9)
    assert len({row["score"] for row in table.values()}) > 1  # the routers differ, so a mix-up would show
