"""Reports: facts agree with the measures, words with the facts, and the page stands on its own."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from anabranch.errors import DataError
from anabranch.report import cache_pictures, captions, explain, pictures, summarize, write_report
from anabranch.report.page import page
from anabranch.report.words import _balance
from anabranch.routing import TraceBuilder, TraceLayer, consistency, measure
from anabranch.routing.trace import concat


def made(
    num_layers=3,
    num_destinations=8,
    top_k=2,
    *,
    num_sequences=8,
    length=32,
    domains=("books", "code"),
    pool=1,
    skew=1.0,
    drop=0.0,
):
    """A trace drawn from Gumbel top-k, with expert and domain preferences of strength ``skew``."""
    generator = np.random.default_rng(0)
    builder = TraceBuilder()
    width = num_destinations * pool
    for number in range(num_layers):
        layer = TraceLayer(
            layer=number,
            name=f"blocks.{number}.router",
            num_destinations=width,
            top_k=top_k,
            pool=f"group{number // pool}" if pool > 1 else "",
            own_start=number % pool * num_destinations,
        )
        liking = skew * generator.normal(size=(max(1, len(domains)), width))
        for sequence in range(num_sequences):
            score_NE = liking[sequence % len(liking)] + generator.gumbel(size=(length, width))
            index_NK = np.argsort(-score_NE, 1)[:, :top_k]
            weight_NK = generator.random(index_NK.shape)
            dropped_NK = generator.random(index_NK.shape) < drop
            builder.add(
                layer,
                np.where(dropped_NK, -1, index_NK),
                np.where(dropped_NK, 0, weight_NK),
                item_N=np.full(length, sequence),
                position_N=np.arange(length),
                token_N=generator.integers(0, 5, length),
                domain=domains[sequence % len(liking)] if domains else None,
            )
    return builder.trace()


def by_hand(index_NK, num_destinations, item=None, **columns):
    index_NK = np.asarray(index_NK)
    layer = TraceLayer(layer=0, name="r", num_destinations=num_destinations, top_k=index_NK.shape[1])
    builder = TraceBuilder()
    item_N = np.arange(len(index_NK)) if item is None else np.full(len(index_NK), item)
    builder.add(layer, index_NK, np.where(index_NK < 0, 0.0, 0.5), item_N=item_N, **columns)
    return builder.trace()


class Page(HTMLParser):
    """What a page refers to, and whether its tags close in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.headings, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def test_facts_are_those_of_the_measures():
    trace = made(pool=3, num_layers=3, drop=0.1)
    summary = summarize(trace)
    assert (summary.rows, summary.items, summary.domains) == (len(trace), 8, ["books", "code"])
    for facts in summary.layers:
        decisions, load_E = trace.decisions(facts.layer), trace.load_E(facts.layer)
        assert facts.max_violation == measure.max_violation(load_E)
        assert load_E[facts.busiest] == load_E.max()
        assert facts.drop_ratio == measure.drop_ratio(decisions.index_NK)
        assert facts.idle == measure.idle_fraction(load_E) * 24
        assert facts.consecutive_reuse == measure.consecutive_reuse(decisions)
        assert facts.segment_reuse == measure.segment_reuse(decisions, 16)
        assert facts.foreign_share == measure.foreign_share(trace, facts.layer)
        assert facts.foreign_chance == pytest.approx(2 / 3)
        assert facts.domain_distance["code"] == measure.domain_distance(measure.domain_load(trace, facts.layer))[1]
    second = summary.layers[1]
    assert second.previous_layer == 0
    assert second.layer_reuse == measure.reuse_rate(trace.decisions(1).index_NK, trace.decisions(0).index_NK)
    assert summary.layers[0].previous_layer is None
    (pool,) = summary.pools
    assert (pool.layers, pool.size) == ([0, 1, 2], 24)
    assert pool.max_violation == measure.max_violation(measure.pool_load(trace, "group0"))
    assert pool.max_violation_layer == max(layer.max_violation for layer in summary.layers)
    assert summary.worst.max_violation == pool.max_violation_layer


