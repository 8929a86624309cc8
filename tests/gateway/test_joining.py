"""A model joins routers that are fitted and served, and what these have learned since goes on with it."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from anabranch.cli.main import main
from anabranch.errors import DataError, InputError
from anabranch.gateway.config import load_config
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.learning import joining
from anabranch.gateway.learning.joining import join
from anabranch.routers import strategies
from anabranch.routers.contract.query import Model
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.fitted import MANIFEST, FittedRouter, save_folder
from anabranch.routers.joining import joined
from anabranch.routers.money import Price
from anabranch.routers.strategies.irt import ItemResponse
from gateway_process import call, served
from made_outcomes import MODELS, made_outcomes, write_outcomes
from odd_errors import UNUSUAL

EMBEDDER = Hashed.Config(dim=64)
FIELDS = {"irt": {"epochs": 30, "dim": 4}, "coe": {"head": "knn", "refresh_every": 4}, "graph": {"mode": "plus"}}
CONFIG = """
require_key = false
default_strategy = "irt"
store = "{folder}/gateway.db"
admin = {{ key = "env:TEST_ADMIN_KEY" }}
{models}
{strategies}
"""
MODEL = """
[[models]]
name = "{name}"
parameters = 1
max_tokens = 20
price = {{ input_usd = 1, output_usd = 1 }}
deployments = [{{ provider = {{ kind = "mock", model = "{name}", reply = "{name}" }} }}]
"""


def data(num=150, *, names=("small", "medium"), seed=0):
    return made_outcomes(num, seed).only(names)


def best_of_all(name="large", num=60):
    """Outcomes of a newcomer that is right every time, and cheap."""
    some = made_outcomes(num, 3).only(["large"])
    return type(some)(
        query=some.query, task=some.task, models=(name,), score_NM=np.ones((num, 1)), cost_NM=np.full((num, 1), 1e-5)
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Routers of each kind that takes further models, and one that does not, in a folder."""
    folder, embedder, some = tmp_path_factory.mktemp("fitted"), EMBEDDER.build(), data()
    with_vectors = some.with_vectors(embedder.embed(some.query))
    routers = {}
    for kind in ("irt", "coe", "knn"):
        made = strategies.make(kind, **FIELDS.get(kind, {})).fit(with_vectors)
        models = tuple(Model(name=name, price=Price.of_dollars(1, 1), parameters=1.0) for name in some.models)
        routers[kind] = FittedRouter(strategy=made, models=models, embedder=embedder)
    save_folder(folder / "routers", routers, some, {})
    return folder / "routers"


@pytest.fixture
def place(fitted, tmp_path, monkeypatch):
    """A config beside a copy of them."""
    monkeypatch.setenv("TEST_ADMIN_KEY", "operator-key-1")
    (tmp_path / "routers").mkdir()
    for path in fitted.iterdir():
        (tmp_path / "routers" / path.name).write_bytes(path.read_bytes())
    write(tmp_path, MODELS)
    return tmp_path


def write(folder, names, kinds=("irt", "coe", "knn")):
    parts = "".join(f'[strategies.{kind}]\nrouter = "{folder}/routers"\ntimeout_s = 5\n' for kind in kinds)
    path = folder / "gateway.toml"
    path.write_text(
        CONFIG.format(folder=folder, models="".join(MODEL.format(name=name) for name in names), strategies=parts)
    )
    return path


async def went(gateway, kind, text="add the numbers 1.1 7"):
    reply = await gateway.handle("chat", {"model": f"auto/{kind}", "messages": [{"role": "user", "content": text}]})
    return reply.headers["x-route-model"], reply.headers["x-request-id"]


def run(work):
    return asyncio.run(work())


def test_a_strategy_that_serves_no_router_says_why(place):
    """What is recommended of a folder may be a single model."""
    text = write(place, MODELS, kinds=("best",)).read_text().replace('default_strategy = "irt"', "")
    (place / "gateway.toml").write_text(text)
    recommended = {"kind": "model", "name": "small", "setting": None, "reason": "it is as good and costs less"}
    told = place / "routers" / "recommended.json"
    told.write_text(json.dumps({"version": 1, "recommended": recommended}))
    with pytest.raises(InputError) as caught:
        run(lambda: join(None, load_config(place / "gateway.toml"), "large"))
    said = str(caught.value)
    assert said.startswith("strategy best: it serves no router: eval recommends ")
    assert "since it is as good and costs less, so that small is always asked" in said
    assert f"name the strategy as a router of {place}/routers (irt, coe, knn) to serve that one" in said
    told.unlink()
    with pytest.raises(InputError, match=r"serves none of the routers in .*none has its name, and no router of"):
        joining.file_of(str(place / "routers"), "best")


