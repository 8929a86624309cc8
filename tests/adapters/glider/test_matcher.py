"""Instructions to experts: cosines, caches, calibration, neighbours, texts that nobody can match."""

import json
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from anabranch.adapters.glider import Matcher, TextFeatures
from anabranch.adapters.glider.calibration import calibrate, thinned
from anabranch.adapters.glider.embed import Stack, embedded, is_zero
from anabranch.errors import ConfigError
from anabranch.routers.embed import Embedder
from anabranch.routers.embed.hashed import Hashed
from waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[3]
TEXTS = {
    "sql": ("Write a SQL query that answers a question about a table.", "Turn a question on a table into SQL."),
    "law": ("Name the law that a legal case falls under.",),
    "sum": ("Summarise a news article in one sentence.", "Write a summary, a single sentence, of the article."),
    "none": (),
}


def matcher(texts=TEXTS, **options):
    made = Matcher(**options)
    for name, own in texts.items():
        made.add(name, own)
    return made


def table(vectors):
    """An embedder that knows these texts."""
    return lambda texts: np.array([vectors[text] for text in texts], np.float64)


PLANE = {"a": [1, 0], "b": [0, 1], "c": [0.6, 0.8], "q": [0.8, 0.6], "zero": [0, 0], "wide": [1, 0, 0]}


def plane(scale=1.0, names="ab", **options):
    vectors = {name: [scale * part for part in vector] for name, vector in PLANE.items() if name != "wide"}
    return matcher({name: (name,) for name in names}, embedder=table(vectors), **options)


def test_cosines_by_hand_and_whatever_the_lengths():
    assert plane().cosines("q") == pytest.approx({"a": 0.8, "b": 0.6})
    assert plane(37.0).cosines("q") == pytest.approx({"a": 0.8, "b": 0.6})
    assert [one.name for one in plane(names="abc").retrieve("q", 9)] == ["c", "a", "b"]
    assert plane(names="abc").retrieve("q", 1)[0].cosine == pytest.approx(0.96)


def test_an_expert_without_an_instruction_scores_0():
    found = matcher().cosines("a SQL query")
    assert list(found) == list(TEXTS)
    assert found["none"] == 0 < found["sql"]
    assert "none" not in [one.name for one in matcher().retrieve("a SQL query", 9)]


def test_a_vector_of_length_0_scores_0_and_warns():
    with pytest.warns(UserWarning, match="the instruction of 'zero' has a vector of length 0"):
        made = plane(names=["a", "zero"])
    assert made.cosines("q") == pytest.approx({"a": 0.8, "zero": 0.0})
    with pytest.warns(UserWarning, match="all global scores are 0"):
        assert made.cosines("zero") == {"a": 0.0, "zero": 0.0}
    # No query finds it, and it is no task that a query could be of.
    assert made.members()[0] == ["a"]
    assert [one.name for one in made.retrieve("q", 9)] == ["a"]
    with pytest.raises(ConfigError, match="1 of the pool have an instruction"):
        made.calibration()


@pytest.mark.filterwarnings("ignore:the instruction of")
def test_a_vector_of_length_0_moves_no_threshold():
    vectors = {"a": [1, 0], "a again": [0.8, 0.6], "b": [0, 1], "b again": [0.6, 0.8], "zero": [0, 0], "q": [1, 1]}
    texts = {"a": ("a", "a again"), "b": ("b", "b again")}
    without = matcher(texts, embedder=table(vectors)).calibration()
    for more in ({"zero": ("zero", "q")}, {"zero": ("zero",)}):
        assert matcher(more | texts, embedder=table(vectors)).calibration() == without
    worded = {"a": ("a", "a again", "zero"), "b": ("b", "b again")}
    assert matcher(worded, embedder=table(vectors)).calibration() == without


@pytest.mark.filterwarnings("ignore:the instruction of")
@pytest.mark.parametrize("is_late", [False, True])
def test_vectors_of_length_0_never_reach_the_graph(is_late):
    rng = np.random.default_rng(0)
    vectors = {f"t{number}": rng.normal(size=8) for number in range(30)} | {"zero": np.zeros(8)}
    first = [*vectors][:5] + ([] if is_late else ["zero"]) + [*vectors][5:29]
    made = matcher({name: (name,) for name in first}, embedder=table(vectors), many=20)
    assert made.retrieve("t20", 1)[0].name == "t20"
    graph = made._index
    if is_late:
        made.add("zero", ("zero",))
    made.add("t29", ("t29",))
    assert made._index is graph is not None
    for name in ("t3", "t20", "t29"):
        assert [one.name for one in made.retrieve(name, 3)] == [one.name for one in made.retrieve(name, 3, exact=True)]
        assert made.retrieve(name, 1)[0].name == name
    assert [(one.name, one.cosine) for one in made.retrieve("zero", 2)] == [("t0", 0.0), ("t1", 0.0)]