def test_luck_explains_an_even_router():
    generator = np.random.default_rng(0)
    even = [by_hand(generator.integers(0, 64, (4000, 1)), 64) for _ in range(20)]
    seen = [summarize(trace).layers[0].max_violation for trace in even]
    assert np.mean(seen) == pytest.approx(summarize(even[0]).layers[0].noise, rel=0.25)


@pytest.mark.parametrize(
    ("trace", "said"),
    [
        (lambda: by_hand([[0], [1], [2], [3]] * 500, 4), ["The load is even"]),
        (
            lambda: by_hand([[0]] * 700 + [[1]] * 300, 4),  # 700 of 1000 where 250 are fair
            [
                "The load is uneven: in layer 0, the worst, expert 0 takes 2.8 times its fair share, and 2 of its 4 experts"
            ],
        ),
        (lambda: by_hand([[0]] * 10, 1), ["single destination"]),
        (lambda: by_hand([[-1]] * 10, 4), ["No item was sent anywhere", "100% of places are unused"]),
        (lambda: by_hand([[0, -1]] * 900 + [[1, 2]] * 100, 3), ["45% of places are unused"]),
        (
            lambda: made(skew=0.0, length=8),
            ["No specialisation by domain can be told from chance", "The recording is short"],
        ),
        (
            lambda: made(skew=0.0, length=4000, num_layers=1),
            ["Experts do not specialise by domain", "about as much as chance (25%)"],
        ),
        (lambda: made(skew=2.0, length=400), ["Experts specialise strongly by domain"]),
        (
            lambda: made(num_layers=3, pool=3, length=200),
            ["Layers share experts", "67% if all were chosen evenly", "by chance"],
        ),
        (lambda: made(length=100), ["A token shares", "Within 16 tokens"]),
    ],
)
def test_words_follow_the_facts(trace, said):
    text = " ".join(explain(summarize(trace())))
    for words in said:
        assert words in text
    assert "nan" not in text


def test_a_layer_whose_choice_is_fixed_is_said_to_choose_nothing():
    columns = {"position_N": np.arange(64)}
    (text,) = explain(summarize(by_hand([[1]] * 64, 2, item=0, **columns)))
    assert text.startswith("In every layer every token takes the same expert (1), so nothing is chosen there.")
    assert summarize(by_hand([[1]] * 64, 2, item=0, **columns)).caches is None
    some = concat([by_hand([[1]] * 64, 2, item=0, **columns), by_wider()])
    assert explain(summarize(some))[0].startswith("In layer 0 every token takes the same expert (1)")
    assert len(explain(summarize(some))) > 1
    # One expert is no choice either, and not a collapsed one.
    assert "In every layer" not in " ".join(explain(summarize(by_hand([[0]] * 64, 1, item=0, **columns))))


def test_layers_of_a_pool_have_one_cache():
    """What is held together is counted once: a cache for each layer would be all experts there are."""
    trace = made(pool=2, num_layers=4, num_destinations=4, length=64)
    facts = summarize(trace).caches
    assert facts.shared == {"group0": [0, 1], "group1": [2, 3]}
    for policy in ("lru", "belady"):
        for ratio, found in zip(facts.ratios, facts.hits[policy], strict=True):
            wanted = []
            for numbers in facts.shared.values():
                layers = [of for of in consistency.routes(trace) if of.layer in numbers]
                of_pool = consistency.hit_rates(layers, policy, cold="miss", level="model")
                wanted.append(float(of_pool.at_ratio(ratio)[0]))
            assert found == pytest.approx(np.mean(wanted)), (policy, ratio)
    assert facts.ratios == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    held = set(facts.recommended_capacity.values())
    assert held == {int(4 * facts.recommended_ratio)}
    (text,) = [text for text in explain(summarize(trace)) if "SRP" in text]
    assert f"cache {held.pop()} experts of each pool that layers share" in text or facts.is_everything