# Routers


@pytest.mark.parametrize("kind", ["irt", "coe"])
def test_a_router_takes_a_model_by_its_scores(fitted, kind):
    router = FittedRouter.load(fitted / f"{kind}.safetensors")
    texts = made_outcomes(30, 5).query
    before = [router.route(text).model for text in texts]
    shots = best_of_all()
    made = joined(router, Model(name="large", price=Price.of_dollars(1, 1), parameters=1.0), shots)
    assert [model.name for model in made.models] == ["small", "medium", "large"]
    after = [made.route(text) for text in texts]
    assert "large" not in before
    assert [decision.model for decision in after] == ["large"] * 30
    assert after[0].candidates[0].cost == pytest.approx(1e-5)
    # Of the others it knows what it knew.
    assert [next(one.model for one in decision.candidates if one.model != "large") for decision in after] == before
    with pytest.raises(InputError, match="knows 'large' already"):
        joined(made, Model(name="large"), shots)


def test_what_a_router_cannot_do_it_says_and_stays_as_it_is(fitted):
    for kind, model, shots, message in (
        ("knn", "large", None, "knn takes no further model; fit it anew"),
        ("irt", "large", None, "irt places a model by its scores"),
        ("coe", "large", None, "coe knows models by their scores"),
        ("irt", "small", best_of_all("small"), "knows 'small' already"),
        ("irt", "large", best_of_all("other"), "hold nothing of 'large'; they are of other"),
        (
            "irt",
            "large",
            type(best_of_all())(query=("x",), models=("large",), score_NM=np.full((1, 1), np.nan)),
            "no score of 'large'",
        ),
    ):
        router = FittedRouter.load(fitted / f"{kind}.safetensors")
        before = json.dumps(router.strategy.state()[1])
        with pytest.raises(InputError, match=message):
            joined(router, Model(name=model), shots)
        assert json.dumps(router.strategy.state()[1]) == before
    with pytest.raises(InputError, match="static takes no further model"):
        strategies.make("static", model="small").join(Model(name="x"))


# A gateway


def test_what_was_learned_goes_on_with_it(place):
    """Of coe: scores that users gave before the model joined count afterwards, in this process and in the next."""
    path = place / "gateway.toml"

    async def learn(gateway, count):
        for _ in range(count):
            model, id = await went(gateway, "coe")
            assert (await gateway.feedback({"request_id": id, "score": 0.0}))["learned"]
        return model

    async def known(gateway):
        lane = gateway.runtime.decider.lanes["coe"]
        predictor = lane.strategy.predictor
        count = await lane.alone(lambda: sum(part.count for part in (predictor.own, predictor.others)))
        return count, predictor.models

    async def first():
        async with Gateway(load_config(path)) as gateway:
            await learn(gateway, 3)
            done = await gateway.add_model("large", outcomes=best_of_all())
            await gateway.reload(gateway.config)
            assert (done.strategies, sorted(done.refused)) == (("irt", "coe"), ["knn"])
            assert (await known(gateway)) == (3, ("small", "medium", "large"))
            assert (await went(gateway, "irt"))[0] == (await went(gateway, "coe"))[0] == "large"
            await learn(gateway, 2)
            assert (await known(gateway))[0] == 5

    async def second():
        async with Gateway(load_config(path)) as gateway:
            assert (await known(gateway)) == (5, ("small", "medium", "large"))

    run(first)
    run(second)
    assert json.loads((place / "routers" / MANIFEST).read_text())["models"] == ["small", "medium", "large"]


def test_of_what_does_not_add_up_the_newest_state_takes_the_model_too(place, monkeypatch):
    """As graph routers do, told here with one that needs no torch."""
    from anabranch.routers.coe.predictor import CompositionOfExperts

    monkeypatch.setattr(CompositionOfExperts, "adds_up", False)
    path = place / "gateway.toml"

    async def work():
        async with Gateway(load_config(path)) as gateway:
            for _ in range(3):
                _, id = await went(gateway, "coe")
                await gateway.feedback({"request_id": id, "score": 1.0})
            await gateway.add_model("large", strategies=["coe"], outcomes=best_of_all())
            await gateway.reload(gateway.config)
            lane = gateway.runtime.decider.lanes["coe"]
            predictor = lane.strategy.predictor
            await lane.alone(lambda: None)
            assert (predictor._fresh.count, predictor.models) == (3, ("small", "medium", "large"))
            # The other strategies serve another file, which stays.
            assert gateway.runtime.decider.lanes["irt"].strategy.predictor.models == ("small", "medium")

    run(work)


