"""Orders to forget, of processes on one store."""

import asyncio

from anabranch.gateway import Gateway
from anabranch.gateway.config import load_config
from anabranch.gateway.learning.erasures import NotForgottenError
from anabranch.routers.strategies.fixed import Static

CONFIG = """
store = "{folder}/g.db"
require_key = false
[[models]]
name = "m"
deployments = [{{ provider = {{ kind = "mock", model = "m" }} }}]
"""


class Keeps(Static):
    """Texts by tenant; where it fails, others forget and write before it does."""

    learns, is_fast = True, False

    def __init__(self, before_failing=None):
        super().__init__(Static.Config())
        self.texts, self.before_failing = {"t1": 1, "t2": 1}, before_failing

    def observe(self, outcome):
        self.texts["new"] = 1

    def forget(self, *, tenant, user=None, decision=None):
        if self.before_failing:
            self.before_failing()
            raise ValueError("damaged")
        return self.texts.pop(tenant, 0)

    def kept_state(self):
        return {}, {"texts": self.texts}

    def load_kept(self, arrays, facts):
        self.texts = dict(facts.get("texts", {}))


def test_what_others_wrote_since_who_have_obeyed_stays(tmp_path):
    """It went with what the strategy that failed had stored, and a process that began then knew nothing."""
    (tmp_path / "g.toml").write_text(CONFIG.format(folder=tmp_path))
    config = load_config(tmp_path / "g.toml")

    async def written(gateway):
        rows = await gateway.store.look(lambda c: c.rows("SELECT writer, body FROM learned WHERE strategy = 's'"))
        return {row[0].partition(".")[0]: b"t1" in bytes(row[1]) for row in rows}

    async def store(gateway):
        lane = gateway.runtime.decider.lanes["s"]
        lane.touch()
        await gateway.kept.save([lane], at_once=True)

    async def main():
        loop = asyncio.get_running_loop()

        def others():
            """In the strategy's thread, while the order is under way."""

            async def obey():
                await second.erasures.catch_up()
                await store(second)

            asyncio.run_coroutine_threadsafe(obey(), loop).result(120)

        failing, obeying = Keeps(others), Keeps()
        async with (
            Gateway(config, strategies={"s": failing}) as first,
            Gateway(config, strategies={"s": obeying}) as second,
        ):
            await store(first)
            await store(second)
            failing.texts, obeying.texts = {"t1": 1, "t2": 1}, {"t1": 1, "t2": 1}
            assert len(await written(first)) == 2
            try:
                await first.erasures.order(tenant="t1")
            except NotForgottenError:
                failing.before_failing = None
            else:
                raise AssertionError("the strategy has failed")
            # Of the second, without the text; nothing of the first.
            assert await written(first) == {second.store.replica: False}

    asyncio.run(main())