def test_where_only_all_experts_would_do_no_size_is_recommended():
    found = summarize(made(num_layers=2, length=64))
    one = replace(found, caches=replace(found.caches, recommended_capacity={0: 1, 1: 1}, is_everything=False))
    assert any("cache 1 expert of each layer," in text for text in explain(one))
    found = replace(found, caches=replace(found.caches, is_everything=True))
    (text,) = [text for text in explain(found) if "SRP" in text]
    assert "No cache smaller than all experts of each layer hits 90% of what one that knows the future does" in text
    assert "recommended cache" not in page("t", found, [], [], {})


def test_sizes_are_those_that_exist():
    assert summarize(made(num_layers=2, length=64)).caches.ratios == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]


def test_report_is_whole_and_stands_alone(tmp_path):
    trace = made(pool=3)
    path = write_report(
        trace, tmp_path / "new" / "report", title="A <b>model</b> & more", extra={"model": "<script>", "steps": 7}
    )
    assert path == tmp_path / "new" / "report" / "report.html"
    names = [
        "caches.png",
        "coactivation.png",
        "entropy.png",
        "load.png",
        "report.html",
        "reuse.png",
        "specialisation.png",
        "summary.json",
    ]
    assert sorted(file.name for file in path.parent.iterdir()) == names
    for name in names:
        if name.endswith(".png"):
            assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert len(page.addresses) == 6
    assert not re.search(r"@import|url\(|<script|<link", text)
    assert "prefers-color-scheme: dark" in text
    assert page.headings[0] == "A <b>model</b> & more"
    assert "Shared pools" in page.headings
    assert page.text.count("blocks.1.router") == 1
    facts = json.loads((path.parent / "summary.json").read_text())
    assert facts["title"] == "A <b>model</b> & more"
    assert facts["extra"] == {"model": "<script>", "steps": 7}
    assert facts["text"] == explain(summarize(trace))
    assert [layer["max_violation"] for layer in facts["layers"]] == [
        layer.max_violation for layer in summarize(trace).layers
    ]
    assert facts["layers"][0]["layer_reuse"] is None  # nan has no JSON


@pytest.mark.parametrize(
    ("trace", "pictures"),
    [
        (lambda: made(num_layers=1, num_destinations=1, top_k=1, domains=()), {"load"}),
        (lambda: made(num_layers=1, domains=()), {"load", "coactivation", "reuse", "caches"}),
        (lambda: made(num_layers=1), {"load", "coactivation", "reuse", "specialisation", "caches"}),
        (lambda: made(top_k=1, domains=("one",)), {"load", "entropy", "reuse", "caches"}),
        (lambda: made(num_destinations=3, top_k=3), {"load", "entropy", "coactivation", "specialisation"}),
        (lambda: made(length=1), {"load", "entropy", "coactivation", "specialisation"}),
        (lambda: by_hand([[-1, -1]] * 3, 4), {"load", "coactivation"}),
        (lambda: by_hand([[0, 1]], 40, domain="code"), {"load", "coactivation"}),
        (
            lambda: made(domains=tuple("abcdefghij"), num_sequences=10, length=4),
            {"load", "entropy", "coactivation", "specialisation", "reuse"},
        ),
        (
            lambda: concat([made(), by_wider()]),
            {"load", "entropy", "coactivation", "specialisation", "reuse", "caches"},
        ),
    ],
    ids=[
        "one expert",
        "no domains",
        "one layer",
        "top 1",
        "all chosen",
        "no neighbours",
        "nothing",
        "one row",
        "ten domains",
        "ragged",
    ],
)
def test_only_pictures_that_say_something(trace, pictures, tmp_path):
    (tmp_path / "reuse.png").write_bytes(b"of an earlier report")
    path = write_report(trace(), tmp_path, title="t")
    assert {file.stem for file in tmp_path.glob("*.png")} == pictures
    assert Page(path.read_text()).open == []
    assert "nan" not in path.read_text().split("<body>")[1].replace("finance", "")


