import asyncio
import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError, DataError, InputError
from anabranch.gateway import store_outcomes
from anabranch.gateway.store_outcomes import from_ledger
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.data import (
    Columns,
    check_disjoint,
    deduplicated,
    folds,
    groups,
    load_csv,
    load_outcomes,
    measured_in,
    merged,
    pool_of,
    pooled,
    read_joules,
    read_prices,
    split,
)
from anabranch.routers.data.splits import question
from anabranch.routers.data.table import Row
from anabranch.routers.money import Price
from made_outcomes import made_outcomes, write_outcomes

GOOD = '{"query": "q", "scores": {"a": 1, "b": 0.5}}\n'
PRICES = {
    "a": {"input_price": 1, "output_price": 2, "size": "8B", "feature": "small"},
    "b": {"input": 0.5, "output": 4},
}


def of(texts, tasks=None, models=("a",)):
    """Rows with scores 0, 1, 2, ..."""
    score_NM = np.arange(len(texts) * len(models), dtype=float).reshape(len(texts), -1)
    return Recorded(query=tuple(texts), models=models, task=tuple(tasks or ()), score_NM=score_NM)


def written(tmp_path, content, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_field_of_a_row_is_read(tmp_path):
    row = {
        "query": "What?",
        "task": "t",
        "scores": {"a": True, "b": 0.25, "c": None},
        "cost": {"a": 0.1},
        "tokens": {"a": [10, 20], "b": {"prompt": 5}},
        "signals": {"logprob": {"b": -0.5}},
        "latency": {"b": 1.5},
        "answers": {"a": "yes"},
        "metric": "ignored",
        "ground_truth": ["so", "is", "this"],
    }
    data = load_outcomes(written(tmp_path, json.dumps(row) + "\n\n" + GOOD))
    assert (data.models, data.query, data.task) == (("a", "b", "c"), ("What?", "q"), ("t", None))
    np.testing.assert_array_equal(data.score_NM, [[1, 0.25, np.nan], [1, 0.5, np.nan]])
    np.testing.assert_array_equal(data.cost_NM, [[0.1, np.nan, np.nan], [np.nan] * 3])
    np.testing.assert_array_equal(data.tokens_NM2[0], [[10, 20], [5, np.nan], [np.nan, np.nan]])
    assert data.latency_NM[0, 1] == 1.5
    np.testing.assert_array_equal(data.signals["logprob"], [[np.nan, -0.5, np.nan], [np.nan] * 3])
    assert data.answers == ({"a": "yes"}, {})


def test_what_is_recorded_nowhere_is_none(tmp_path):
    data = load_outcomes(written(tmp_path, GOOD))
    assert (data.cost_NM, data.tokens_NM2, data.latency_NM, data.answers) == (None, None, None, ())


def test_gzip_a_byte_order_mark_and_windows_line_ends(tmp_path):
    text = "\ufeff" + GOOD.replace("\n", "\r\n") + GOOD.replace('"q"', '"Größe 北京"')
    data = load_outcomes(written(tmp_path, gzip.compress(text.encode()), "data.jsonl.gz"))
    assert data.query == ("q", "Größe 北京")


@given(st.integers(0, 10**6))
def test_outcomes_written_are_read_back_the_same(tmp_path_factory, seed):
    data = made_outcomes(5, seed)
    found = load_outcomes(write_outcomes(tmp_path_factory.mktemp("data") / "data.jsonl", data))
    assert (found.query, found.task, found.models) == (data.query, data.task, data.models)
    np.testing.assert_array_equal(found.score_NM, data.score_NM)
    np.testing.assert_array_equal(found.cost_NM, data.cost_NM)


BAD_LINES = {
    "not JSON": ("{", "not JSON"),
    "no object": ("[1, 2]", "must be an object"),
    "no query": ('{"scores": {"a": 1}}', "query is null"),
    "blank query": ('{"query": " ", "scores": {"a": 1}}', "not empty"),
    "half a character": ('{"query": "\\ud800", "scores": {"a": 1}}', "half of a surrogate pair"),
    "query of a number": ('{"query": 3, "scores": {"a": 1}}', "query is 3"),
    "task of a number": ('{"query": "q", "task": 3, "scores": {"a": 1}}', "task is 3"),
    "no scores": ('{"query": "q"}', "scores are missing"),
    "empty scores": ('{"query": "q", "scores": {}}', "scores are missing"),
    "only null scores": ('{"query": "q", "scores": {"a": null}}', "scores are missing"),
    "a list of scores": ('{"query": "q", "scores": [1]}', "must be a table"),
    "a score in words": ('{"query": "q", "scores": {"a": "good"}}', "scores of 'a' is 'good'"),
    "a score that is no number": ('{"query": "q", "scores": {"a": NaN}}', "scores of 'a' is nan"),
    "an infinite score": ('{"query": "q", "scores": {"a": Infinity}}', "finite"),
    "a score beyond floats": (f'{{"query": "q", "scores": {{"a": 1{"0" * 400}}}}}', "finite"),
    "a model without a name": ('{"query": "q", "scores": {"": 1}}', "must be a table by name"),
    "a negative cost": (
        '{"query": "q", "scores": {"a": 1}, "cost": {"a": -1}}',
        "cost of 'a' is -1; it must be a number of at least 0",
    ),
    "a cost for all": ('{"query": "q", "scores": {"a": 1}, "cost": 0.5}', "cost is 0.5"),
    "tokens without an end": (
        '{"query": "q", "scores": {"a": 1}, "tokens": {"a": [1]}}',
        "must be [prompt, completion]",
    ),
    "negative tokens": (
        '{"query": "q", "scores": {"a": 1}, "tokens": {"a": [1, -2]}}',
        "completion tokens of 'a' is -2",
    ),
    "a signal of words": (
        '{"query": "q", "scores": {"a": 1}, "signals": {"votes": {"a": "x"}}}',
        "votes of 'a' is 'x'",
    ),
    "signals without a name": ('{"query": "q", "scores": {"a": 1}, "signals": 3}', "signals is 3"),
    "samples beside scores": (
        '{"query": "q", "scores": {"a": 1}, "samples": [1]}',
        "scores and samples are both there",
    ),
    "samples that are none": (
        '{"query": "q", "samples": 1}',
        r"samples are 1; they must be a list, such as [true, false]",
    ),
    "samples of nobody": (
        '{"query": "q", "samples": [1], "model": ""}',
        'model is ""; it must be the name of the model',
    ),
    "a sample of words": ('{"query": "q", "scores": {"a": [1, "x"]}}', "sample 2 of 'a' is 'x'"),
    "a sample nobody knows": (
        '{"query": "q", "samples": [1, null]}',
        "sample 2 of 'model' is null; it must be a finite number; leave out what is not known",
    ),
    "no samples": ('{"query": "q", "samples": []}', "scores are missing"),
    "samples without end": (f'{{"query": "q", "samples": [{"1," * 10_000}1]}}', "there are 10,001 samples of 'model'"),
    "negative latency": ('{"query": "q", "scores": {"a": 1}, "latency": {"a": -0.1}}', "latency of 'a'"),
    "an answer that is no text": ('{"query": "q", "scores": {"a": 1}, "answers": {"a": 5}}', "answer of 'a' is 5"),
    "very deep nesting": ('{"query": "q", "scores": ' + "[" * 100_000 + "}", "not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, name):
    line, message = BAD_LINES[name]
    path = written(tmp_path, GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(DataError) as error:
        load_outcomes(path)
    assert f"{path}, line 3: " in str(error.value)
    assert message in str(error.value)
    assert len(str(error.value)) < 2000


BAD_FILES = {
    "empty": (b"", "data.jsonl", "holds no rows"),
    "only blank lines": (b"\n\n", "data.jsonl", "holds no rows"),
    "not UTF-8": (GOOD.encode() + b'{"query": "\xff"}\n', "data.jsonl", "line 2: not UTF-8"),
    "cut off": (gzip.compress(GOOD.encode() * 100)[:-12], "data.jsonl.gz", "damaged gzip"),
    "not gzip inside": (b"\x1f\x8b\x08\x00" + b"x" * 40, "data.jsonl.gz", "damaged gzip"),
    "a cost of an unknown model": (
        b'{"query": "q", "scores": {"a": 1}, "cost": {"z": 1}}',
        "data.jsonl",
        "cost of 'z'",
    ),
    "unknown ending": (b"x", "data.parquet", "no ending that is known"),
    "no ending": (b"x", "data", "no ending that is known"),
    "an ending of another file": (b"x", "outcomes.xlsx", "from a gateway's store (.db, .sqlite, or a URL"),
    "a config": (b"x", "gateway.toml", "is a config by its name"),
    "a row for each model": (
        b"prompt,model,score\nq,a,1\nq,b,0\n",
        "data.csv",
        "here 'model' names a model in each row",
    ),
    "a row for each model, and costs": (b"prompt,LLM,quality,cost\nq,a,1,2\n", "data.csv", "here 'LLM' names a model"),
    "a row for each model, called otherwise": (b"prompt,model,f1\nq,a,1\n", "data.csv", "here 'model' names a model"),
    "scores of nobody": (b"prompt,Score\nq,1\n", "data.csv", "'Score' is left out: no model's, by its name; say it"),
    "other separators": (
        b"prompt;small;large\nq;1;0\n",
        "data.csv",
        "has one column, 'prompt;small;large'; cells are split at",
    ),
    "tabs": (b"prompt\tsmall\nq\t1\n", "data.csv", "cells are split at commas (in .tsv files at tabs)"),
    "a table with no rows": (b"prompt,a\n", "data.csv", "holds no rows"),
    "a short row": (b"prompt,a\nq,1\nq2\n", "data.csv", "line 3: 1 cells; the header has 2 columns"),
    "an open quote": (b'prompt,a\n"q,1\n', "data.csv", "not CSV"),
    "one column twice": (b"prompt,a,a\nq,1,2\n", "data.csv", "column 'a' twice"),
    "no texts": (b"x,y\n1,2\n", "data.csv", "cannot tell which columns"),
    "no scores": (b"prompt,words\nq,many\n", "data.csv", "cannot tell which columns"),
    "an empty text": (b"prompt,a\nq,1\n ,1\n", "data.csv", "line 3: the column 'prompt' is empty"),
    "no score in a row": (b"prompt,a\nq,1\nr,\n", "data.csv", "line 3: no model has a score"),
    "a negative price in a table": (b"prompt,a,cost:a\nq,1,-3\n", "data.csv", "line 2: cost of 'a' is -3"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name):
    content, file, message = BAD_FILES[name]
    path = written(tmp_path, content, file)
    with pytest.raises(DataError) as error:
        load_outcomes(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*no such file"):
        load_outcomes(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*is a directory"):
        load_outcomes(tmp_path / "folder.jsonl")


def test_two_model_files_of_routellm_are_read_as_they_are(tmp_path):
    text = (
        ",prompt,mistral/Mixtral-8x7B,gpt-4-1106,mistral/Mixtral-8x7B_response,gpt-4-1106_response\n"
        '0,"two\nlines, and ""quotes""",True,False,an answer,\n1,next,False,True,b,c\n'
    )
    data = load_outcomes(written(tmp_path, text, "gsm8k.csv"))
    assert data.models == ("mistral/Mixtral-8x7B", "gpt-4-1106")
    assert data.query[0] == 'two\nlines, and "quotes"'
    np.testing.assert_array_equal(data.score_NM, [[1, 0], [0, 1]])
    assert data.answers[0] == {"mistral/Mixtral-8x7B": "an answer", "gpt-4-1106": ""}


def test_the_table_of_routerbench_is_read_as_it_is(tmp_path):
    text = (
        "sample_id,prompt,eval_name,gpt,claude,gpt|model_response,claude|model_response,gpt|total_cost,claude|total_cost,oracle_model_to_route_to\n"
        "m.1,ask,mmlu,0.5,1.0,x,y,0.001,0.002,claude\n"
    )
    data = load_outcomes(written(tmp_path, text, "bench.csv"))
    assert (data.models, data.task) == (("gpt", "claude"), ("mmlu",))
    np.testing.assert_array_equal(data.cost_NM, [[0.001, 0.002]])
    assert data.answers == ({"gpt": "x", "claude": "y"},)


def test_a_mapping_says_which_column_is_what(tmp_path):
    path = written(
        tmp_path, "text\tkind\tok\tspent\tin\tout\nask\tmaths\tyes\t0.5\t7\t9\nmore\t\tNA\t\t\t\n", "log.tsv"
    )
    columns = Columns.parse("query=text, task=kind, score:m=ok, cost:m=spent, prompt:m=in, completion:m=out")
    with pytest.raises(DataError, match="line 3: no model has a score"):
        load_csv(path, columns)
    path.write_text(path.read_text().replace("NA", "0"))
    data = load_csv(path, columns)
    assert (data.task, data.models) == (("maths", None), ("m",))
    np.testing.assert_array_equal(data.cost_NM, [[0.5], [np.nan]])
    np.testing.assert_array_equal(data.tokens_NM2[0], [[7, 9]])
    with pytest.raises(DataError, match=r"score of 'm' \(column 'kind'\) is 'maths'"):
        load_csv(path, Columns(query="text", score={"m": "kind"}))


ODD = {
    "a word among numbers": (
        "prompt,small,large\nhi,1,1\nho,n/a,0\n",
        "line 3: score of 'small' (column 'small') is 'n/a'",
    ),
    "an infinity": ("prompt,small,large\nhi,inf,1\nho,1,0\n", "line 2: score of 'small' (column 'small')"),
    "an infinity alone": ("prompt,small,large\nhi,inf,1\n", "line 2: score of 'small' (column 'small')"),
    "a word in marked scores": ("prompt,a_correct\nhi,good\n", "line 2: score of 'a' (column 'a_correct') is 'good'"),
    "a word in costs": ("prompt,a,cost:a\nhi,1,free\n", "line 2: cost of 'a' (column 'cost:a') is 'free'"),
    "costs of nobody": (
        "prompt,a,cost:b\nhi,1,1\n",
        "has a cost of 'b' (column 'cost:b'), which has no column of scores",
    ),
    "costs of words": ("prompt,a,b,cost:a\nhi,x,1,1\n", "the column 'a' is left out: no numbers"),
    "scores twice": ("prompt,a_correct,score:a\nhi,1,1\n", "'a_correct' and 'score:a' both hold score of 'a'"),
    "a percentage": (
        "prompt,small,large\nhi,50%,1\nho,,0\n",
        "line 2: score of 'small' (column 'small') is '50%'; it must be",
    ),
    "a comma for a point": ('prompt,small,large\nhi,"0,5",1\n', "line 2: score of 'small' (column 'small') is '0,5'"),
    "another base": ("prompt,small,large\nhi,0x1,1\n", "line 2: score of 'small' (column 'small') is '0x1'"),
    "a line between digits": (
        "prompt,small,large\nhi,1,1\nho,1_0,1\n",
        "line 3: score of 'small' (column 'small') is '1_0'",
    ),
    "such alone": ("prompt,small,large\nhi,1_0,1\n", "line 2: score of 'small' (column 'small') is '1_0'"),
    "other digits": ("prompt,small,large\nhi,\uff11,1\n", "line 2: score of 'small' (column 'small') is '\uff11'"),
    "a part of a whole": ("prompt,small,large\nhi,3/4,1\n", "line 2: score of 'small' (column 'small') is '3/4'"),
    "too large": ("prompt,small,large\nhi,1e999,1\n", "line 2: score of 'small' (column 'small')"),
    "nothing but years": ("prompt,year\nhi,1999\n", "cannot tell which columns"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_cell_that_is_no_number_is_named_and_takes_no_model_away(tmp_path, name):
    text, message = ODD[name]
    with pytest.raises(DataError) as error:
        load_outcomes(written(tmp_path, text, "a.csv"))
    assert message in str(error.value)
    assert "a.csv" in str(error.value)


def test_a_number_that_is_no_score_makes_no_model_and_what_is_left_out_is_named(tmp_path):
    text = (
        "id,prompt,topic,small,large,cost_small,latencyMs,year,cost:large,note,void,tiny_response\n"
        "7,hi,x,0.5,,0.1,20,2025,0.3,,,yes\n8,ho,y,1,0,0.2,30,2025,,see,,no\n"
    )
    data = load_outcomes(written(tmp_path, text, "a.csv"))
    assert data.what_was_read() == {
        "models": ["small", "large"],
        "costs": ["large"],
        "columns": {
            "query": "prompt",
            "task": None,
            "score": {"small": "small", "large": "large"},
            "cost": {"large": "cost:large"},
        },
        "left_out": {
            "id": "not of a model, by its name",
            "topic": "no numbers",
            "cost_small": "not scores, by its name",
            "latencyMs": "not scores, by its name",
            "year": "not scores, by its name",
            "note": "no numbers",
            "void": "empty",
            "tiny_response": "answers of 'tiny', which has no column of scores",
        },
    }
    np.testing.assert_array_equal(data.score_NM, [[0.5, np.nan], [1, 0]])
    part = deduplicated(pooled(data.take([1]))).only(["small"])
    assert part.reading == data.reading


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["{!r}", "{:.17g}", " {:+.17e} ", "{:E}"]))
def test_a_number_is_read_as_it_was_written(tmp_path_factory, value, form):
    path = tmp_path_factory.mktemp("numbers") / "a.csv"
    text = form.format(value)
    path.write_text(f"prompt,small\nq,{text}\n")
    assert load_outcomes(path).score_NM.tolist() == [[float(text)]]


def test_spaces_behind_commas_belong_to_no_name_and_no_cell(tmp_path):
    text = 'prompt, small ,"large", cost:small\n"a, b", 0, 1, 2\n  code, 1, "0", 3\n'
    data = load_outcomes(written(tmp_path, text, "a.csv"))
    assert (data.models, data.query) == (("small", "large"), ("a, b", "code"))
    np.testing.assert_array_equal(data.score_NM, [[0, 1], [1, 0]])
    # Where nobody writes them so, a question is as it is.
    data = load_outcomes(written(tmp_path, "prompt ,small\n  code,1\n", "a.csv"))
    assert (data.models, data.query) == (("small",), ("  code",))
    with pytest.raises(DataError, match="column 'small' twice"):
        load_outcomes(written(tmp_path, "prompt, small,small\nhi,1,1\n", "a.csv"))
    with pytest.raises(DataError, match="line 3: score of 'small'"):
        load_outcomes(written(tmp_path, "prompt, small\nhi, 1\nho, x\n", "a.csv"))
    data = load_csv(written(tmp_path, "text , ok\nhi, 1\n", "a.csv"), Columns.parse("query= text, score:m = ok"))
    assert data.models == ("m",)


@pytest.mark.parametrize(
    ("header", "models"),
    [
        ("small_score,large_score", ("small", "large")),
        ("small_Score,large_score", ("small", "large")),
        # Of one alone nobody knows, and of others beside them neither.
        ("bleu_score,large", ("bleu_score", "large")),
        ("small_score,score", ("small_score",)),
    ],
)
def test_scores_that_are_called_so_are_their_models(tmp_path, header, models):
    assert load_outcomes(written(tmp_path, f"prompt,{header}\nhi,1,0\n", "a.csv")).models == models


def test_a_name_with_other_columns_of_its_own_is_a_model(tmp_path):
    """``cost:seed-1.6`` was an error: its column of scores was left out for the word "seed"."""
    data = load_outcomes(written(tmp_path, "prompt,seed-1.6,cost:seed-1.6,seed\nhi,1,2,7\n", "a.csv"))
    assert (data.models, data.reading.left_out) == (("seed-1.6",), {"seed": "not scores, by its name"})
    data = load_outcomes(written(tmp_path, "prompt,o3-day,o3-day_response,day\nhi,1,x,7\n", "a.csv"))
    assert data.models == ("o3-day",)


def test_an_ending_in_capitals_is_one(tmp_path):
    assert load_outcomes(written(tmp_path, "prompt,small\nhi,1\n", "A.CSV")).models == ("small",)
    assert load_outcomes(written(tmp_path, "prompt\tsmall\nhi\t1\n", "A.TSV")).models == ("small",)


def test_a_column_that_names_models_is_left_out_beside_marked_scores(tmp_path):
    data = load_outcomes(written(tmp_path, "prompt,model,score:a\nhi,a,1\n", "a.csv"))
    assert (data.models, data.reading.left_out) == (("a",), {"model": "no numbers"})


def test_bare_numbers_beside_marked_scores_are_left_out_by_name(tmp_path):
    data = load_outcomes(written(tmp_path, "prompt,a_correct,score:b,extra\nhi,1,0,9\n", "a.csv"))
    assert data.models == ("a", "b")
    assert data.reading.left_out == {"extra": "other columns are marked as scores"}


def test_what_a_mapping_does_not_name_is_left_out_by_name(tmp_path):
    data = load_csv(written(tmp_path, "prompt,a,b\nhi,1,0\n", "a.csv"), Columns.parse("query=prompt,score:a=a"))
    assert data.reading.left_out == {"b": "not named by the mapping"}


@given(
    st.lists(
        st.sampled_from(["1", "0.5", "", "x", "n/a", "inf", "true", "nan", "1_0", "50%", "0,5", "0x1", "1/2", "٣"]),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["small", "small_correct", "score:small", "year", "id", "cost:large"]),
)
def test_every_column_is_read_or_named_or_an_error(tmp_path_factory, cells, name):
    path = tmp_path_factory.mktemp("odd") / "a.csv"
    path.write_text(f"prompt,score:large,{name}\n" + "".join(f'q{at},1,"{cell}"\n' for at, cell in enumerate(cells)))
    try:
        data = load_outcomes(path)
    except DataError as error:
        told = str(error)
    else:
        told = ""
    if told:
        assert f"(column {name!r})" in told
        return
    read = [one for of in data.reading.columns.values() for one in of.values()]
    assert sorted(["prompt", *read, *data.reading.left_out]) == sorted(["prompt", "score:large", name])


def test_fields_of_a_line_that_mean_nothing_are_named(tmp_path):
    row = '{"query": "q", "scores": {"a": 1}, "costs": {"a": 1}, "judge": "j", "request_id": "r", "colour": 3}\n'
    data = load_outcomes(written(tmp_path, GOOD + row))
    assert data.reading.left_out == {
        "costs": "not a field of outcomes; did you mean 'cost'?",
        "colour": "not a field of outcomes",
    }


@pytest.mark.parametrize(
    "text", ["", "query=a", "score:m=b", "query=a,score=b", "query=a,nonsense:m=b", "query=a,score:m"]
)
def test_a_mapping_that_says_too_little_is_refused(text):
    with pytest.raises(ConfigError, match="columns"):
        Columns.parse(text)


def test_a_mapping_to_a_column_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="has no column 'c'; it has prompt, a"):
        load_csv(written(tmp_path, "prompt,a\nq,1\n", "x.csv"), Columns(query="prompt", score={"m": "c"}))


def test_prices_make_costs(tmp_path):
    known = read_prices(written(tmp_path, json.dumps(PRICES), "prices.json"))
    assert known["a"].price == Price.of_dollars(1, 2)
    assert (known["a"].parameters, known["a"].description, known["b"].parameters) == (8.0, "small", None)
    text = '{"query": "12345678", "scores": {"a": 1, "b": 1}, "tokens": {"a": [100, 10]}, "cost": {}}\n' + GOOD.replace(
        "}}", '}, "cost": {"a": 7}}'
    )
    data = load_outcomes(written(tmp_path, text), prices=known)
    # a: recorded tokens; b: 8 bytes are 2 tokens, and 512 of answer; a recorded cost stays
    np.testing.assert_allclose(data.cost_NM[0], [(100 * 1 + 10 * 2) / 1e6, (2 * 0.5 + 512 * 4) / 1e6])
    assert data.cost_NM[1, 0] == 7
    with pytest.raises(DataError, match="the model 'b', which the price file does not know: a"):
        load_outcomes(written(tmp_path, GOOD), prices={"a": known["a"]})


def test_prices_in_toml_and_a_pool_of_what_is_known(tmp_path):
    text = (
        '[a]\ninput = 1\noutput = 2\nparameters = 46.7\ncontext = 4096\n["b/c"]\ninput = 0\noutput = 0\nsize = "8x7B"\n'
    )
    known = read_prices(written(tmp_path, text, "prices.toml"))
    pool = pool_of(("b/c", "new", "a"), known)
    assert [(model.name, model.parameters, model.context) for model in pool.models] == [
        ("b/c", 56.0, None),
        ("new", None, None),
        ("a", 46.7, 4096),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no price file"),
        ("[]", "table of models"),
        ("{}", "table of models"),
        ('{"a": 3}', "'a' is 3"),
        ('{"a": {"input_price": 1}}', "output_price of 'a' is None"),
        ('{"a": {"input_price": -1, "output_price": 1}}', "is -1"),
        ('{"a": {"input_price": "1", "output_price": 1}}', "input_price of 'a' is '1'"),
        ('{"a": {"input_price": NaN, "output_price": 1}}', "is nan"),
        ('{"a": {"input_price": true, "output_price": 1}}', "is True"),
    ],
)
def test_bad_price_files(tmp_path, content, message):
    with pytest.raises(DataError, match=r"prices\.json") as error:
        read_prices(written(tmp_path, content, "prices.json"))
    assert message in str(error.value)


def test_budgets_of_other_things_than_money(tmp_path):
    row = {
        "query": "q",
        "scores": {"a": 1, "b": 0},
        "cost": {"a": 1, "b": 2},
        "tokens": {"a": [10, 5], "b": [20, 1]},
        "latency": {"a": 3, "b": 4},
    }
    data = load_outcomes(written(tmp_path, json.dumps(row)))
    joules = read_joules(
        written(tmp_path, '{"a": {"joules_per_token": 2}, "b": {"joules_per_token": 0.5}, "c": {}}', "prices.json")
    )
    assert measured_in(data, "dollars") is data
    np.testing.assert_array_equal(measured_in(data, "seconds").cost_NM, [[3, 4]])
    np.testing.assert_array_equal(measured_in(data, "tokens").cost_NM, [[15, 21]])
    np.testing.assert_array_equal(measured_in(data, "joules", joules).cost_NM, [[30, 10.5]])
    for known in (None, {"a": 1.0}):
        with pytest.raises(InputError, match="needs those of a token for every model"):
            measured_in(data, "joules", known)
    bare = load_outcomes(written(tmp_path, GOOD))
    with pytest.raises(InputError, match="no latency"):
        measured_in(bare, "seconds")
    with pytest.raises(InputError, match="no token counts"):
        measured_in(bare, "tokens")
    with pytest.raises(DataError, match="joules_per_token of 'a' is 0"):
        read_joules(written(tmp_path, '{"a": {"joules_per_token": 0}}', "prices.json"))


def test_copies_are_found_whatever_their_case_and_white_space():
    data = of(["What is it?", "what  IS it?", "+++", "---", "else"])
    np.testing.assert_array_equal(groups(data), [0, 0, 1, 2, 3])
    assert deduplicated(data).query == ("What is it?", "+++", "---", "else")
    np.testing.assert_array_equal(deduplicated(data).score_NM, [[0], [2], [3], [4]])


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("xyz")), min_size=12, max_size=60),
    st.integers(0, 5),
    st.sampled_from([(0.8, 0.2), (0.7, 0.1, 0.2), (0.5, 0.5)]),
)
def test_a_split_keeps_copies_together_and_loses_nothing(rows, seed, fractions):
    data = of([f"question {number}" for number, _ in rows], [task for _, task in rows])
    num = len(set(data.query))
    if num < 12:
        return
    parts = split(data, fractions, seed=seed)
    assert sorted(score for part in parts for score in part.score_NM[:, 0]) == list(range(len(rows)))
    questions = [{question(text) for text in part.query} for part in parts]
    assert sum(map(len, questions)) == len(set().union(*questions)) == num
    for share, found in zip(fractions, questions, strict=True):
        assert abs(len(found) - share * num) <= 1
    again = split(data, fractions, seed=seed)
    assert [part.query for part in again] == [part.query for part in parts]


def test_every_task_is_split_in_the_same_shares_and_seeds_differ():
    data = of([f"q {row}" for row in range(200)], ["few" if row < 20 else "many" for row in range(200)])
    train, validation, test = split(data, (0.7, 0.1, 0.2), seed=3)
    assert [part.task.count("few") for part in (train, validation, test)] == [14, 2, 4]
    assert [len(part) for part in (train, validation, test)] == [140, 20, 40]
    assert split(data, (0.7, 0.1, 0.2), seed=4)[2].query != test.query


def test_tasks_of_one_question_still_fill_every_part():
    parts = split(of([f"q {row}" for row in range(100)], [str(row) for row in range(100)]), (0.7, 0.1, 0.2), seed=0)
    assert [len(part) for part in parts] == [70, 10, 20]


def test_folds_test_every_row_once():
    data = of([f"q {row % 40}" for row in range(50)])
    found = folds(data, 5, seed=1)
    assert sorted(score for _, test in found for score in test.score_NM[:, 0]) == list(range(50))
    for train, test in found:
        check_disjoint(train, test)
        assert len(train) + len(test) == 50


def test_splits_that_cannot_be():
    data = of(["a", "b", "c"])
    for fractions in ((0.5, 0.6), (1.0, 0.0), (0.5, 0.4)):
        with pytest.raises(InputError, match="fractions"):
            split(data, fractions, seed=0)
    with pytest.raises(InputError, match="too few to split"):
        split(of(["a"]), seed=0)
    with pytest.raises(InputError, match="at least 2"):
        folds(data, 1, seed=0)
    with pytest.raises(InputError, match="too few for 4 folds"):
        folds(data, 4, seed=0)


def test_a_leak_is_told_with_its_first_question():
    with pytest.raises(DataError, match=r"1 of 2 test questions were learned from.*'A b'"):
        check_disjoint(of(["a b", "c"]), of(["d", "A  b"]))
    check_disjoint(of(["a b"]), of(["b a", "a + b", "a b!"]))


def test_parts_are_merged_by_model(tmp_path):
    first, second = of(["a", "b"], models=("m", "n")), of(["c"], models=("n", "m"))
    found = merged([first, second])
    assert found.query == ("a", "b", "c")
    np.testing.assert_array_equal(found.score_NM, [[0, 1], [2, 3], [1, 0]])
    with pytest.raises(InputError, match="no model 'n'"):
        merged([first, of(["c"], models=("m",))])


def test_the_ledger_is_a_log_of_one_answer_per_query():
    rows = [
        {
            "query": "a",
            "model": "m",
            "score": 1,
            "cost_nano": 2_000_000,
            "prompt_tokens": 7,
            "completion_tokens": 9,
            "latency_us": 1_500_000,
        },
        {"query": "b", "model": "n", "score": 0.5, "task": "t", "cost_nano": 0, "probability": 0.25},
        {"query": "", "model": "n", "score": 1.0},
        {"query": "no feedback", "model": "n", "score": None},
    ]
    data = from_ledger(rows)
    assert (data.query, data.models, data.task) == (("a", "b"), ("m", "n"), (None, "t"))
    np.testing.assert_array_equal(data.score_NM, [[1, np.nan], [np.nan, 0.5]])
    np.testing.assert_array_equal(data.cost_NM, [[0.002, np.nan], [np.nan, 0]])
    np.testing.assert_array_equal(data.tokens_NM2[0, 0], [7, 9])
    assert data.latency_NM[0, 0] == 1.5
    np.testing.assert_array_equal(data.signals["probability"], [[np.nan, np.nan], [np.nan, 0.25]])
    with pytest.raises(DataError, match="no request with both its text and a score"):
        from_ledger(rows[2:])


def test_outcomes_of_conversations_take_no_place_in_a_log():
    def row(query, score, is_conversation):
        return Row(query, None, {"score": {"m": score}}, is_conversation=is_conversation)

    scored = [
        {"query": "a", "model": "m", "score": 1.0},
        {"query": "b", "model": "m", "score": 0.75},
        {"query": "b", "model": "m", "score": 0.5, "is_conversation": True},
    ]
    data = from_ledger(scored, [row("A ", 0.0, True), row("B", 0.25, False), row("c", 0.0, True)])
    assert list(zip(data.query, data.score_NM[:, 0], strict=True)) == [("a", 1.0), ("b", 0.5), ("B", 0.25)]
    with pytest.raises(
        DataError, match=r"nobody has scored .*\. Outcomes of conversations that are left out: 1; .* collect"
    ):
        from_ledger([], [row("a", 1.0, True)])


def test_a_conversation_of_a_file_is_learned_from_where_its_last_text_is_not_asked_alone(tmp_path):
    talk = [{"role": "system", "content": "say banana"}, {"role": "user", "content": "q"}]
    rows = [
        {"query": "Q ", "scores": {"a": 0}, "messages": talk},
        {"query": "q", "scores": {"a": 1}},
        {"query": "r", "scores": {"a": 0.5}, "messages": [{"role": "user", "content": "r"}]},
        {"query": "yes", "scores": {"a": 0.25}, "messages": talk},
        {"query": "yes", "scores": {"a": 0.75}, "messages": ["anything"]},
        {"query": "s", "scores": {"a": 0.5}, "messages": None},
    ]
    data = load_outcomes(written(tmp_path, "\n".join(map(json.dumps, rows))))
    assert data.query == ("q", "r", "yes", "yes", "s")
    assert data.score_NM[:, 0].tolist() == [1, 0.5, 0.25, 0.75, 0.5]


def test_a_question_of_a_log_is_all_its_answers_together():
    nan = np.nan
    log = Recorded(
        query=("Ask!", "other", "ask!", "ASK! "),
        models=("m", "n"),
        task=("t", None, "u", "t"),
        score_NM=np.array([[1, nan], [nan, 0.5], [nan, 0.25], [0.5, nan]]),
        cost_NM=np.array([[2, nan], [nan, 1], [nan, nan], [4, nan]]),
        answers=({"m": "one"}, {"n": "x"}, {"n": "two"}, {"m": "three"}),
        signals={"probability": np.full((4, 2), 0.5)},
    )
    found = pooled(log)
    assert (found.query, found.task) == (("Ask!", "other"), ("t", None))
    np.testing.assert_array_equal(found.score_NM, [[0.75, 0.25], [nan, 0.5]])
    np.testing.assert_array_equal(found.cost_NM, [[3, nan], [nan, 1]])
    assert found.answers == ({"m": "one", "n": "two"}, {"n": "x"})
    assert not found.signals
    assert pooled(found).score_NM.tobytes() == found.score_NM.tobytes()


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_a_store_is_read_while_it_is_there(tmp_path, monkeypatch, page):
    monkeypatch.setattr(store_outcomes, "PAGE", page)
    from anabranch.gateway.store.opening import open_store
    from anabranch.gateway.store.records import GLOBAL, LedgerRow

    async def serve():
        async with open_store(str(tmp_path / "gateway.db")) as store:
            for number, text in enumerate(("one", "two", "three")):
                held = await store.reserve(f"r{number}", (GLOBAL,), 10_000)
                store.append_decision(
                    f"r{number}", "knn", "small", {"query": text, "probability": 0.5} if number < 2 else {}
                )
                await store.settle(
                    held,
                    LedgerRow(
                        request_id=f"r{number}", model="small", cost_nano=5_000, prompt_tokens=3, latency_us=2_000_000
                    ),
                )
            await store.feedback("r0", 1.0)
            await store.feedback("r0", 0.5)
            await store.feedback("r2", 1.0)  # its text was not kept

    asyncio.run(serve())
    data = load_outcomes(tmp_path / "gateway.db")
    assert (data.query, data.models) == (("one",), ("small",))
    np.testing.assert_array_equal(data.score_NM, [[0.5]])  # the last word
    np.testing.assert_array_equal(data.cost_NM, [[5e-6]])
    np.testing.assert_array_equal(data.latency_NM, [[2.0]])
    np.testing.assert_array_equal(data.signals["probability"], [[0.5]])
    with pytest.raises(DataError, match="no such file"):
        load_outcomes(tmp_path / "none.db")


def test_words_among_which_one_could_be_a_number_are_words(tmp_path):
    text = "prompt,small,large,note\nhi,1,0,fine\nho,0,1,0x1\nhu,1,1,see 1/2\nha,1,1,1/2\n"
    data = load_csv(written(tmp_path, text, "a.csv"))
    assert (data.models, data.reading.left_out) == (("small", "large"), {"note": "no numbers"})
    # Where most are, the column is meant to hold numbers.
    with pytest.raises(DataError, match=r"line 2: score of 'small' \(column 'small'\) is '1/2'"):
        load_csv(written(tmp_path, "prompt,small,large\nhi,1/2,0\nho,3/4,1\nhu,x,1\n", "b.csv"))


def test_several_answers_of_a_question_have_their_mean_as_score_and_are_kept(tmp_path):
    rows = [
        {"query": "q", "task": "t", "scores": {"small": [0, True, 1, 0], "large": 1}},
        {"question": "r", "samples": [False, 1], "model": "small"},
        {"question": "s", "query": "S", "samples": [0.5]},
    ]
    data = load_outcomes(written(tmp_path, "\n".join(map(json.dumps, rows))))
    assert data.models == ("small", "large", "model")
    assert data.query == ("q", "r", "S")
    np.testing.assert_array_equal(data.score_NM, [[0.5, 1, np.nan], [0.5, np.nan, np.nan], [np.nan, np.nan, 0.5]])
    assert data.samples == ({"small": (0, 1, 1, 0)}, {"small": (0, 1)}, {"model": (0.5,)})
    assert [data.samples_of(0, column) for column in range(3)] == [(0, 1, 1, 0), (1,), ()]
    assert data.take([1]).samples == ({"small": (0, 1)},)
    # What one field says another way means nothing, and is named.
    assert data.reading.left_out == {"question": "another field of the row says it"}


def test_rows_that_ask_the_same_are_samples_of_one_question(tmp_path):
    rows = [
        {"query": "q", "scores": {"a": 1}},
        {"query": "Q ", "scores": {"a": [0, 0], "b": 1}},
        {"query": "r", "scores": {"a": 0}},
    ]
    data = pooled(load_outcomes(written(tmp_path, "\n".join(map(json.dumps, rows)))))
    assert data.samples == ({"a": (1, 0, 0), "b": (1,)}, {"a": (0,)})
    # Of three answers, whatever rows they stood in.
    np.testing.assert_array_equal(data.score_NM, [[1 / 3, 1], [0, np.nan]])
    alone = pooled(load_outcomes(written(tmp_path, GOOD)))
    assert alone.samples == ()