def test_an_expert_told_anew_stays_where_it_was():
    rng = np.random.default_rng(1)
    vectors = {f"t{number}": rng.normal(size=8) for number in range(30)}
    made = matcher({name: (name,) for name in [*vectors][:29]}, embedder=table(vectors), many=20)
    assert made.retrieve("t3", 1)[0].name == "t3"
    made.add("t3", ("t29",))
    assert made.retrieve("t29", 1)[0].name == "t3"
    assert made.retrieve("t20", 1)[0].name == "t20"


def test_coming_and_going_changes_no_other_vector():
    made = matcher()
    made.fit()
    before = dict(made.vectors)

    def kept(*names):
        pairs = [(made.vectors[name], before[name]) for name in names]
        return all(
            np.array_equal(now.id_F, then.id_F) and np.array_equal(now.weight_F, then.weight_F) for now, then in pairs
        )

    made.add("new", ("Translate a question into French.",))
    assert kept("sql", "law", "sum")
    made.remove("law")
    assert kept("sql", "sum")
    assert "law" not in made.cosines("law")
    made.remove("new")
    again = matcher({name: texts for name, texts in TEXTS.items() if name != "law"}, embedder=made.embedder)
    assert made.cosines("a table") == again.cosines("a table")


def test_an_instruction_is_written_once_for_a_query():
    asked = []

    def writer(query):
        asked.append(query)
        return "a" if "x" in query else "b"

    made = plane(writer=writer, cached=2)
    for query in ("x", "y", "x", "x"):
        assert made.cosines(query)["a"] == (query == "x")
    assert asked == ["x", "y"]
    # What is told is not written; the one that was not used for longest is forgotten.
    assert made.cosines("x", "b")["b"] == 1
    assert asked == ["x", "y"]
    made.cosines("y")
    assert asked == ["x", "y", "y"]


@pytest.mark.parametrize("error", [ConfigError("it is away"), KeyboardInterrupt()])
def test_who_waits_for_what_another_asks_is_told_that_it_failed(error):
    """And does not wait for ever; whoever comes then asks anew."""
    asked, goes_on, owns = queue.Queue(), threading.Event(), []

    class UnderWay(dict):
        """Looked at by whoever asks, the first and who waits for it."""

        def get(self, key):
            asked.put(key)
            return super().get(key)

        def __setitem__(self, key, own):
            owns.append(own)
            super().__setitem__(key, own)

    def writer(query):
        assert goes_on.wait(PATIENCE_S)
        raise error

    made = plane(writer=writer)
    made._under_way = UnderWay()
    threads = ThreadPoolExecutor(2)
    try:
        found = []
        for _ in range(2):
            found.append(threads.submit(made.instruct, "q"))
            asked.get(timeout=PATIENCE_S)
        goes_on.set()
        assert [one.exception(timeout=PATIENCE_S) for one in found] == [error, error]
        made.writer = None
        assert made.instruct("q")[0] == "q"
    finally:
        # Who waits for ever is told, so that this ends.
        for own in owns:
            own.cancel()
        threads.shutdown()


def test_weights_of_rare_words_count_more():
    made = matcher({"one": ("the task sql",), "two": ("the task law",), "three": ("the task",)})
    before = made.cosines("task sql")
    made.fit()
    after = made.cosines("task sql")
    assert after["one"] > before["one"]
    assert after["three"] < before["three"]
    # An embedder that learns nothing stays.
    plane().fit()


def test_other_embedders_are_taken():
    assert matcher(embedder=Hashed.Config(dim=256).build()).retrieve("the law of a case")[0].name == "law"
    assert isinstance(Hashed.Config().build(), Embedder)


@pytest.mark.parametrize(
    ("embedder", "message"),
    [
        (table(PLANE | {"b": [0, 1, 0]}), "gave vectors of 3 numbers, and those of the pool have 2"),
        (lambda texts: [1.0], r"gave shape \[1\] for 1 texts"),
        (lambda texts: [[float("nan")]], "numbers that are not finite"),
        (lambda texts: ["x"], "no array of numbers"),
        (lambda texts: np.zeros((2, 4)), r"it must be \[1, dimensions\]"),
    ],
)
def test_an_embedder_that_gives_something_else_is_told(embedder, message):
    with pytest.raises(ConfigError, match=message):
        matcher({"a": ("a",), "b": ("b",)}, embedder=embedder)