def test_words_picture_and_caption_name_one_layer_as_most_special():
    """The layer of the greatest distance of one domain need not be the one whose experts tell most about domains."""
    trace = made(num_layers=6, domains=("books", "code", "mail"), num_sequences=9, length=24, skew=0.8)
    summary = summarize(trace)
    by_distance = max(summary.layers, key=lambda layer: max(layer.domain_distance.values()))
    best = summary.most_special
    assert best.layer == max(summary.layers, key=lambda layer: layer.domain_information_bits).layer
    assert best.layer != by_distance.layer
    (said,) = [sentence for sentence in explain(summary) if "by domain" in sentence]
    assert f"in layer {best.layer}, where they do so most, " in said
    assert f"avoids (blue) in layer {best.layer}, where the expert tells most" in captions.specialisation(summary)
    titles = [axes.get_title("left") for axes in pictures.specialisation(trace, summary).axes]
    assert f"Experts that each domain prefers, layer {best.layer}" in titles


@pytest.mark.parametrize(("num_layers", "shown"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (7, [0, 3, 6])])
def test_all_of_few_layers_are_drawn_and_of_many_it_is_said(num_layers, shown):
    trace = made(num_layers=num_layers, length=4)
    picture = pictures.coactivation(trace)
    titles = [axes.get_title("left") for axes in picture.axes]
    assert [title for title in titles if title] == [f"layer {layer}" for layer in shown]
    is_some = len(shown) < num_layers
    assert (f"(3 of {num_layers} layers)" in picture._suptitle.get_text()) == is_some
    assert ("the middle and the last" in captions.coactivation(summarize(trace))) == is_some


def test_captions_tell_of_no_curve_that_is_not_drawn():
    one, several = summarize(made(num_layers=1)), summarize(made())
    assert captions.load(one).endswith("the line is the fair share.")
    assert "orange" in captions.load(several)
    assert captions.specialisation(one).startswith("Which experts a domain prefers")
    for is_everything in (True, False):
        facts = replace(several.caches, is_everything=is_everything)
        summary = replace(several, caches=facts)
        labels = [line.get_label() for axes in cache_pictures.caches(summary).axes for line in axes.lines]
        assert ("recommended size" in labels) == ("dashed" in captions.caches(summary)) == (not is_everything)


def test_axes_of_shares_end_at_one():
    picture = cache_pictures.caches(summarize(made(length=100)))
    assert [axes.get_ylim() for axes in picture.axes] == [(0, 1), (0, 1)]
    assert not any(line.get_clip_on() for axes in picture.axes for line in axes.lines)


def by_wider():
    """A layer with more experts than the others, recorded only in part."""
    layer = TraceLayer(layer=9, name="blocks.9.router", num_destinations=12, top_k=1)
    builder = TraceBuilder()
    builder.add(layer, [[11], [3], [11]], [[1.0]] * 3, item_N=[0, 0, 0], position_N=[0, 1, 2])
    return builder.trace()


