"""Routers by name and tasks over HTTP: which there are, what a request may say, what is told of routes, loading while it serves."""

import http.client
import json
import shutil

import pytest

from anabranch.data import ByteTokenizer
from anabranch.lm import save_model
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from served_adapters import INSTRUCTIONS, TASKS, make_adapters, make_model, make_routers, with_layers
from serving_models import serve_process
from serving_thread import events, serving

BASE, PROMPT = "demo", "Tell me of a river."
SIZES = {"num_blocks": 256, "name": BASE, "dtype": "float32", "max_seqs": 8, "max_batched_tokens": 64}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("root")
    make_adapters(made)
    make_routers(made)
    return made


@pytest.fixture(scope="module")
def server(root):
    load = (
        f"a={root / 'a'}",
        f"all=arrow:{root / 'pool'}",
        f"pool={root / 'pool'}",
        f"mhr={root / 'multi_head_routed'}",
    )
    config = ServingConfig(**SIZES, adapters=AdaptersConfig(load=load))
    with serving(
        lambda: LocalEngine(lambda: Engine.of(make_model(), config, tokenizer=ByteTokenizer())), adapter_root=str(root)
    ) as running:
        yield running


def say(server, **fields):
    return server.ask(
        "/v1/completions",
        {"model": BASE, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields},
    )


def text(server, **fields):
    status, _, body = say(server, **fields)
    assert status == 200, body
    return body["choices"][0]["text"]


def test_a_router_is_a_name_among_the_models(server):
    listed = server.ask("/v1/models")[2]["data"]
    assert [(model["id"], model.get("parent")) for model in listed] == [
        (BASE, None),
        *((name, BASE) for name in ("a", "all", "pool", "mhr")),
    ]
    assert server.ask("/v1/models/all")[2]["id"] == "all"
    told = {
        row["id"]: (row["kind"], row.get("experts"), row.get("tasks")) for row in server.ask("/v1/adapters")[2]["data"]
    }
    assert told == {
        "a": ("lora", None, None),
        "all": ("arrow", ["law", "sql", "sum"], None),
        "pool": ("glider", ["law", "sql", "sum"], None),
        "mhr": ("multi_head_routed", None, list(TASKS)),
    }
    texts = {name: text(server, model=name) for name in (BASE, "a", "all", "pool")}
    assert len(set(texts.values())) == 4
    assert (
        text(server, model="base:all")
        == text(server, model=f"{BASE}:all")
        == text(server, adapters={"all": 1})
        == texts["all"]
    )
    # They are mixed as adapters are.
    mixed = text(server, model="all+a")
    assert mixed == text(server, adapters={"a": 0.5, "all": 0.5})
    assert mixed not in texts.values()
    assert say(server, model="all")[1]["x-route-adapters"] == "all*1"


def test_what_is_asked_for_finds_adapters(server):
    by = {query: text(server, model="pool", query=query) for query in ("", *INSTRUCTIONS.values())}
    assert len(set(by.values())) >= 3
    # A prompt says it where nobody else does, and of a chat the last message of a user.
    assert text(server, model="pool", prompt=INSTRUCTIONS["sql"]) == text(
        server, model="pool", prompt=INSTRUCTIONS["sql"], query=INSTRUCTIONS["sql"]
    )
    both = [INSTRUCTIONS["sql"], INSTRUCTIONS["law"]]
    _, _, body = say(server, model="pool", prompt=both)
    assert [choice["text"] for choice in body["choices"]] == [
        text(server, model="pool", prompt=prompt) for prompt in both
    ]
    messages = [
        {"role": "system", "content": INSTRUCTIONS["law"]},
        {"role": "user", "content": [{"type": "text", "text": INSTRUCTIONS["sum"]}]},
    ]
    chat = {"model": "pool", "messages": messages, "temperature": 0, "max_tokens": 12}
    answers = [
        server.ask("/v1/chat/completions", {**chat, **more})[2]["choices"][0]["message"]["content"]
        for more in ({}, {"query": INSTRUCTIONS["sum"]}, {"query": INSTRUCTIONS["law"]})
    ]
    assert answers[0] == answers[1] != answers[2]
    # Where nobody compares, it is of no account.
    assert text(server, model="all", query="x") == text(server, model="all")
    assert text(server, query="x") == text(server)


