"""A group of devices whose requests run blocks of their own, said or routed: answers are those of one device, whatever becomes of them."""

import asyncio
import random

import pytest
import torch

from anabranch.depth import DepthRouter
from anabranch.errors import InputError
from anabranch.lm import load_model
from anabranch.serving import LLM
from anabranch.serving.core.request import Finish, Request, Sampling
from anabranch.serving.depth import DepthConfig
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.coordinator import Coordinator
from anabranch.serving.elasticmoe.instance import InstanceError
from depth_banks import saved_bank
from elastic_models import save_moe
from waiting import until_async

LAYERS, TOKENS = 3, 12
PROMPTS = {"a": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), "b": (12, 13), "c": (7,), "d": (5, 5, 5, 9, 9, 9, 1, 2)}
# Prompts in pieces, and few places, so that requests wait.
SETTINGS = {"num_blocks": 64, "block_tokens": 4, "max_seqs": 3, "long_prefill_chunk": 4, "ahead": False, "standby": 3}
ROUTED = {
    "routed": {"routes_depth": True},
    "shallow": {"routes_depth": True, "depth_control": -1},
    "plain": {"routes_depth": True, "depth_control": 0.5},
    "deep": {"routes_depth": True, "depth_control": 1},
}
SAID = {
    "unsaid": {},
    "twice": {"path": (0, 1, 1, 2)},
    "skipped": {"path": (0, 2)},
    "back": {"path": (2, 0, 1)},
    "often": {"path": (1, 1, 1, 1)},
    "none": {"path": ()},
}
DEPTHS = ROUTED | SAID


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("deep") / "moe", layers=LAYERS)


@pytest.fixture(scope="module")
def model(deep):
    return load_model(deep)[0].eval()


@pytest.fixture(scope="module")
def routers(tmp_path_factory, model):
    return saved_bank(tmp_path_factory.mktemp("routers") / "bank", model, seed=8, scale=4.0)


def asked(id, prompt, fields, tokens=TOKENS):
    sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    return Request(id=id, prompt=prompt, sampling=sampling, **fields)


async def answer(engine, request):
    """(tokens, their likelihoods, paths that were told, cached tokens, how it ended)."""
    outputs = [output async for output in engine.submit(request)]
    # Once, and of the prompt alone, wherever the request went on.
    [cached] = [output.cached_tokens for output in outputs if output.cached_tokens is not None]
    assert cached < len(request.prompt)
    return (
        [token for output in outputs for token in output.tokens],
        [each.logprob for output in outputs for each in output.logprobs],
        [output.path for output in outputs if output.path is not None],
        cached,
        outputs[-1].finish,
    )


def run(folder, fork_server, depth, work, **changes):
    async def main():
        config = ElasticConfig(model=str(folder), depth=depth, **(SETTINGS | changes))
        engine = Coordinator(config, fork_server=fork_server)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


async def all_of(engine, requests, change=None):
    """The answers of requests that come at once, while ``change`` happens."""
    tasks = {request.id: asyncio.create_task(answer(engine, request)) for request in requests}
    if change is not None:
        await until_async(lambda: engine.stats().counters["generation_tokens"] > 12)
        await change()
        assert not all(task.done() for task in tasks.values()), "nothing was under way any more"
    return {id: await task for id, task in tasks.items()}


async def scaled(engine, numbers, mode="migrate"):
    """(what changes to these numbers of devices while requests are answered, the reports of it, which it fills in)."""
    reports = []
    for devices in {*numbers} - {len(engine.group.devices)}:
        await engine.control("standby", devices=devices)

    async def change():
        reports.extend([await engine.control("scale", devices=devices, mode=mode) for devices in numbers])

    return change, reports


def everything(prompts="abcd", tokens=TOKENS):
    """Requests of every depth for each of these prompts."""
    return [
        asked(f"{name} {which}", PROMPTS[which], fields, tokens) for name, fields in DEPTHS.items() for which in prompts
    ]


@pytest.fixture(scope="module")
def alone(deep, routers):
    """What one engine gives a request: (tokens, their likelihoods, paths that were told)."""
    llm = LLM(str(deep), num_blocks=64, block_tokens=4, dtype="float32", depth=DepthConfig(routers=routers))
    known = {}

    def run(request):
        fields = {name: getattr(request, name) for name in ("routes_depth", "depth_control", "path")}
        key = request.prompt, request.sampling.max_tokens, *fields.values()
        if key not in known:
            [found] = llm.generate([request.prompt], request.sampling, **fields)
            told = [] if found.output.path is None else [found.output.path]
            known[key] = list(found.tokens), [each.logprob for each in found.output.logprobs], told
        return known[key]

    yield run
    llm.close()


