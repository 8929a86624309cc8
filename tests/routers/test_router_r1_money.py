"""Money of a pool behind an endpoint that bills and fails in every way: what it bills never passes the limit, in any run with the file."""

import itertools
import json
import signal
import socket
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, BackendError, DataError, LimitError
from anabranch.routers.contract.ask import Arm
from anabranch.routers.router_r1.asked_pool import AskPool, Member
from anabranch.routers.router_r1.environment import Price, Reply
from anabranch.routers.router_r1.kept_pool import KeptPool, read_table
from anabranch.routers.scale.client_ask import ClientAsk
from anabranch.web.endpoint import Endpoint
from scripted_endpoint import chat, endpoint

# A busy machine takes part of a second for a call that nothing holds up.
TOKENS, CALL_S = 8, 1.0
PRICE = Price(completion=1000.0, prompt=1.0)
USAGE = {"usage": {"prompt_tokens": 30, "completion_tokens": 8}}
TOLD = (30 * PRICE.prompt + 8 * PRICE.completion) / 1e6


def usage(**counts):
    return 200, chat("Ann") | {"usage": counts}, {}


# What a call comes to; each is billed.
BILLED = {
    "told": (200, chat("Ann") | USAGE, {}),
    "says nothing": (200, chat("") | {"usage": {"prompt_tokens": 30, "completion_tokens": 0}}, {}),
    "500": (500, {"error": {"message": "overloaded after the answer"}}, {}),
    "408": (408, {"error": {"message": "late"}}, {}),
    "302": (302, {}, {"location": "http://127.0.0.1:9/"}),
    "no choices": (200, USAGE, {}),
    "no usage": (200, chat("Ann"), {}),
    "usage is null": (200, chat("Ann") | {"usage": None}, {}),
    "usage of 0": usage(prompt_tokens=0, completion_tokens=0),
    "a text of 0 tokens": usage(prompt_tokens=30, completion_tokens=0),
    "half a usage": usage(completion_tokens=8),
    "less than nothing": usage(prompt_tokens=30, completion_tokens=-8),
    "more than can be": usage(prompt_tokens=30, completion_tokens=10**400),
    "in words": usage(prompt_tokens="30", completion_tokens="8"),
    "no JSON": (200, b"\xff\x00", {}),
    "a list": (200, [], {}),
    "cut": (200, b"{", {"content-length": "1000"}),
    "late": (200, chat("Ann") | USAGE, {}),
}
NUMBERS = itertools.count()
FREE = {"400": (400, {}, {}), "401": (401, {}, {}), "429": (429, {"error": {"message": "slow down"}}, {})}


class Client:
    """An `Endpoint` as OpenAI's clients are called."""

    def __init__(self, url):
        self._endpoint = Endpoint(url, "m", timeout_s=CALL_S)
        self.chat = self.completions = self

    def create(self, **body):
        return self._endpoint.post("/chat/completions", body)


def live(url):
    return AskPool({"small": Member(ClientAsk(Client(url)), Arm("m"), PRICE)}, reply_tokens=TOKENS, call_s=10)


class Hostile:
    """What answers in the ways that it is told, and what it has billed: what it told, else as much as a call may cost.

    Only questions with ``mark`` count: on a busy machine one that nobody waits for any more may come after the next example has begun.
    """

    def __init__(self):
        self.ways, self.billed, self.most, self.mark = [], 0.0, 0.0, ""

    def __call__(self, path, body):
        if self.mark not in json.dumps(body):
            return FREE["400"]
        way = self.ways.pop(0)
        if way in BILLED:
            self.billed += {"told": TOLD, "late": TOLD, "says nothing": 30 * PRICE.prompt / 1e6}.get(way, self.most)
        if way == "late":
            time.sleep(2 * CALL_S)
        return (BILLED | FREE)[way]


@pytest.fixture(scope="module")
def hostile():
    answer = Hostile()
    with endpoint(answer) as (url, _):
        yield answer, url


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@given(
    ways=st.lists(st.sampled_from([*BILLED, *FREE]), min_size=1, max_size=8), limit=st.floats(0, 0.08), runs=st.data()
)
@settings(max_examples=15, deadline=None)
def test_what_is_billed_never_passes_the_limit(hostile, tmp_path_factory, ways, limit, runs):
    answer, url = hostile
    path = tmp_path_factory.mktemp("money") / "pool.jsonl"
    made = live(url)
    mark = f"example {next(NUMBERS):04}"
    answer.mark, answer.ways, answer.billed = mark, list(ways), 0.0
    answer.most = made.most_usd("small", f"{mark}, question 10")
    pool = KeptPool(made, path, max_usd=limit)
    for number in range(len(ways)):
        if runs.draw(st.booleans(), label="another run goes on"):
            told = pool.usd
            pool = KeptPool(made, path, max_usd=limit)
            assert pool.usd == pytest.approx(told)
        try:
            pool.reply("small", f"{mark}, question {number:02}")
        except LimitError:
            break
        except AnabranchError:
            pass
        assert answer.billed <= pool.usd + 1e-12
    assert answer.billed <= pool.usd + 1e-12 <= limit + 2e-12
    made.close()