def test_routes_of_tokens_are_told(server):
    status, _, body = say(server, model="all", routing=True)
    assert status == 200
    summary, [choice] = body["routing"], body["choices"]
    rows = choice["routing"]["tokens"]
    assert summary["tokens"] == len(rows) == 12
    assert set(summary["adapters"]["blocks.0.attention.q"]) <= {"sql", "law", "sum"}
    assert sum(summary["adapters"]["blocks.1.feed_forward.down"].values()) == sum(
        len(row["adapters"]["blocks.1.feed_forward.down"]) for row in rows
    )
    assert summary["experts"] == {}
    assert "adapters" not in say(server, routing=True)[2]["routing"]
    raw = server.ask(
        "/v1/completions", {"model": "all", "prompt": PROMPT, "max_tokens": 4, "stream": True, "routing": True}
    )[2]
    last = [event for event in events(raw) if event != "[DONE]"][-1]
    assert last["routing"]["adapters"].keys() == summary["adapters"].keys()
    assert "adapters" not in say(server, model="mhr", task="sql", routing=True)[2]["routing"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_told_why_a_pool_chose(server, stream):
    fields = {"model": "pool", "prompt": [PROMPT, INSTRUCTIONS["law"]], "max_tokens": 4, "routing": True}
    _, _, body = server.ask("/v1/completions", {**fields, "stream": stream, "temperature": 0})
    last = [event for event in events(body) if event != "[DONE]"][-1] if stream else body
    both = [choice["pool"] for choice in last["routing"]["explained"]]
    assert [one["instruction"] for one in both] == [PROMPT, INSTRUCTIONS["law"]]
    assert both[1]["experts"][0]["name"] == "law"
    assert 0 < both[1]["experts"][0]["global_share"] <= 1
    assert {one["name"] for one in both[0]["experts"]} == {"sql", "law", "sum"}
    # By what the caller says, or by tokens alone; and of nothing where no pool is asked.
    for query, told in ((INSTRUCTIONS["sum"], INSTRUCTIONS["sum"]), ("", None)):
        body = say(server, model="pool", query=query, routing=True)[2]
        assert body["routing"]["explained"][0]["pool"]["instruction"] == told
    for model in ("a", BASE):
        assert "explained" not in say(server, model=model, routing=True)[2]["routing"]
    assert "routing" not in say(server, model="pool")[2]


def test_a_request_names_its_task(server):
    texts = {task: text(server, model="mhr", task=task) for task in TASKS}
    assert len(set(texts.values())) >= 2
    # The prefix of one task is not another's.
    assert {task: text(server, model="mhr", task=task) for task in reversed(TASKS)} == texts
    assert text(server, model="mhr+a", task="law") == text(server, adapters={"mhr": 0.5, "a": 0.5}, task="law")
    vectors = [
        server.ask("/v1/embeddings", {"model": "mhr", "input": PROMPT, "task": task})[2]["data"][0]["embedding"]
        for task in TASKS
    ]
    assert len({tuple(vector) for vector in vectors}) == 3
    chat = {
        "model": "mhr",
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_tokens": 8,
        "task": "sql",
    }
    status, headers, _ = server.ask("/v1/chat/completions", chat)
    assert (status, headers["x-warning"]) == (200, None)
    status, headers, _ = server.ask(
        "/v1/responses", {"model": "mhr", "input": PROMPT, "max_output_tokens": 8, "task": "sql"}
    )
    assert (status, headers["x-warning"]) == (200, None)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"model": "mhr"}, "goes by task, and the request names none; say task, one of 'sql', 'law', 'sum'"),
        ({"model": "mhr", "task": None}, "names none"),
        (
            {"model": "mhr", "task": "sqk"},
            "task 'sqk' is not one of the 3 that the model was trained for; did you mean 'sql'? (adapter 'mhr')",
        ),
        ({"model": "mhr", "task": "SQL"}, "is not one of the 3"),
        ({"model": "mhr", "task": ""}, "is not one of the 3"),
        ({"model": "mhr", "task": 3}, "text of at most 256 characters"),
        ({"model": "mhr", "task": ["sql"]}, "text of at most 256 characters"),
        ({"model": "mhr", "task": "x" * 257}, "text of at most 256 characters"),
        ({"model": "all", "task": "sql"}, "nothing in what it adds goes by tasks"),
        ({"model": "a", "task": "sql"}, "nothing in what it adds goes by tasks"),
        ({"task": "sql"}, "nothing in the model goes by tasks"),
        ({"adapters": {"mhr": 1, "a": 1}}, "names none"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("stream", [False, True])
def test_tasks_that_cannot_be(server, fields, what, stream):
    status, _, body = say(server, **fields, stream=stream)
    assert (status, body["error"]["param"]) == (400, "task"), body
    assert what in body["error"]["message"]


def test_tasks_of_embeddings_that_cannot_be(server):
    for task, what in (("x", "is not one of the 3"), (None, "names none"), (3, "text of at most")):
        status, _, body = server.ask("/v1/embeddings", {"model": "mhr", "input": PROMPT, "task": task})
        assert (status, body["error"]["param"]) == (400, "task"), body
        assert what in body["error"]["message"]


def test_queries_that_cannot_be(server):
    for query in (3, ["x"], "x" * 2001):
        status, _, body = say(server, model="pool", query=query)
        assert (status, body["error"]["param"]) == (400, "query"), body


def test_they_come_and_go(server, root, tmp_path):
    def load(name, folder):
        return server.ask("/v1/adapters", {"name": name, "folder": folder}, "POST")

    status, _, made = load("new", "arrow:pool")
    assert (status, made["kind"], made["experts"]) == (200, "arrow", ["law", "sql", "sum"])
    assert text(server, model="new") == text(server, model="all")
    status, _, made = load("new", "multi_head_routed")
    assert (status, made["tasks"]) == (200, list(TASKS))
    assert text(server, model="new", task="law") == text(server, model="mhr", task="law")
    assert server.ask("/v1/adapters/new", None, "DELETE")[0] == 200
    assert say(server, model="new", task="law")[0] == 404
    shutil.copytree(root / "pool", tmp_path / "outside")
    (root / "led").mkdir()
    (root / "led" / "sql").symlink_to(tmp_path / "outside" / "sql")
    shutil.copytree(root / "pool", root / "part")
    (root / "part" / "law" / "glider.json").unlink()
    (root / "part" / "law" / "glider.json").symlink_to(tmp_path / "outside" / "law" / "glider.json")
    for folder, what in (
        ("led", "has 'sql', which lies outside of the server's --adapter-root"),
        ("part", "has 'glider.json', which lies outside"),
        ("arrow:a", "is one adapter, and arrow routes among several"),
        ("arrow:..", "must be below"),
        ("arrow:none", "cannot be read"),
        ("arrow:", "cannot be read"),
        ("broken:pool", "cannot be read"),
    ):
        status, _, body = load("x", folder)
        assert (status, body["error"]["param"]) == (400, "folder"), body
        assert what in body["error"]["message"]
        assert str(tmp_path) not in body["error"]["message"]


def test_a_model_that_goes_by_task_itself(root):
    config = ServingConfig(**SIZES)
    with serving(
        lambda: LocalEngine(lambda: Engine.of(with_layers("multi_head_routed"), config, tokenizer=ByteTokenizer()))
    ) as running:
        assert running.ask("/v1/models")[2]["data"][0]["tasks"] == list(TASKS)
        texts = {task: text(running, task=task) for task in TASKS}
        assert len(set(texts.values())) >= 2
        for fields, what in (
            ({}, "the model goes by task, and the request names none"),
            ({"task": "x"}, "is not one of the 3"),
        ):
            status, _, body = say(running, **fields)
            assert (status, body["error"]["param"]) == (400, "task")
            assert what in body["error"]["message"]


@pytest.mark.slow
def test_a_server_of_its_own(tmp_path, root):
    save_model(tmp_path / "demo", make_model(), ByteTokenizer())
    given = ("--adapter", f"all=arrow:{root / 'pool'}", "--adapter", f"mhr={root / 'multi_head_routed'}")
    with serve_process(*given, model=str(tmp_path / "demo")) as server:
        answers = []
        for model, more in (
            ("demo", {}),
            ("all", {}),
            ("mhr", {"task": "sql"}),
            ("mhr", {"task": "law"}),
            ("mhr", {"task": "x"}),
        ):
            body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **more}
            link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            link.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            answer = link.getresponse()
            answers.append((answer.status, json.loads(answer.read())))
            link.close()
        assert [status for status, _ in answers] == [200, 200, 200, 200, 400]
        assert len({made["choices"][0]["text"] for _, made in answers[:4]}) >= 3