def check(alone, requests, found):
    assert set(found) == {request.id for request in requests}
    for request in requests:
        tokens, scores, told, _, finish = found[request.id]
        wanted, likely, path = alone(request)
        assert (tokens, told, finish) == (wanted, path, Finish.LENGTH), request.id
        assert scores == pytest.approx(likely, abs=1e-3), request.id


@pytest.mark.parametrize("prompts", ["a", pytest.param("abcd", marks=pytest.mark.slow)])
def test_each_request_of_a_group_runs_its_own_blocks(deep, fork_server, model, routers, alone, prompts):
    """At first, and again with what is stored of the first ones."""
    requests = everything(prompts, tokens=5)
    assert len({str(alone(request)[2]) for request in requests if request.id.startswith("routed")}) == len(prompts)
    assert len({str(alone(request)[0]) for request in requests}) > 4 * len(prompts)

    async def work(engine):
        info = engine.group.info
        assert (info.routes_depth, info.depth, info.num_layers, info.max_depth) == (True, "routed", LAYERS, 2 * LAYERS)
        first = await all_of(engine, requests)
        check(alone, requests, first)
        again = await all_of(engine, requests)
        check(alone, requests, again)
        long = [request for request in requests if len(request.prompt) > 4]
        for request in long:
            cached = again[request.id][3]
            assert cached == 0 if request.routes_depth else cached in (0, 4, 8), request.id
        assert any(again[request.id][3] for request in long if request.path is not None)

    run(deep, fork_server, DepthConfig(routers=routers), work, devices=2, max_seqs=12)
    # Nor does one engine give what no pass over the whole sequence gives.
    router = DepthRouter.attach(model, routers)
    for request in requests:
        if request.depth_control is None and request.id[:5] != "often":
            depth = "routed" if request.routes_depth else "full" if request.path is None else request.path
            tokens = list(request.prompt)
            path = router.paths(depth, 1) or alone(request)[2]
            with torch.no_grad():
                for _ in range(request.sampling.max_tokens):
                    logits_BLV = model(torch.tensor([tokens]), path=path[0], last_only=True).logits_BLV
                    tokens.append(int(logits_BLV[0, -1].argmax()))
            assert tokens[len(request.prompt) :] == alone(request)[0], request.id


def random_paths(seed, count):
    draw = random.Random(seed)
    for number in range(count):
        blocks = [block for block in range(LAYERS) for _ in range(draw.choice((0, 1, 1, 2)))]
        if draw.random() < 0.5:
            draw.shuffle(blocks)
        prompt = tuple(draw.randrange(61) for _ in range(draw.randint(1, 14)))
        yield asked(f"{seed} {number}", prompt, {"path": tuple(blocks)}, tokens=draw.randint(1, 8))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_any_paths_side_by_side_on_any_number_of_devices(deep, fork_server, routers, alone, seed):
    requests = list(random_paths(seed, 12))

    async def work(engine):
        check(alone, requests, await all_of(engine, requests))

    run(deep, fork_server, DepthConfig(routers=routers, usual="full"), work, devices=2 + seed % 2, max_seqs=6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "before", "after"),
    [
        # The one that leaves hands its requests on.
        ("migrate", 2, (1,)),
        ("migrate", 1, (2, 1, 3)),
        ("drain", 1, (2, 1)),
    ],
)
def test_devices_come_and_go_while_requests_run_their_blocks(deep, fork_server, routers, alone, mode, before, after):
    requests = everything()

    async def work(engine):
        change, reports = await scaled(engine, after, mode)
        check(alone, requests, await all_of(engine, requests, change))
        assert [len(report["new"]) for report in reports] == list(after)

    run(deep, fork_server, DepthConfig(routers=routers), work, devices=before, pace_s=0.003)