def test_who_asks_for_what_cannot_be_is_told_and_nothing_is_written(place):
    before = {path.name: path.read_bytes() for path in (place / "routers").iterdir()}
    config = load_config(place / "gateway.toml")
    bare = load_config(write(place, MODELS))

    async def work():
        for name, more, message in (
            ("nobody", {}, "no model 'nobody' in the config; add it"),
            (
                "large",
                {"strategies": ["other"]},
                "'other' is no strategy that serves a fitted router; those that do are irt",
            ),
            ("large", {"strategies": ["knn"]}, "strategy knn: knn takes no further model"),
            ("large", {}, "strategy irt: irt places a model by its scores"),
            ("large", {"outcomes": best_of_all("other")}, "hold nothing of 'large'"),
        ):
            with pytest.raises(InputError, match=message):
                await join(None, config, name, **more)
        plain = bare.replace(strategies={"x": type(bare.strategies["irt"])(use="cheapest")}, default_strategy="x")
        with pytest.raises(InputError, match="no strategy of the config serves a fitted router"):
            await join(None, plain, "large")
        async with Gateway(config) as gateway:
            with gateway.store.alone(joining.WORK), pytest.raises(InputError, match="another model is joining"):
                await gateway.add_model("large", outcomes=best_of_all())

    run(work)
    assert {path.name: path.read_bytes() for path in (place / "routers").iterdir()} == before


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("a score is 7; bring all to that scale"), "a score is 7; bring all to that scale"),
        *((one("by irt"), one.__name__) for one in (ValueError, KeyError, *UNUSUAL)),
    ],
)
def test_one_strategy_that_fails_to_take_a_model_keeps_no_other_from_it(place, monkeypatch, caplog, error, told):
    """Scores beyond the scale of one, or an error of whoever wrote it: the rest knows the model, and the answer says which does not."""

    def fail(self, model, shots=None):
        raise error

    monkeypatch.setattr(ItemResponse, "join", fail)

    async def work():
        async with Gateway(load_config(place / "gateway.toml")) as gateway:
            done = await gateway.add_model("large", outcomes=best_of_all())
            await gateway.reload(gateway.config)
            assert (done.strategies, sorted(done.refused)) == (("coe",), ["irt", "knn"])
            assert told in done.refused["irt"]
            assert done.files == (str(place / "routers" / "coe.safetensors"),)
            assert (await went(gateway, "coe"))[0] == "large"
            with pytest.raises(InputError, match="strategy irt: "):
                await gateway.add_model("large", strategies=["irt"], outcomes=best_of_all())

    run(work)
    assert "model large does not join strategy irt: " in caplog.text


def test_scores_beyond_the_scale_of_one_strategy_are_no_affair_of_the_others(place):
    some = best_of_all()
    done = run(
        lambda: join(
            None, load_config(place / "gateway.toml"), "large", outcomes=replace(some, score_NM=7 * some.score_NM)
        )
    )
    assert done.strategies == ("coe",)
    assert "is 7; scores must lie from 0 to 1: bring all to that scale, or fit irt again" in done.refused["irt"]


@pytest.mark.parametrize("where", ["read", "write", "carry"])
def test_a_router_that_cannot_be_read_or_written_keeps_no_other_from_a_model(place, monkeypatch, caplog, where):
    text = write(place, MODELS, kinds=("irt", "coe")).read_text()
    apart = place / "apart.safetensors"
    apart.write_bytes((place / "routers" / "irt.safetensors").read_bytes())
    (place / "gateway.toml").write_text(text.replace(f'router = "{place}/routers"', f'router = "{apart}"', 1))
    config = load_config(place / "gateway.toml")
    inner, carry = joining.save_joined, joining._carry_over

    def save(router, path):
        if path == apart and where == "write":
            raise OSError("no space left on device")
        inner(router, path)

    async def carry_over(store, config, name, *rest):
        if name == "irt" and where == "carry":
            raise OSError("the store cannot be written")
        await carry(store, config, name, *rest)

    monkeypatch.setattr(joining, "save_joined", save)
    monkeypatch.setattr(joining, "_carry_over", carry_over)

    async def work():
        async with Gateway(config) as gateway:
            if where == "read":
                apart.unlink()
            return await gateway.add_model("large", outcomes=best_of_all())

    done = run(work)
    if where == "carry":
        assert (sorted(done.strategies), done.refused) == (["coe", "irt"], {})
        assert "strategy irt knows large now, and what it learned is left behind: the store" in caplog.text
        return
    assert (done.strategies, done.files) == (("coe",), (str(place / "routers" / "coe.safetensors"),))
    assert ("no space left" if where == "write" else str(apart)) in done.refused["irt"]