def in_passes(*, pooled=False, same=0.5, length=64, seed=0):
    """Two layers of two passes over four experts, top 1: a token's second choice is its first again in a share ``same`` of cases."""
    generator = np.random.default_rng(seed)
    builder = TraceBuilder()
    index_NK = np.zeros((length, 1), int)
    for number in range(4):
        again = generator.random((length, 1)) < same
        first = number % 2 == 0
        index_NK = generator.integers(0, 4, (length, 1)) if first else np.where(again, index_NK, (index_NK + 1) % 4)
        layer = TraceLayer(
            layer=number,
            name=f"blocks.{number // 2}.router.pass{number % 2}",
            num_destinations=4,
            top_k=1,
            pool="group" if pooled else f"layer_{number // 2}",
            own_start=2 * (number // 2) if pooled else 0,
        )
        builder.add(
            layer,
            index_NK,
            np.ones((length, 1)),
            item_N=np.arange(length) // 8,
            position_N=np.arange(length) % 8,
        )
    return builder.trace()


@pytest.mark.parametrize("pooled", [False, True])
def test_passes_of_a_layer_are_reported_as_passes(pooled, tmp_path):
    trace = in_passes(pooled=pooled)
    summary = summarize(trace)
    assert [(facts.first_layer, facts.second_layer) for facts in summary.passes] == [(0, 1), (2, 3)]
    path = write_report(trace, tmp_path, title="chain")
    assert (tmp_path / "passes.png").read_bytes().startswith(b"\x89PNG")
    page = Page(path.read_text(encoding="utf-8"))
    assert {"Between passes", "From pass to pass"} <= set(page.headings)
    text = " ".join(explain(summary))
    reuse = np.median([facts.reuse for facts in summary.passes])
    assert (
        f"Layers route in passes: {reuse:.0%} of a pass's choices were choices of the pass before (25% by chance)"
        in text
    )
    assert "tokens take 8 different combinations" in text
    # Only layers of one pool that own different experts share them.
    assert ("Layers share experts" in text) is pooled
    (first, _) = json.loads((tmp_path / "summary.json").read_text())["passes"]
    assert (
        first["coactivation_EE"]
        == measure.coactivation(trace.decisions(0).index_NK, 4, trace.decisions(1).index_NK, 4).tolist()
    )
    assert first["reuse"] == summary.passes[0].reuse


def test_many_experts_leave_tables_and_pictures_small(tmp_path):
    generator = np.random.default_rng(3)
    builder = TraceBuilder()
    for number in range(2):
        layer = TraceLayer(layer=number, name=f"r{number}", num_destinations=3000, top_k=2, pool="layer_0")
        index_NK = np.stack([generator.permutation(3000)[:2] for _ in range(400)])
        builder.add(layer, index_NK, np.ones((400, 2)), item_N=np.arange(400))
    write_report(builder.trace(), tmp_path, title="many")
    for name in ("passes", "coactivation"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    (facts,) = json.loads((tmp_path / "summary.json").read_text())["passes"]
    assert len(facts["top_pairs"]) == 256
    assert (tmp_path / "summary.json").stat().st_size < 100_000


@pytest.mark.parametrize(("num_layers", "shown"), [(2, ["0 to 1", "2 to 3"]), (4, None), (9, None)])
def test_the_picture_of_passes_has_all_of_few_and_says_where_it_has_some_of_many(num_layers, shown):
    builder, generator = TraceBuilder(), np.random.default_rng(0)
    for number in range(2 * num_layers):
        layer = TraceLayer(layer=number, name=f"r{number}", num_destinations=4, top_k=1, pool=f"layer_{number // 2}")
        # Nobody takes expert 3.
        builder.add(layer, generator.integers(0, 3, (50, 1)), np.ones((50, 1)), item_N=np.arange(50))
    made_of = pictures.passes(summarize(builder.trace()))
    panels = [axes for axes in made_of.axes if axes.images]
    titles = [axes.get_title(loc="left").removeprefix("passes ") for axes in panels]
    wanted = shown or [
        f"{2 * layer} to {2 * layer + 1}" for layer in np.linspace(0, num_layers - 1, 4).round().astype(int)
    ]
    assert titles == wanted
    assert made_of.get_suptitle().endswith("next" if num_layers <= 4 else " (4 of 9 pairs of passes)")
    for axes in panels:
        # What was never chosen has no ratio to chance, rather than one of 1.
        unknown = np.ma.getmaskarray(axes.images[0].get_array())
        assert unknown.tolist() == [[row == 3 or column == 3 for column in range(4)] for row in range(4)]


def test_passes_that_tell_nothing_of_each_other_are_said_to():
    generator = np.random.default_rng(3)
    builder = TraceBuilder()
    for number in range(2):
        layer = TraceLayer(layer=number, name=f"r{number}", num_destinations=4, top_k=1, pool="layer_0")
        builder.add(layer, generator.integers(0, 4, (200, 1)), np.ones((200, 1)), item_N=np.arange(200))
    assert "no more than luck would show" in " ".join(explain(summarize(builder.trace())))


def test_passes_in_which_nothing_was_sent_anywhere(tmp_path):
    builder = TraceBuilder()
    for number in range(2):
        layer = TraceLayer(layer=number, name=f"r{number}", num_destinations=4, top_k=1, pool="layer_0")
        builder.add(layer, [[-1]] * 3, [[0.0]] * 3, item_N=[0, 1, 2])
    path = write_report(builder.trace(), tmp_path, title="nothing")
    assert not (tmp_path / "passes.png").exists()
    assert "route in passes" not in " ".join(explain(summarize(builder.trace())))
    assert "nan" not in path.read_text().split("<body>")[1]


def test_no_passes_no_words_and_an_earlier_picture_goes(tmp_path):
    (tmp_path / "passes.png").write_bytes(b"of an earlier report")
    path = write_report(made(pool=3), tmp_path, title="pool")
    assert not (tmp_path / "passes.png").exists()
    assert "Between passes" not in Page(path.read_text(encoding="utf-8")).headings
    assert summarize(made(pool=3)).passes == []


@pytest.mark.slow
def test_a_large_model(tmp_path):
    trace = made(num_layers=64, num_destinations=512, top_k=8, num_sequences=4)
    assert write_report(trace, tmp_path, title="large").stat().st_size < 3e6


def test_the_same_trace_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        write_report(made(), tmp_path / name, title="t")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_global_settings_are_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(made(num_layers=1, domains=()), tmp_path, title="t")
    assert dict(matplotlib.rcParams) == before


def test_messages(tmp_path):
    with pytest.raises(DataError, match="the trace has no rows, so there is nothing to report"):
        write_report(concat([]), tmp_path, title="t")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write_report(made(), tmp_path / "file", title="t")


def test_typical_ignores_what_is_not_known():
    summary = summarize(made(num_layers=3, pool=3))
    known = [layer.layer_reuse for layer in summary.layers if not math.isnan(layer.layer_reuse)]
    assert len(known) == 2
    assert summary.typical("layer_reuse") == np.median(known)
    assert math.isnan(summarize(by_hand([[0]], 2)).typical("layer_reuse"))


def test_cache_facts_agree_with_the_measures():
    trace = made(num_layers=2, skew=2.0)
    facts, layers = summarize(trace).caches, list(consistency.routes(trace))
    assert facts.srp[16] == pytest.approx(float(consistency.srp(layers, 16, "model").value))
    assert list(facts.srp_by_layer.values()) == pytest.approx(consistency.srp(layers, 16).value.tolist())
    assert 64 not in facts.srp  # sequences have 32 tokens
    place = facts.ratios.index(2.0)
    assert facts.hits["lru"][place] == pytest.approx(
        consistency.hit_rates(layers, "lru", cold="miss").at_ratio(2.0).mean()
    )
    assert facts.hits["segment"][place] == pytest.approx(consistency.sch(layers, 16, cold="miss").at_ratio(2.0).mean())
    place = facts.ratios.index(facts.recommended_ratio)
    assert facts.hits["segment"][place] >= 0.9 * facts.hits["belady"][place]
    assert place + 1 == consistency.recommended_capacity(*(np.array(facts.hits[p]) for p in ("segment", "belady")), 1)
    assert facts.recommended_capacity == dict.fromkeys((0, 1), int(2 * facts.recommended_ratio))
    assert facts.always_on == pytest.approx(2 * 0.25 / 1.25)


def test_words_about_offloading():
    (steady,) = [text for text in explain(summarize(made(skew=8.0, length=64, num_sequences=4))) if "offloaded" in text]
    assert steady.startswith("Routing is strongly consistent from token to token")
    assert "few experts do most of the work" in steady
    (loose,) = [
        text for text in explain(summarize(made(skew=0.0, num_destinations=16, length=64))) if "offloaded" in text
    ]
    assert "is hardly consistent" in loose
    assert re.search(r"cache \d+ experts of each layer, [\d.]+ times the active ones", loose)
    assert not any("offloaded" in text for text in explain(summarize(made(length=8))))


@pytest.mark.parametrize(
    ("idle", "said"),
    [
        (0, "every expert gets at least a tenth of its fair share"),
        (1, "1 of its 8 experts gets less than a tenth of its fair share"),
        (2, "2 of its 8 experts get less than a tenth of their fair share"),
    ],
)
def test_idle_experts_are_told_in_grammar(idle, said):
    worst = SimpleNamespace(idle=idle, num_destinations=8, max_violation=2.0, noise=0.0, layer=1, busiest=3)
    summary = SimpleNamespace(worst=worst, typical=lambda name: 1.0, layers=[worst])
    assert said in _balance(summary)
