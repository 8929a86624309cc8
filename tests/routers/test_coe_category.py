import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.routers.coe import CategoryRouter
from anabranch.routers.coe.calibration import best_temperature, calibration_error
from anabranch.routers.coe.category import label_by_neighbours, stratified_folds
from anabranch.routers.coe.heads import LogisticHead, MlpHead, cross_entropy, softmax
from anabranch.routers.embed import Embedder

HEADS = ("knn", "logreg", "mlp")


def unit(vector_ND):
    vector_ND = np.asarray(vector_ND, np.float32)
    return vector_ND / np.linalg.norm(vector_ND, axis=-1, keepdims=True)


def clouds(num_rows, *, categories=4, dim=16, spread=0.3, seed=0, centres=0):
    """Unit vectors around random centres, and the name of each one's centre."""
    centre_CD = unit(np.random.default_rng(centres).normal(size=(categories, dim)))
    generator = np.random.default_rng(seed)
    class_N = generator.integers(0, categories, num_rows)
    vector_ND = unit(centre_CD[class_N] + generator.normal(0, spread, (num_rows, dim)))
    return vector_ND, [f"c{at}" for at in class_N]


class Words(Embedder):
    """Counts three words."""

    words = ("sum", "poem", "code")

    def __init__(self):
        super().__init__(None)

    @property
    def dim(self):
        return 3

    def embed(self, texts):
        count_ND = np.array([[text.split().count(word) for word in self.words] for text in texts], np.float32)
        length_N1 = np.linalg.norm(count_ND, axis=1, keepdims=True)
        return np.divide(count_ND, length_N1, out=count_ND, where=length_N1 > 0)


# By hand


def test_votes_by_hand():
    """Of the 3 nearest to (1, 0) two are of a and one of b: log of (2 + 1/2) / 4 and (1 + 1/2) / 4."""
    example_ED = unit([[1, 0], [1, 0.1], [1, 0.2], [0, 1], [-1, 0]])
    router = CategoryRouter(head="knn", k=3).fit(example_ED, ["a", "b", "a", "b", "b"], folds=0)
    found = router.predict(np.array([[1.0, 0.0]], np.float32))
    assert found.category == ("a",)
    np.testing.assert_allclose(found.distribution_NC, [[2.5 / 4, 1.5 / 4]], atol=1e-5)
    np.testing.assert_allclose(found.confidence_N, [2.5 / 4], atol=1e-5)


def test_equal_votes_go_by_similarity():
    router = CategoryRouter(head="knn", k=2).fit(unit([[1, 0], [1, 1]]), ["z", "a"], folds=0)
    assert router.predict(unit([[1, 0.1], [1, 0.9]])).category == ("z", "a")


def test_entropy_and_similarity_by_hand():
    example_ED = unit([[1, 0], [0, 1], [-1, 0], [0, -1]])
    even = CategoryRouter(head="knn", k=4, uncertainty="entropy").fit(example_ED, list("abcd"), folds=0)
    np.testing.assert_allclose(even.predict(unit([[1, 0]])).confidence_N, [0.0], atol=1e-5)  # one vote each
    near = CategoryRouter(head="knn", k=2, uncertainty="similarity").fit(example_ED, list("abcd"), folds=0)
    np.testing.assert_allclose(near.predict(unit([[1, 0]])).confidence_N, [0.5], atol=1e-6)  # (1 + 0) / 2
    alone = CategoryRouter(head="logreg", uncertainty="entropy").fit(example_ED[:1], ["a"])
    assert alone.predict(example_ED).confidence_N.tolist() == [1.0] * 4


def test_calibration_error_by_hand():
    """Bins of a fifteenth: .9 and .9 (one right: gap |.5 - .9|), .6 (right: gap .4)."""
    distribution_NC = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    assert calibration_error(distribution_NC, np.array([0, 1, 0])) == pytest.approx((2 * 0.4 + 0.4) / 3)


def test_who_is_quite_sure_is_of_the_last_bin():
    """1 and .95, of which the second is right: gaps of -1 and .05 in one bin."""
    distribution_NC = np.array([[1.0, 0.0], [0.95, 0.05]])
    assert calibration_error(distribution_NC, np.array([1, 0])) == pytest.approx(0.95 / 2)


def test_temperature_finds_the_factor_logits_were_scaled_by():
    generator = np.random.default_rng(0)
    logit_NC = generator.normal(0, 2, (20_000, 3))
    class_N = (logit_NC + generator.gumbel(size=logit_NC.shape)).argmax(axis=1)  # drawn from their softmax
    assert best_temperature(logit_NC, class_N) == pytest.approx(1.0, abs=0.05)
    assert best_temperature(logit_NC * 3, class_N) == pytest.approx(3.0, abs=0.15)