@pytest.mark.parametrize("way", [*BILLED, *FREE])
def test_what_the_line_of_a_call_says(hostile, tmp_path, way):
    answer, url = hostile
    path, made = tmp_path / "pool.jsonl", live(url)
    answer.mark, answer.ways, answer.most = "Who wrote it?", [way], made.most_usd("small", "Who wrote it?")
    pool = KeptPool(made, path)
    try:
        said = pool.reply("small", "Who wrote it?")
    except AnabranchError:
        said = None
    made.close()
    [row] = rows(path)
    if way in FREE:
        assert (row["usd"], pool.usd) == (0.0, 0.0)
    elif way in ("told", "says nothing"):
        assert row["usd"] == pool.usd == pytest.approx(TOLD if way == "told" else 30 * PRICE.prompt / 1e6)
        assert row["prompt_tokens"] == 30
    else:
        assert row["usd"] == pool.usd == answer.most > TOLD
    # Who reads the file again has the same reply, and the same costs.
    again = KeptPool(None, path, prices={"small": PRICE})
    assert (again.calls, again.usd) == (1, pool.usd)
    if said is not None:
        found = read_table(path)["small", "Who wrote it?"]
        assert (found.text, found.prompt_tokens, found.completion_tokens) == (
            said.text,
            said.prompt_tokens,
            said.completion_tokens,
        )
        # One that does not tell its tokens is not for nothing to a router that learns from costs.
        assert (said.completion_tokens > 0) == (way != "says nothing")


def test_a_call_that_reached_nobody_costs_nothing(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        made = live(f"http://127.0.0.1:{closed.getsockname()[1]}/v1")
        pool = KeptPool(made, tmp_path / "pool.jsonl", max_usd=0.01)
        for number in range(4):
            with pytest.raises(BackendError, match="cannot reach"):
                pool.reply("small", f"question {number}")
        made.close()
    assert (pool.usd, pool.calls) == (0.0, 4)
    assert [row["usd"] for row in rows(tmp_path / "pool.jsonl")] == [0.0] * 4


class Fails:
    """A pool that is interrupted."""

    def __init__(self, error):
        self.prices, self._error = {"small": PRICE}, error

    def most_usd(self, model, query):
        return 0.25

    def reply(self, model, query):
        raise self._error

    def close(self):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_a_call_that_is_interrupted_is_under_way(tmp_path, error):
    pool = KeptPool(Fails(error), tmp_path / "pool.jsonl", max_usd=0.3)
    with pytest.raises(type(error)):
        pool.reply("small", "a")
    assert pool.usd == KeptPool(None, tmp_path / "pool.jsonl").usd == 0.25
    with pytest.raises(LimitError, match="would pass max_usd"):
        pool.reply("small", "b")


def test_files_from_before_lines_told_it(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text(
        '{"model": "small", "query": "a", "error": "late"}\n{"model": "gone", "query": "a", "error": "late"}\n'
    )
    assert KeptPool(Fails(KeyError()), path).usd == 0.25


class Costs(Fails):
    """A pool that answers, and counts who asks."""

    def __init__(self):
        super().__init__(None)
        self.asked = []

    def reply(self, model, query):
        self.asked.append(query)
        return Reply("x" * 60, 0, 250)


def test_limits_are_of_all_processes_with_the_file(tmp_path):
    path, made = tmp_path / "pool.jsonl", Costs()
    first, second = (KeptPool(made, path, max_usd=0.75, max_calls=4) for _ in range(2))
    first.reply("small", "a")
    # What the other was told is known here, too.
    assert second.reply("small", "A").text == "x" * 60
    second.reply("small", "b")
    first.reply("small", "c")
    for pool in (first, second):
        with pytest.raises(LimitError, match="would pass max_usd"):
            pool.reply("small", "d")
        assert (pool.usd, pool.calls) == (0.75, 3)
    assert made.asked == ["a", "b", "c"]
    assert [one.name for one in tmp_path.iterdir()] == ["pool.jsonl"]


def test_who_asks_while_another_process_asks_waits_or_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "pool.jsonl"
    monkeypatch.setattr("anabranch.routers.router_r1.kept_pool._WAIT_S", 0.0)
    refused = []

    class Asks(Costs):
        def reply(self, model, query):
            # A line that the other process is writing.
            path.write_text('{"model": "small", "que')
            with pytest.raises(LimitError, match="another process asks models with"):
                KeptPool(Costs(), path).reply("small", "b")
            refused.append(path.read_text())
            path.write_text("")
            return super().reply(model, query)

    KeptPool(Asks(), path).reply("small", "a")
    assert refused == ['{"model": "small", "que']
    assert KeptPool(Costs(), path).reply("small", "b").completion_tokens == 250


def test_a_disk_that_is_full_for_a_moment_loses_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "pool.jsonl"
    pool, usual = KeptPool(Costs(), path), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    pool.reply("small", "a")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, usual[1]))
        with pytest.raises(LimitError, match="what models say cannot be kept: no room left on disk to write"):
            pool.reply("small", "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(read_table(path)) == [("small", "a")]
    pool.reply("small", "c")
    assert [query for _, query in read_table(path)] == ["a", "b", "c"]
    assert KeptPool(None, path, prices={"small": PRICE}).usd == pool.usd


@pytest.mark.parametrize("usd", ["-1", "NaN", "Infinity", "true", '"1"', "1" + "0" * 400])
def test_costs_that_are_none(tmp_path, usd):
    path = tmp_path / "pool.jsonl"
    path.write_text(f'{{"model": "small", "query": "a", "text": "b", "usd": {usd}}}\n')
    with pytest.raises(DataError, match=r"line 1 of .* has usd .*; it must be a number of dollars of at least 0"):
        KeptPool(None, path)
    assert read_table(path) == {("small", "a"): Reply("b", 1, 1)}