def test_k_and_writers_are_checked():
    with pytest.raises(ConfigError, match="k is 0; it must be at least 1"):
        matcher().retrieve("x", 0)
    with pytest.raises(ConfigError, match="the writer gave a NoneType"):
        plane(writer=lambda query: None).cosines("x")
    assert matcher({"none": ()}).retrieve("x") == []


@pytest.mark.slow
def test_a_graph_finds_what_all_products_find():
    rng = np.random.default_rng(0)
    vectors = {f"t{number}": rng.normal(size=16) for number in range(150)}
    made = matcher({name: (name,) for name in vectors}, embedder=table(vectors), many=100)
    agree = [
        made.retrieve(f"t{number}", 1, exact=True)[0].name == made.retrieve(f"t{number}", 1)[0].name == f"t{number}"
        for number in range(0, 150, 10)
    ]
    assert all(agree)
    graph = made._index
    made.add("none", ())
    made.add("late", ("t7",))
    assert made._index is graph is not None
    assert {one.name for one in made.retrieve("t7", 2)} == {"t7", "late"}
    made.remove("t7")
    assert made._index is None
    assert made.retrieve("t7")[0].name == "late"


# Calibration


def test_the_threshold_by_hand():
    worded = {0: np.array([[0.9, 0.1, 0.0]]), 1: np.array([[0.0, 0.7, 0.3]]), 2: np.array([[0.2, 0.0, 0.5]])}
    found = calibrate(dict(enumerate(np.eye(3))), worded, own=[0, 2])
    # Best cosines of what is there: 0.9, 0.7, 0.5; of what was left out: 0, 0.1, 0, 0.3, 0, 0.2.
    assert found.threshold == pytest.approx((0.5 + 0.3) / 2)
    assert (found.auroc, found.top_1, found.worded, found.members) == (1, 1, 2, 3)
    assert found.curve[0] == pytest.approx((0.9, 1 / 3, 0))
    assert found.curve[3] == pytest.approx((0.3, 1, 1 / 6))
    assert found.curve[-1] == pytest.approx((0, 1, 1))
    assert json.loads(json.dumps(found.to_dict()))["members"] == 3


def test_what_overlaps_has_an_area_below_1():
    found = calibrate(dict(enumerate(np.eye(2))), {0: np.array([[0.6, 0.8]]), 1: np.array([[0.0, 0.7]])})
    # There: 0.8 and 0.7; left out: 0, 0.8, 0, 0.
    assert found.auroc == pytest.approx((3.5 + 3) / 2 / 4)
    assert found.top_1 == 0.5


def test_the_same_words_again_are_no_other_wording():
    """Nor where other spaces are between them: their cosine of 1 is of no other query."""
    asked = {"a": "say which law a case falls under", "b": "count rows of a table", "c": "end a line with a rhyme"}
    found = []
    for again in ((), ("{}",), ("{}", " {} ", "{}\n")):
        matcher = Matcher()
        for name, text in asked.items():
            matcher.add(name, [text, *(one.format(text) for one in again)])
        found.append(matcher.calibration())
    assert found[0] == found[1] == found[2]
    assert found[0].worded == 0


def test_calibration_needs_two_and_says_so():
    with pytest.raises(ConfigError, match="1 of the pool have an instruction; at least 2 must"):
        plane(names="a").calibration()
    made = matcher()
    made.fit()
    found = made.calibration()
    assert (found.worded, found.members) == (2, 3)
    assert made.calibration() is found
    made.remove("law")
    assert made.calibration().members == 2


def test_a_text_loses_every_second_word():
    assert thinned("a b c d e") == ("a c e", "b d")
    assert thinned("one") == ("one",)


def test_lengths_are_1_or_0():
    full, empty = embedded(TextFeatures(), ["sql table", "..."])
    assert np.linalg.norm(full.weight_F) == pytest.approx(1)
    assert (is_zero(full), is_zero(empty)) == (False, True)