def test_report_by_hand():
    router = CategoryRouter(head="knn", k=1).fit(unit([[1, 0], [0, 1]]), ["a", "b"], folds=0)
    report = router.report(unit([[1, 0.1], [1, 0.2], [0.1, 1], [1, 0.3]]), ["a", "a", "a", "b"])
    assert report.confusion_CC.tolist() == [[2, 1], [1, 0]]
    assert report.of_category["a"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "count": 3})
    assert report.of_category["b"] == pytest.approx({"precision": 0, "recall": 0, "f1": 0, "count": 1})
    assert report.accuracy == 0.5


def test_folds_spread_every_class():
    class_N = np.array([0] * 10 + [1] * 5 + [2])
    fold_N = stratified_folds(class_N, 5, seed=0)
    assert np.bincount(fold_N[:10]).tolist() == [2] * 5
    assert sorted(fold_N[10:15]) == [0, 1, 2, 3, 4]
    assert (fold_N != stratified_folds(class_N, 5, seed=1)).any()


# Heads


@pytest.mark.parametrize("head", HEADS)
def test_heads_tell_clouds_apart(head):
    train_ND, labels = clouds(300)
    test_ND, truth = clouds(200, seed=1)
    router = CategoryRouter(head=head, k=8, hidden=16).fit(train_ND, labels)
    centre_CD = unit([train_ND[[label == name for label in labels]].mean(0) for name in router.categories])
    nearest_centre = [router.categories[at] for at in (test_ND @ centre_CD.T).argmax(1)]
    naive = np.mean([name == true for name, true in zip(nearest_centre, truth, strict=True)])
    report = router.report(test_ND, truth)
    assert report.accuracy >= naive - 0.05
    assert report.accuracy > 0.8
    assert 0 <= report.ece < 0.12


@pytest.mark.parametrize("head", [LogisticHead(2.0), MlpHead(2.0, 5)], ids=["logreg", "mlp"])
def test_learned_heads_stand_at_a_minimum(head):
    """No small step in any of 20 random directions lowers the loss that `heads` states, written out anew."""
    vector_ND, labels = clouds(80, dim=6)
    target_NC = np.eye(4)[[int(label[1]) for label in labels]]
    head.fit(vector_ND, target_NC, seed=0)
    names = [name for name in head.arrays if getattr(head, name).ndim == 2]

    def loss():
        logits = head.logits(vector_ND)
        nats = -(target_NC * np.log(softmax(logits))).sum()
        return nats + sum((getattr(head, name).astype(float) ** 2).sum() for name in names) / 4.0

    generator, least = np.random.default_rng(0), loss()
    for _ in range(20):
        kept = {name: getattr(head, name) for name in head.arrays}
        for name, value in kept.items():
            setattr(head, name, value + 0.05 * generator.normal(size=value.shape).astype(np.float32))
        assert loss() > least
        for name, value in kept.items():
            setattr(head, name, value)


def test_cross_entropy_gradient():
    generator = np.random.default_rng(0)
    logit_NC, target_NC = generator.normal(size=(3, 4)), softmax(generator.normal(size=(3, 4)))
    value, slope_NC = cross_entropy(logit_NC, target_NC)
    assert value == pytest.approx(-(target_NC * np.log(softmax(logit_NC))).sum())
    for row, column in np.ndindex(3, 4):
        moved = logit_NC.copy()
        moved[row, column] += 1e-6
        assert (cross_entropy(moved, target_NC)[0] - value) / 1e-6 == pytest.approx(slope_NC[row, column], abs=1e-5)


# Unknown labels, more examples


def test_few_seeds_label_the_rest():
    vector_ND, truth = clouds(300, spread=0.2)
    given = [label if row < 24 else None for row, label in enumerate(truth)]
    filled = label_by_neighbours(vector_ND, given)
    sure = [row for row in range(24, 300) if filled[row] is not None]
    assert len(sure) > 150
    assert np.mean([filled[row] == truth[row] for row in sure]) > 0.97
    assert filled[:24] == truth[:24]
    few = CategoryRouter(head="knn", k=5).fit(vector_ND, given)
    assert len(few) == 24 + len(sure)


def test_neighbours_that_disagree_leave_the_label_open():
    """Between the seeds both sides count half, below 0.8; beside a seed one does."""
    seeds = unit([[1, 0], [1, 0.05], [0, 1], [0.05, 1]])
    rows = np.concatenate((seeds, unit([[1, 1], [1, 0.02]])))
    assert label_by_neighbours(rows, ["a", "a", "b", "b", None, None], neighbours=4) == ["a", "a", "b", "b", None, "a"]


