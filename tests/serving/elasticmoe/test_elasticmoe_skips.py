"""A group of devices whose prompts blocks pass over in parts (FTP): each answer is the skipper's own, whatever becomes of the devices."""

import asyncio

import pytest
import torch

from anabranch.depth.ftp import TokenSkipper
from anabranch.errors import CheckpointError, InputError
from anabranch.lm import load_model
from anabranch.serving.core.request import Finish, Request, Sampling
from anabranch.serving.depth import DepthConfig
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.coordinator import Coordinator
from anabranch.serving.elasticmoe.group import Group
from anabranch.serving.elasticmoe.instance import InstanceError
from elastic_models import save_moe
from skipped_models import router
from waiting import until_async

# The third block decodes nothing.
SCHEDULE = (0.0, 0.4, 0.6)
PROMPTS = {"a": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), "b": (12, 13), "c": (7,), "d": (5, 5, 5, 9, 9, 9, 1, 2)}
# Prompts in pieces, and few places, so that requests wait.
SETTINGS = {"num_blocks": 48, "max_seqs": 3, "long_prefill_chunk": 4, "ahead": False, "pace_s": 0.003}
TOKENS = 24


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("deep") / "moe", layers=3)


@pytest.fixture(scope="module", params=["learned", "kept", "places"])
def skipper(request, deep):
    model, _ = load_model(deep)
    model = model.eval()
    return {
        "learned": lambda: TokenSkipper(model, SCHEDULE, router()),
        "kept": lambda: TokenSkipper(model, SCHEDULE, router(), kv="keep"),
        "places": lambda: TokenSkipper(model, SCHEDULE),
    }[request.param]()


@torch.no_grad()
def whole(skipper, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        logits_BLV = skipper.stack.module(torch.tensor([tokens]), last_only=True).logits_BLV
        tokens.append(int(logits_BLV[0, -1].argmax()))
    return tokens[len(prompt) :]


def asked(id, prompt, *, tokens=TOKENS, prunes=True, **fields):
    sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return Request(id=id, prompt=prompt, sampling=sampling, skips_tokens=prunes, **fields)


async def answer(engine, request):
    """(tokens, how many of the prompt each block computed, how it ended)."""
    outputs = [output async for output in engine.submit(request)]
    computed = [output.computed for output in outputs if output.computed is not None]
    # Again where it was begun anew.
    assert len(set(computed)) <= 1, computed
    return [token for output in outputs for token in output.tokens], (computed or [None])[0], outputs[-1].finish


def run(folder, fork_server, skipper, path, work, **changes):
    async def main():
        skipper.save(path)
        config = ElasticConfig(model=str(folder), depth=DepthConfig(skipper=str(path)), **(SETTINGS | changes))
        engine = Coordinator(config, fork_server=fork_server)
        info = await engine.start()
        # What was read when the group began is what counts.
        path.unlink()
        try:
            assert (info.skips_tokens, info.depth, info.num_layers) == (True, "pruned", 3)
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


async def all_of(engine, change=None):
    """The answers of all prompts, pruned and whole, while ``change`` happens."""
    tasks = {
        (name, prunes): asyncio.create_task(answer(engine, asked(f"{name} {prunes}", prompt, prunes=prunes)))
        for name, prompt in PROMPTS.items()
        for prunes in (True, False)
    }
    if change is not None:
        await until_async(lambda: engine.stats().counters["generation_tokens"] > 12)
        await change()
    return {key: await task for key, task in tasks.items()}


def check(skipper, found):
    for (name, prunes), (tokens, computed, finish) in found.items():
        prompt = list(PROMPTS[name])
        wanted = skipper.generate(prompt, TOKENS) if prunes else whole(skipper, prompt, TOKENS)
        assert (tokens, finish) == (wanted, Finish.LENGTH), (name, prunes)
        if prunes:
            assert computed == tuple(skipper.prefill(prompt).keep_IBL[:, 0].sum(1).tolist())
        else:
            assert computed is None


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["migrate", "drain"])
def test_devices_come_and_go_while_pruned_prompts_are_answered(deep, fork_server, skipper, tmp_path, mode):
    async def work(engine):
        async def change():
            for devices in (2, 1):
                await engine.control("scale", devices=devices, mode=mode)

        check(skipper, await all_of(engine, change))
        assert engine.group.devices == (0,)

    run(deep, fork_server, skipper, tmp_path / "skipper", work)


@pytest.mark.slow
def test_a_rank_that_dies_costs_nothing_of_the_answers(deep, fork_server, skipper, tmp_path):
    """Requests begin again with the tokens that they have, of which the skipper takes none for the prompt's."""

    async def work(engine):
        async def change():
            engine.group.ledger.active.kill(0)

        check(skipper, await all_of(engine, change))
        assert engine.stats().counters["elastic_recoveries"] == 1

    run(deep, fork_server, skipper, tmp_path / "skipper", work)


def test_what_a_group_cannot_do(deep, fork_server, tmp_path):
    model, _ = load_model(deep)
    TokenSkipper(model, SCHEDULE).save(tmp_path / "skipper")
    other, _ = load_model(save_moe(tmp_path / "other", seed=1, layers=3))
    TokenSkipper(other, SCHEDULE).save(tmp_path / "of another")
    (tmp_path / "text").write_text("no skipper")
    for name, says in (("none", "is not there"), ("text", "is damaged or no skipper of tokens")):
        with pytest.raises(CheckpointError, match=says):
            Group(ElasticConfig(model=str(deep), depth=DepthConfig(skipper=str(tmp_path / name))))

    async def refused(depth, **fields):
        engine = Coordinator(ElasticConfig(model=str(deep), depth=depth), fork_server=fork_server)
        # Nothing was started; what it refuses, it refuses before it looks for a rank.
        engine.group.ledger.active = object()
        try:
            await anext(engine.submit(asked("x", (1, 2), **fields)))
        finally:
            engine.group.ledger.active = None
            await engine.close()

    pruned = DepthConfig(skipper=str(tmp_path / "skipper"))
    for depth, fields, says in (
        (DepthConfig(), {}, "the engine has no skipper of tokens"),
        (pruned, {"record_routing": True}, "so is record_routing"),
        (pruned, {"prunes": False, "routes_depth": True}, "the engine has no depth routers"),
    ):
        with pytest.raises(InputError, match=says):
            asyncio.run(refused(depth, **fields))


@pytest.mark.slow
def test_a_skipper_of_another_model_does_not_start(deep, fork_server, tmp_path):
    other, _ = load_model(save_moe(tmp_path / "other", seed=1, layers=3))
    TokenSkipper(other, SCHEDULE).save(tmp_path / "skipper")

    async def start():
        config = ElasticConfig(model=str(deep), depth=DepthConfig(skipper=str(tmp_path / "skipper")), ahead=False)
        await Coordinator(config, fork_server=fork_server).start()

    with pytest.raises(InstanceError, match=r"is of a model with fingerprint .* fit one on this model"):
        asyncio.run(start())
