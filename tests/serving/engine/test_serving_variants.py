"""How requests run the model: what is usual is kept nowhere, and what is chosen later is what was asked for."""

from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.engine.passes import Variant
from anabranch.serving.engine.variants import Variants


def request(id, **options):
    return Request(id=id, prompt=(1,), sampling=Sampling(max_tokens=1), **options)


def test_the_usual_ways_are_one():
    variants = Variants(2, 3)
    for id, options in enumerate(({}, {"num_streams": 2}, {"path": (0, 1, 2)})):
        variants.add(request(str(id), **options))
        assert variants.of(str(id)) == Variant(2)
    assert not variants


def test_others_are_kept_until_they_are_gone():
    variants = Variants(1, 3)
    variants.add(request("a", path=(0, 2)))
    variants.add(request("b", num_streams=4))
    assert variants
    assert variants.of("a") == Variant(1, (0, 2))
    assert variants.of("b") == Variant(4)
    assert variants.of("c") == Variant(1)
    variants.forget("a")
    variants.forget("c")
    assert variants.of("a") == Variant(1)
    variants.forget("b")
    assert not variants


def test_who_waits_for_routers_has_their_path_then():
    variants = Variants(1, 3)
    for id in "ab":
        variants.add(request(id, routes_depth=True))
        assert variants.of(id).chooser == id
    variants.chosen("a", [0, 0, 1])
    variants.chosen("b", [0, 1, 2])
    assert variants.of("a") == Variant(1, (0, 0, 1))
    assert variants.of("b") == Variant(1)