@pytest.mark.parametrize("head", HEADS)
def test_added_examples_count_as_if_they_had_been_there(head):
    vector_ND, labels = clouds(120)
    labels[-20:] = ["new"] * 20
    whole = CategoryRouter(head=head, k=8, hidden=8).fit(vector_ND, labels)
    grown = CategoryRouter(head=head, k=8, hidden=8).fit(vector_ND[:100], labels[:100])
    temperature = grown.temperature
    grown.add_examples(vector_ND[100:], labels[100:])
    assert grown.temperature == temperature
    assert grown.categories == whole.categories
    grown.temperature = whole.temperature
    np.testing.assert_allclose(grown.distribution(vector_ND), whole.distribution(vector_ND), rtol=1e-6)
    first = CategoryRouter(head="knn", k=8).add_examples(vector_ND, labels)  # from nothing
    assert first.categories == whole.categories


# Abstention


@pytest.mark.parametrize("head", ["knn", "logreg"])
def test_abstention_rate_holds_on_held_out_data(head):
    train_ND, labels = clouds(3000, spread=0.45)
    held_ND, truth = clouds(4000, spread=0.45, seed=1)
    router = CategoryRouter(head=head, k=16).fit(train_ND, labels)
    for router.uncertainty in ("probability", "entropy", "similarity"):
        for rate in (0.05, 0.15, 0.3):
            found = router.abstain(rate).predict(held_ND).abstained_N.mean()
            assert found == pytest.approx(rate, abs=0.02)  # the sd, of quantile and share together, is about 0.01
    assert router.report(held_ND, truth).abstained == pytest.approx(found)


def test_abstention_goes_to_the_general_category():
    train_ND, labels = clouds(400)
    router = CategoryRouter(head="logreg", general="everything else").fit(train_ND, labels)
    assert "everything else" not in router.predict(train_ND).category
    router.abstain(0.5, train_ND)
    assert router.predict(train_ND).category.count("everything else") == pytest.approx(200, abs=2)
    router.abstain(0)
    assert "everything else" not in router.predict(train_ND).category


# Texts, storage


def test_texts_and_empty_ones():
    router = CategoryRouter(Words(), head="knn", k=1).fit(
        ["sum sum", "a poem", "code"], ["maths", "arts", "code"], folds=0
    )
    found = router.predict(["poem poem", "", "sum", "nothing known"])
    assert found.category == ("arts", "general", "maths", "general")
    assert found.confidence_N[1] == 0


@pytest.mark.parametrize("head", HEADS)
def test_state_reads_back_to_the_bit(head):
    vector_ND, labels = clouds(100)
    router = CategoryRouter(head=head, k=8, hidden=8).fit(vector_ND, labels).abstain(0.1)
    twin = CategoryRouter(head=head, k=8, hidden=8)
    twin.load_state(*router.state())
    for mine, theirs in zip(router.predict(vector_ND), twin.predict(vector_ND), strict=True):
        assert np.array_equal(mine, theirs)


def test_same_seed_same_router():
    vector_ND, labels = clouds(100)
    first, second = (CategoryRouter(head="mlp", hidden=8, seed=3).fit(vector_ND, labels) for _ in range(2))
    assert np.array_equal(first.distribution(vector_ND), second.distribution(vector_ND))


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.predict(np.ones((1, 5), np.float32)), "vectors have 5 dimensions; those it learned from have 16"),
        (lambda r: r.classify(np.ones((1, 5), np.float32)), "vectors have 5 dimensions"),
        (lambda r: r.predict(np.ones(16, np.float32)), r"shape \[16\]; they must be \[rows, dimensions\]"),
        (lambda r: r.predict(np.full((2, 16), np.nan)), "vector 0 has a number that is not finite"),
        (lambda r: r.predict(["text"]), "texts need an embedder"),
        (lambda r: r.fit(np.zeros((2, 16), np.float32), ["a", "b"]), "row 0 is an empty text"),
        (lambda r: r.fit(np.ones((2, 16), np.float32), ["a"]), "1 labels for 2 rows"),
        (lambda r: r.fit(np.ones((2, 16), np.float32), [None, None]), "no row has a category"),
        (lambda r: r.report(np.ones((1, 16), np.float32), ["law"]), "no category 'law' was learned; known: c0"),
        (lambda r: r.abstain(1.0), "target_rate is 1.0"),
        (lambda r: r.cross_predict(folds=1), "folds is 1"),
        (lambda r: CategoryRouter().predict(np.ones((1, 16), np.float32)), "has not learned yet"),
        (lambda r: CategoryRouter(head="svm"), "head is 'svm'"),
        (lambda r: CategoryRouter(k=0), "k is 0"),
    ],
)
def test_what_may_not_be(call, message):
    vector_ND, labels = clouds(40)
    router = CategoryRouter(head="knn").fit(vector_ND, labels)
    with pytest.raises(InputError, match=message):
        call(router)