def test_a_running_server_is_told_by_command_and_serves_it_at_once(place, capsys):
    shots = write_outcomes(place / "shots.jsonl", best_of_all())
    path = write(place, ("small", "medium"))

    def model_of(url):
        body = {"model": "auto", "messages": [{"role": "user", "content": "add the numbers 1.1 7"}]}
        status, _, headers = call(url, "POST", "/v1/chat/completions", body)
        assert status == 200
        return headers["x-route-model"]

    def add(url, *more, code=0):
        capsys.readouterr()
        assert main(["gateway", "add-model", "large", "--url", url, "--key", "operator-key-1", *more]) == code
        return capsys.readouterr()

    with served("--config", str(path), environment={"TEST_ADMIN_KEY": "operator-key-1"}) as server:
        assert model_of(server.url) != "large"
        assert "there is no model 'large' in the config" in add(server.url, "--outcomes", str(shots), code=2).err
        write(place, MODELS)
        assert call(server.url, "POST", "/admin/reload", {}, key="operator-key-1")[0] == 200
        assert model_of(server.url) != "large"
        assert "irt places a model by its scores" in add(server.url, code=2).err
        said = json.loads(add(server.url, "--outcomes", str(shots), "--json").out)
        assert (said["strategies"], list(said["refused"])) == (["irt", "coe"], ["knn"])
        assert model_of(server.url) == "large"
        for body, message in (
            ({"strategies": "irt"}, "must be a list"),
            ({"outcomes": []}, "at least one"),
            ({"outcomes": [{"query": "x"}]}, "outcomes.0"),
            ({"shots": 1}, "there is no 'shots'"),
        ):
            status, answer, _ = call(server.url, "POST", "/admin/models/large", body, key="operator-key-1")
            assert status == 400
            assert message in answer["error"]["message"]
        assert call(server.url, "POST", "/admin/models/large", {}, key="wrong")[0] == 401
        assert add(server.url + "/nowhere", code=2).err.count("\n") == 1


def test_by_command_where_no_gateway_runs(place, capsys):
    shots = write_outcomes(place / "shots.jsonl", best_of_all())
    command = ["gateway", "add-model", "large", "--config", str(place / "gateway.toml"), "--outcomes", str(shots)]
    assert main([*command, "--strategy", "irt"]) == 0
    said = capsys.readouterr()
    assert "large is known to irt" in said.out
    assert f"anabranch gateway serve --config {place / 'gateway.toml'}" in said.out
    assert FittedRouter.load(place / "routers/irt.safetensors").strategy.predictor.models == (
        "small",
        "medium",
        "large",
    )
    assert not (place / "gateway.db").exists()
    assert main([*command, "--strategy", "irt"]) == 2
    assert "irt knows 'large' already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_graph_keeps_its_edges_and_gets_those_of_the_newcomer(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_ADMIN_KEY", "operator-key-1")
    embedder, some = EMBEDDER.build(), data(100)
    made = strategies.make("graph").fit(some.with_vectors(embedder.embed(some.query)))
    models = tuple(Model(name=name, price=Price.of_dollars(1, 1)) for name in some.models)
    save_folder(
        tmp_path / "routers", {"graph": FittedRouter(strategy=made, models=models, embedder=embedder)}, some, {}
    )
    path = write(tmp_path, MODELS, kinds=("graph",))
    path.write_text(path.read_text().replace('default_strategy = "irt"', 'default_strategy = "graph"'))

    async def edges(gateway):
        lane = gateway.runtime.decider.lanes["graph"]
        return await lane.alone(lambda: lane.strategy.predictor.edges_M.tolist())

    async def work():
        async with Gateway(load_config(path)) as gateway:
            for number in range(5):
                _, id = await went(gateway, "graph", f"add the numbers {number}")
                assert (await gateway.feedback({"request_id": id, "score": 1.0}))["learned"]
            before = await edges(gateway)
            assert sum(before) == 2 * 100 + 5
            await gateway.add_model("large", outcomes=best_of_all())
            await gateway.reload(gateway.config)
            assert await edges(gateway) == [*before, 60]
            assert (await went(gateway, "graph"))[0] == "large"
        async with Gateway(load_config(path)) as gateway:
            assert (await edges(gateway))[:2] == before

    run(work)
