"""Metrics of several sources as one text: each number says whose it is, each family is described once."""

from anabranch.gateway.metrics_text import labelled

ONE = b"# HELP calls Of models.\n# TYPE calls counter\ncalls 3.0\n# HELP took Seconds.\n# TYPE took histogram\n" + (
    b'took_bucket{le="1.0"} 2.0\ntook_sum 1.5\n'
)
OTHER = b"# HELP calls Said otherwise.\n# TYPE calls counter\ncalls 4.0\n# TYPE alive gauge\nalive 1.0\n\nno sample at all?\n"


def test_each_number_has_its_source_beside_its_own_labels():
    assert labelled({0: ONE, 1: OTHER}).decode().splitlines() == [
        "# HELP calls Of models.",
        "# TYPE calls counter",
        'calls{worker="0"} 3.0',
        'calls{worker="1"} 4.0',
        "# HELP took Seconds.",
        "# TYPE took histogram",
        'took_bucket{worker="0",le="1.0"} 2.0',
        'took_sum{worker="0"} 1.5',
        "# TYPE alive gauge",
        'alive{worker="1"} 1.0',
        'no{worker="1"} sample at all?',
    ]


def test_sources_may_be_called_anything_and_come_in_the_order_of_their_names():
    told = b"# TYPE up gauge\n"
    found = labelled({'b"\\\n': told + b"up 1\n", "a": told + b"up 2\n"}, "deployment").decode()
    assert found == '# TYPE up gauge\nup{deployment="a"} 2\nup{deployment="b\\"\\\\\\n"} 1\n'


def test_of_nobody_there_is_nothing():
    assert labelled({}) == b""
    assert labelled({0: b"", 1: b"\n# odd\n".replace(b"# odd\n", b"")}) == b""