def test_sparse_products_are_those_of_full_vectors():
    texts = [text for own in TEXTS.values() for text in own] + ["...", "a b a b c"]
    made = embedded(TextFeatures(TextFeatures.Config(shortest=1)), texts)
    ids = sorted({key for one in made for key in one.id_F.tolist()})
    full = np.zeros((len(made), len(ids)))
    for row, one in enumerate(made):
        full[row, [ids.index(key) for key in one.id_F.tolist()]] = one.weight_F
    for row, one in enumerate(made):
        assert Stack(made).cosines(one) == pytest.approx(full @ full[row], abs=1e-12)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_the_nearest_are_those_of_a_whole_sort(is_compiled, monkeypatch):
    """Of many texts of few words, so that many are equal: by the kernel, where there is one, and by NumPy."""
    if not is_compiled:
        monkeypatch.setattr("anabranch.nn.kernels.postings.load", lambda: None)
    random = np.random.default_rng(0)
    words = [f"word{number}" for number in range(12)]
    texts = [" ".join(random.choice(words, random.integers(1, 4))) for _ in range(300)]
    features = TextFeatures(TextFeatures.Config(pieces=0))
    features.fit(texts)
    stack = Stack(embedded(features, texts))
    for query in ("word3 word7", "word1", "word2 word2 elsewhere", "nothing of it"):
        (vector,) = embedded(features, [query])
        cosine_M = stack.cosines(vector)
        for k in (1, 2, 7, 299, 300):
            wanted = np.argsort(-cosine_M, kind="stable")[:k]
            row_K, cosine_K = stack.nearest(vector, k)
            assert row_K.tolist() == wanted.tolist()
            assert cosine_K.tolist() == cosine_M[wanted].tolist()
    assert not stack.cosines(vector).any()


def test_dense_vectors_have_the_nearest_of_a_whole_sort():
    vector_MD = np.random.default_rng(0).integers(-1, 2, (40, 3)).astype(np.float32)
    stack = Stack(list(vector_MD))
    cosine_M = vector_MD @ vector_MD[5]
    for k in (1, 4, 40):
        assert stack.nearest(vector_MD[5], k)[0].tolist() == np.argsort(-cosine_M, kind="stable")[:k].tolist()


def test_the_weight_of_a_feature_by_hand():
    features = TextFeatures(TextFeatures.Config(pairs=False, pieces=0))
    features.fit(["aa bb", "aa cc", "aa"])
    (found,) = features.embed(["aa bb bb dd e"])
    expected = [np.log(4 / 4) + 1, (1 + np.log(2)) * (np.log(4 / 2) + 1), np.log(4 / 1) + 1]
    assert sorted(np.abs(found.weight_F)) == pytest.approx(sorted(expected))


def test_the_figures_of_the_page_are_made_by_its_script(tmp_path, monkeypatch):
    """On two made tasks: the shares and the area by hand."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from glider_matching import FILES, measured

    first = {"sql": "write sql for a question", "law": "name the law of a case"}
    second = {"law": "which law of a case", "sql": "name a case"}
    for name, table_of in zip(FILES, (first, second, {"x": ["boil an egg", "write sql for a question"]}), strict=True):
        (tmp_path / name).write_text(json.dumps(table_of))
    found = measured(tmp_path)
    assert (found["tasks"], found["foreign"], found["top_1"], found["top_2"]) == (2, 2, 0.5, 1)
    # Both are above the egg, and below what is word for word the same.
    assert found["auroc"] == 0.5
    # Both tasks are known by a greater cosine than the other's instruction has, or by none: without its own each query has one left.
    matcher = Matcher()
    for task, text in first.items():
        matcher.add(task, (text,))
    matcher.fit()
    cosine = {task: matcher.cosines("", second[task]) for task in first}
    best = {task: max(of.values()) for task, of in cosine.items()}
    left = {task: min(value for name, value in cosine[task].items() if name != task) for task in first}
    above = [(best[one] > left[other]) + (best[one] >= left[other]) for one in first for other in first]
    assert found["left_out_auroc"] == pytest.approx(sum(above) / 8)
    assert found["own_cosine"] == pytest.approx((cosine["sql"]["sql"] + cosine["law"]["law"]) / 2)
    assert found["other_cosine"] == pytest.approx((cosine["sql"]["law"] + cosine["law"]["sql"]) / 2)
    assert (found["p3_tasks"], "p3_top_1" in found) == (0, False)
    with pytest.raises(SystemExit, match="has no flan_instruction"):
        measured(tmp_path / "none")


def test_of_a_long_query_as_much_is_compared_as_a_server_compares():
    asked = []
    matcher = Matcher(writer=lambda query: asked.append(query) or query)
    matcher.add("law", ["a matter of law"])
    long = "x " * 1000 + "a matter of law"
    assert matcher.cosines(long)["law"] == 0
    assert matcher.cosines(long[:2000])["law"] == 0
    assert asked == [long[:2000]]
    assert matcher.knows(long + " and more")
    assert matcher.cosines("", long)["law"] > 0
