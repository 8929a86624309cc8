"""Configs from what is written in TOML files and on the command line."""

import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch import presets
from anabranch.cli.runs import build_config, check_preset, flatten
from anabranch.config import from_dict, override, parse_assignment, quoted, to_dict
from anabranch.data import Corpus, Domain, Files, Mixture, Stdlib, Table
from anabranch.errors import ConfigError
from anabranch.presets import demo

MIXTURE = """
preset = "moe"

[data.corpus]
kind = "mixture"

[data.corpus.domains.code]
weight = 2.0
corpus = {kind = "stdlib", include_docs = false}

[data.corpus.domains."my notes v1.0".corpus]
kind = "files"
paths = ["notes"]
"""


def test_a_mixture_is_written_in_a_file(tmp_path):
    (tmp_path / "run.toml").write_text(MIXTURE)
    name, config = build_config(None, tmp_path / "run.toml", None, {"train.steps": 3})
    assert (name, config.train.steps) == ("moe", 3)
    assert config.data.corpus == Mixture.Config(
        domains={
            "code": Domain(corpus=Stdlib.Config(include_docs=False), weight=2.0),
            "my notes v1.0": Domain(corpus=Files.Config(paths=("notes",))),
        }
    )


@pytest.mark.parametrize(
    "texts",
    [
        [
            "data.corpus.kind=mixture",
            "data.corpus.domains.a.corpus.kind=stdlib",
            'data.corpus.domains."v1.0".corpus.kind=files',
            'data.corpus.domains."v1.0".corpus.paths=["x"]',
            'data.corpus.domains."v1.0".weight=2.0',
        ],
        [
            "data.corpus.kind=mixture",
            'data.corpus.domains={a = {corpus = {kind = "stdlib"}}, "v1.0" = {corpus = {kind = "files", paths = ["x"]}}}',
            'data.corpus.domains."v1.0".weight=2.0',
        ],
    ],
)
def test_a_mixture_is_set_by_path(texts):
    config = override(demo(), dict(parse_assignment(text) for text in texts))
    two = Domain(corpus=Files.Config(paths=("x",)), weight=2.0)
    assert config.data.corpus.domains == {"a": Domain(corpus=Stdlib.Config()), "v1.0": two}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('data.corpus."kind=x', "cannot read the path 'data.corpus.\"kind'"),
        (
            "data.corpus.domains.a.weight=1.0",
            "cannot set data.corpus.domains.a.weight: data.corpus has no field 'domains'",
        ),
    ],
)
def test_paths_that_lead_nowhere(text, message):
    with pytest.raises(ConfigError) as error:
        override(demo(), dict([parse_assignment(text)]))
    assert str(error.value).startswith(message)


def written(value):
    """TOML of a JSON value, in line."""
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{json.dumps(name, ensure_ascii=False)} = {written(item)}" for name, item in value.items())
            + "}"
        )
    return (
        "[" + ", ".join(map(written, value)) + "]" if isinstance(value, list) else json.dumps(value, ensure_ascii=False)
    )


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
PLAIN = st.one_of(
    st.builds(Stdlib.Config, include_docs=st.booleans()),
    st.builds(Files.Config, paths=st.tuples(NAMES), label_by=st.sampled_from(["path", "folder", "file"])),
    st.builds(Table.Config, paths=st.tuples(NAMES), text_column=NAMES),
)


def mixed(corpora):
    domains = st.builds(Domain, corpus=corpora, weight=st.floats(0.125, 8))
    return st.builds(Mixture.Config, domains=st.dictionaries(NAMES, domains, min_size=1, max_size=3))


@given(st.recursive(PLAIN, mixed, max_leaves=6))
def test_every_corpus_that_can_be_built_can_be_written_in_a_file(corpus):
    def without_nothing(value):
        if isinstance(value, dict):
            return {name: without_nothing(item) for name, item in value.items() if item is not None}
        return value

    table = tomllib.loads(f"[data]\ncorpus = {written(without_nothing(to_dict(corpus)))}")
    assert override(demo(), flatten(table)).data.corpus == corpus
    assert from_dict(Corpus.Config, to_dict(corpus)) == corpus


def test_a_preset_beside_resume_must_be_of_the_design(tmp_path):
    check_preset("rexmoe", demo(), tmp_path)
    with pytest.raises(ConfigError, match=r"no preset 'demmo'; did you mean 'demo'\?"):
        check_preset("demmo", demo(), tmp_path)
    with pytest.raises(
        ConfigError, match=r"holds a run whose layers are 'rexmoe', and those of preset 'dense' are 'swiglu'"
    ):
        check_preset("dense", demo(), tmp_path)


def leaves(value, path=""):
    """(dotted path, value) of all scalars in the JSON form of a config."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield path, value
        return
    for name, item in pairs:
        yield from leaves(item, f"{path}.{quoted(str(name))}" if path else quoted(str(name)))


@pytest.mark.parametrize("preset", presets.names())
def test_every_value_of_a_preset_can_be_set_to_what_it_is(preset):
    config = presets.find(preset)("tiny")
    given = [
        f"{path}={value if isinstance(value, str) else json.dumps(value)}"
        for path, value in leaves(to_dict(config))
        if path.rpartition(".")[2] != "kind"
    ]
    assert "train.parallel=none" in given
    assert override(config, dict(map(parse_assignment, given))) == config
