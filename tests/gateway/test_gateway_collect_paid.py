"""Nothing is paid for twice: any sequence of users' requests, runs, small budgets, kills and two runs at once, on a counted provider."""

import asyncio
import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from anabranch.errors import DataError
from anabranch.gateway.collect import TAG, Collector, for_collecting
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LogConfig, ModelConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock, MockTransport
from anabranch.routers.judges import ModelJudge
from anabranch.routers.money import Price

REPLIES = {"a": "a says", "b": "", "c": "c says so", "judge": "verdict: A", "mute": "hm"}


def config_of(folder, prompts=True):
    models = tuple(
        ModelConfig(
            name=name,
            price=Price.of_dollars(10, 10),
            max_tokens=20,
            deployments=(DeploymentConfig(provider=Mock.Config(model=name, reply=reply)),),
        )
        for name, reply in REPLIES.items()
    )
    return GatewayConfig(
        models=models, require_key=False, store=str(folder / "gateway.db"), log=LogConfig(prompts=prompts)
    )


class Paid(RuleBasedStateMachine):
    """`bills` is what the provider charges for collecting, by what it was asked; `lost` how many of them kills made unknowable."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store, self.out = self.folder / "gateway.db", self.folder / "out.jsonl"
        self.bills, self.lost, self.asked = Counter(), 0, set()
        self.counts = False
        self._open = MockTransport.open

        async def counted(transport, call):
            if self.counts:
                body = json.loads(call.body)
                self.bills[json.dumps([body["model"], body["messages"], body.get("max_tokens")])] += 1
            return await self._open(transport, call)

        MockTransport.open = counted
        self.played(lambda gateway: asyncio.sleep(0))

    def teardown(self):
        MockTransport.open = self._open
        shutil.rmtree(self.folder)

    def played(self, work, config=None):
        async def run():
            async with Gateway(config or config_of(self.folder)) as gateway:
                return await work(gateway)

        return asyncio.run(run())

    def collector(self, gateway, judge, models="abc", **options):
        return Collector(gateway, list(models), ModelJudge(judge, "a"), per_minute=1e9, **options)

    def collected(self, judge, budget, prompts, out=None, **options):
        async def work(gateway):
            await gateway.store.set_budget(f"tag:{TAG}", budget)
            return await self.collector(gateway, judge, **options).run(out or self.file_of(judge), waits=True)

        self.counts = True
        try:
            return self.played(work, for_collecting(config_of(self.folder, prompts)))
        finally:
            self.counts = False

    def file_of(self, judge):
        return self.out.with_name(f"{judge}.jsonl")

    @rule(
        model=st.sampled_from("ac"),
        number=st.integers(0, 3),
        cut=st.booleans(),
        prompts=st.sampled_from([True, True, False]),
    )
    def users_ask(self, model, number, cut, prompts):
        body = {"model": model, "messages": [{"role": "user", "content": f"question {number}?"}]}
        self.played(
            lambda gateway: gateway.achat({**body, **({"max_tokens": 1} if cut else {})}),
            config_of(self.folder, prompts),
        )
        if prompts:
            self.asked.add(number)

    @rule(judge=st.sampled_from(["judge", "mute"]), nano=st.sampled_from([3e6, 12e6, 1e10]), prompts=st.booleans())
    def collect(self, judge, nano, prompts):
        done = self.collected(judge, int(nano), prompts)
        lines = self.file_of(judge).read_text().splitlines() if self.file_of(judge).exists() else []
        found = [json.loads(line)["query"] for line in lines]
        assert len(found) == len(set(found))
        if judge == "judge" and nano == 1e10:
            assert set(found) == {f"question {number}?" for number in self.asked}
            assert not done.stopped

    @precondition(lambda self: self.asked)
    @rule(after=st.integers(1, 8), is_written=st.booleans(), cut=st.integers(0, 40))
    def collect_and_be_killed(self, after, is_written, cut):
        """All that was not committed at that moment is gone, and the last line may be cut off."""
        image, out = self.folder / "killed.db", self.file_of("judge")
        lines = b""

        def die(task):
            nonlocal lines
            if task.done() or image.exists():
                return
            with sqlite3.connect(self.store) as source, sqlite3.connect(image) as target:
                source.backup(target)
            lines = out.read_bytes() if out.exists() else b""
            task.cancel()

        async def work(gateway):
            await gateway.store.set_budget(f"tag:{TAG}", 10**10)
            settle, task, count = gateway.store.settle, asyncio.current_task(), 0

            def settled(reservation, row, collected=None, calls=()):
                nonlocal count
                count += 1
                if count == after and not is_written:
                    die(task)
                future = settle(reservation, row, collected, calls)
                if count == after and is_written:
                    future.add_done_callback(lambda _: die(task))
                return future

            gateway.store.settle = settled
            try:
                await self.collector(gateway, "judge").run(out, waits=True)
            except asyncio.CancelledError:
                task.uncancel()

        self.counts = True
        self.played(work, for_collecting(config_of(self.folder)))
        self.counts = False
        if not image.exists():
            return
        for ending in ("-wal", "-shm"):
            self.store.with_name(self.store.name + ending).unlink(missing_ok=True)
        image.replace(self.store)
        last = lines.rstrip(b"\n").rfind(b"\n") + 1
        out.write_bytes(lines[: max(last, len(lines) - cut)])
        paid = self.rows("SELECT count(*) FROM collected")[0][0]
        # What the provider charged and the store does not know: at most what was under way at once. It may be asked once more.
        unknown = sum(self.bills.values()) - self.lost - paid
        assert 0 <= unknown <= 3
        self.lost += unknown

    @rule(judge=st.sampled_from(["judge", "mute"]))
    def two_at_once(self, judge):
        async def one(out):
            async with Gateway(for_collecting(config_of(self.folder))) as gateway:
                await gateway.store.set_budget(f"tag:{TAG}", 10**10)
                return await self.collector(gateway, judge).run(out, waits=True)

        async def both():
            return await asyncio.gather(
                one(self.file_of(judge)), one(self.folder / "other.jsonl"), return_exceptions=True
            )

        self.counts = True
        done = asyncio.run(both())
        self.counts = False
        refused = [one for one in done if isinstance(one, BaseException)]
        assert all(isinstance(one, DataError) and "another anabranch gateway collect" in str(one) for one in refused)
        assert len(refused) < 2
        (self.folder / "other.jsonl").unlink(missing_ok=True)

    def rows(self, sql):
        connection = sqlite3.connect(self.store)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    @invariant()
    def nothing_is_paid_twice(self):
        again = sum(count - 1 for count in self.bills.values())
        assert again <= self.lost, self.bills

    @invariant()
    def what_the_ledger_charges_is_found_again(self):
        charged = f"SELECT count(*) FROM ledger WHERE tags LIKE '%,{TAG},%' AND status = 'ok'"
        assert self.rows(charged) == self.rows("SELECT count(*) FROM collected")

    @invariant()
    def budgets_hold(self):
        for limit, spent, reserved in self.rows("SELECT limit_nano, spent_nano, reserved_nano FROM budgets"):
            assert (spent <= limit or limit < 10**10, reserved >= 0) == (True, True)


PROFILE = {"deadline": None, "suppress_health_check": list(HealthCheck)}
TestPaid = Paid.TestCase
TestPaid.settings = settings(max_examples=4, stateful_step_count=5, **PROFILE)


@pytest.mark.slow
class TestPaidLong(Paid.TestCase):
    settings = settings(max_examples=25, stateful_step_count=8, **PROFILE)