def test_what_is_stored_along_a_chosen_path_goes_with_its_request(deep, fork_server, routers, alone):
    """From a device that leaves: routers choose nothing again, and no more than a block is computed again."""
    requests = [asked(f"{which} {number}", PROMPTS[which], ROUTED["routed"]) for which in "ad" for number in range(2)]

    async def work(engine):
        change, reports = await scaled(engine, [1])
        check(alone, requests, await all_of(engine, requests, change))
        return reports

    [report] = run(deep, fork_server, DepthConfig(routers=routers), work, devices=2, pace_s=0.02, max_seqs=4)
    assert report["tokens_brought"] > 0
    # Of each of the two that were there.
    assert report["tokens_again"] <= 2 * SETTINGS["block_tokens"]


@pytest.mark.slow
def test_a_rank_that_dies_costs_no_request_its_path(deep, fork_server, routers, alone):
    requests = everything()

    async def work(engine):
        async def change():
            engine.group.ledger.active.kill(0)

        check(alone, requests, await all_of(engine, requests, change))
        assert engine.stats().counters["elastic_recoveries"] == 1

    run(deep, fork_server, DepthConfig(routers=routers), work, devices=2, pace_s=0.003)


def test_the_groups_own_control_is_that_of_who_says_none(deep, fork_server, routers):
    async def work(engine):
        found = await all_of(
            engine, [asked("own", (1, 2, 3), ROUTED["routed"], 4), asked("said", (1, 2, 3), ROUTED["deep"], 4)]
        )
        return [found[id][2] for id in ("own", "said")]

    # Which by themselves pass over all of it; as deep as there is room, and no deeper.
    depth = DepthConfig(routers=routers, control=0.5)
    assert run(deep, fork_server, depth, work, max_depth=4) == [[(0, 1, 2)], [(0, 0, 1, 2)]]


def test_a_group_says_what_depth_it_cannot_run(deep, fork_server, routers):
    def refused(depth, fields, **changes):
        engine = Coordinator(ElasticConfig(model=str(deep), depth=depth, **changes), fork_server=fork_server)
        # Nothing was started; what it refuses, it refuses before it looks for a rank.
        engine.group.ledger.active = object()

        async def ask():
            try:
                await anext(engine.submit(asked("x", (1, 2), fields)))
            finally:
                engine.group.ledger.active = None
                await engine.close()

        with pytest.raises(InputError) as error:
            asyncio.run(ask())
        return str(error.value)

    llms = {}
    for number, (depth, fields, changes, says) in enumerate(
        (
            (DepthConfig(), {"routes_depth": True}, {}, "the engine has no depth routers"),
            (DepthConfig(), {"path": (0, 3)}, {}, "3"),
            (DepthConfig(), {"path": (-1,)}, {}, "-1"),
            (DepthConfig(), {"path": ((0,), (1,))}, {}, "path"),
            (
                DepthConfig(),
                {"path": (0, 0, 1, 2)},
                {},
                "path has 4 visits of blocks; the engine keeps keys and values of 3",
            ),
            (DepthConfig(), {"path": (0,) * 5}, {"max_depth": 4}, "path has 5 visits of blocks"),
            (DepthConfig(), {"depth_control": 0.0}, {}, "depth_control is set, and routes_depth is not"),
            (DepthConfig(routers=routers), {"path": (0,) * 7}, {}, "path has 7 visits of blocks"),
            (DepthConfig(routers=routers), {"path": (0,), "routes_depth": True}, {}, "leave one of them out"),
            (DepthConfig(routers=routers), {"routes_depth": True, "depth_control": 2}, {}, "depth_control is 2"),
            (DepthConfig(), {"rewires": True}, {}, "the server turns no routers"),
        )
    ):
        found = refused(depth, fields, **changes)
        assert says in found, fields
        # One engine says the same.
        llms[number] = LLM(str(deep), num_blocks=8, dtype="float32", depth=depth, **changes)
        with pytest.raises(InputError) as error:
            llms[number].engine.check(asked("x", (1, 2), fields))
        assert str(error.value) == found
        llms[number].close()


def test_routers_of_another_model_of_these_sizes_do_not_start(deep, fork_server, tmp_path):
    other, _ = load_model(save_moe(tmp_path / "other", seed=1, layers=LAYERS))
    depth = DepthConfig(routers=saved_bank(tmp_path / "routers", other))

    async def work(engine):
        raise AssertionError("it started")

    with pytest.raises(InstanceError, match="the routers are of another model of the same sizes: fingerprint"):
        run(deep, fork_server, depth, work)
