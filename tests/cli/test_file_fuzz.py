"""Damaged corpora, traces, configs and outcomes: each is read, or told in one line, in bounded time and memory."""

import gzip
import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anabranch.cli.runs import build_config
from anabranch.data.corpus import corpus_at
from anabranch.routers.data import load_outcomes, read_prices
from anabranch.routing.trace import RoutingTrace
from anabranch.routing.trace_schema import METADATA_KEY, TraceLayer, layers_to_json, schema_with
from damage import altered, as_json, damaged, each, little_room, refuse_or_read

CASES = [pytest.param(40, id="few"), pytest.param(1500, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
TEXT = b"def f(x):\n    return x\n" * 50
ROWS = [{"text": "abc" * 20, "label": "x", "n": 1}] * 5
TOML = """preset = "moe"
[model]
dim = 32
[model.feed_forward]
hidden_dim = 16
[train]
steps = 3
seed = 1
[data.corpus]
kind = "files"
paths = ["x"]
"""
TOML_VALUES = [
    "1e400",
    "nan",
    "-inf",
    "9" * 20,
    "-1",
    "true",
    '"x"',
    '"\\u0000"',
    "[]",
    "{}",
    "1979-05-27",
    "{a={b={}}}",
    "0",
]
TOML_VALUES += ["[" * 3000, "9" * 5000, "1e30", "''"]
TOML_HEADS = ["[x]", "[model.x.y]", "[[model]]", "[model.feed_forward.router.select.kind]", "[data.corpus.paths]"]
OUTCOMES = [
    {"query": f"q{i}", "task": "t", "scores": {"a": 0.5, "b": 1}, "cost": {"a": 0.1, "b": 0.2}} for i in range(6)
]
PRICES = {name: {"input_price": 1.0, "output_price": 2.0} for name in "ab"}


def zipped(method):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", method) as archive:
        archive.writestr("a.py", TEXT)
    return whole.getvalue()


def parquet(table):
    whole = io.BytesIO()
    pq.write_table(table, whole)
    return whole.getvalue()


def lines(rows):
    return b"\n".join(json.dumps(row).encode() for row in rows)


def altered_lines(rows, random):
    return b"\n".join(as_json(altered(row, random), random) for row in rows)


def documents(path):
    corpus = corpus_at(path).build()
    return list(corpus.documents()), corpus.fingerprint()


TRACE = pa.Table.from_pylist(
    [
        {
            "item": i // 4,
            "position": i % 4,
            "layer": layer,
            "rank": k,
            "destination": (i + k) % 4,
            "weight": 0.5,
            "token": i,
            "domain": "a",
            "scores": [0.5, 0.5, 0.0, 0.0] if k == 0 else None,
            "propensity": 0.5 if i % 2 else None,
        }
        for layer in range(2)
        for i in range(16)
        for k in range(2)
    ],
    schema=schema_with(["scores", "propensity"]),
)
LAYERS = [TraceLayer(layer=layer, name=f"l{layer}", num_destinations=4, top_k=2) for layer in range(2)]


def altered_trace(random):
    """A trace with a column that is missing, of another type or out of range, or other metadata."""
    table, about, name = TRACE, layers_to_json(LAYERS).encode(), random.choice(TRACE.column_names)
    kind, place = random.randrange(4), TRACE.column_names.index(name)
    if kind == 0:
        about = as_json(altered(json.loads(about), random), random)
    elif kind == 1:
        table = table.drop_columns([name])
    elif kind == 2:
        item = random.choice(["x", 1.5, None, [1], True, [], [None] * 4, [0.5] * 4])
        table = table.set_column(place, name, pa.array([item] * len(table)))
    elif name not in ("weight", "domain"):
        item = random.choice([0, -1, -2, 5, 2**15 - 1])
        field = TRACE.schema.field(place)
        item = [item] * random.randrange(6) if name == "scores" else item
        table = table.set_column(place, field, pa.array([item] * len(table), field.type))
    return parquet(table.replace_schema_metadata({METADATA_KEY: about}))


def read_trace(path):
    trace = RoutingTrace.read(path)
    return trace.load_LE(), trace.domains, [trace.routing(layer.layer) for layer, _ in trace]


def altered_toml(random):
    written = TOML.split("\n")
    place = random.randrange(len(written))
    name, is_field, _ = written[place].partition("=")
    written[place] = f"{name}= {random.choice(TOML_VALUES)}" if is_field else random.choice(TOML_HEADS)
    return "\n".join(written).encode()


def of_rows(rows):
    return lambda random: altered_lines(rows, random)


READERS = {
    "text": (".txt", TEXT, documents, None),
    "gzip": (".txt.gz", gzip.compress(TEXT), documents, None),
    "zip": (".zip", zipped(zipfile.ZIP_DEFLATED), documents, None),
    "lzma": (".zip", zipped(zipfile.ZIP_LZMA), documents, None),
    "jsonl": (".jsonl", lines(ROWS), documents, of_rows(ROWS)),
    "parquet": (".parquet", parquet(pa.Table.from_pylist(ROWS)), documents, None),
    "trace": (".parquet", altered_trace, read_trace, altered_trace),
    "toml": (".toml", TOML.encode(), lambda path: build_config(None, path, None, {}), altered_toml),
    "outcomes": (".jsonl", lines(OUTCOMES), lambda path: load_outcomes(str(path)), of_rows(OUTCOMES)),
    "csv": (".csv", b"query,task,score:a,score:b\nq1,t,1,0\nq2,t,0.5,1\n", lambda path: load_outcomes(str(path)), None),
    "prices": (".json", lines([PRICES]), read_prices, of_rows([PRICES])),
}


@pytest.mark.parametrize("number", CASES)
@pytest.mark.parametrize("kind", READERS)
def test_file(tmp_path, kind, number):
    suffix, whole, read, alter = READERS[kind]
    path = tmp_path / f"x{suffix}"
    found = set()
    with little_room():
        for random in each(number):
            data = whole(random) if callable(whole) else whole
            path.write_bytes(alter(random) if alter and random.random() < 0.7 else damaged(data, random))
            found.add(refuse_or_read(lambda: read(path), random.name))
    assert False in found
