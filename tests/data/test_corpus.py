import gzip
import json
import os
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.config import from_dict, override, to_dict
from anabranch.data.corpus import Corpus, Domain, Files, Mixture, Stdlib, Table, corpus_at
from anabranch.data.named import NAMED, Named
from anabranch.data.reading import decode_text, stable_hash
from anabranch.data.split import STRETCH, labels_cut_inside, split, split_of, stretches
from anabranch.errors import ConfigError, DataError


def found(corpus):
    return {document.key: (document.label, document.text) for document in corpus.documents()}


def write_table(path, rows):
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt") as stream:
            stream.write("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


# The standard library


def test_the_standard_library_is_there_without_what_is_installed_in_it():
    documents = found(Stdlib.Config().build())
    assert "argparse.py" in documents
    assert "json/decoder.py" in documents
    assert documents["argparse.py"][0] == "code"
    assert not [key for key in documents if "site-packages" in key or "/test/" in f"/{key}"]
    assert sum(len(text) for _, text in documents.values()) > 5_000_000


def test_a_part_of_the_standard_library_is_a_fair_sample_of_it():
    documents = found(Stdlib.Config(max_bytes=300_000).build())
    assert 200_000 < sum(len(text.encode()) for _, text in documents.values()) <= 300_000
    assert len({key[0] for key in documents}) > 5  # not the first ones of the alphabet
    assert documents == found(Stdlib.Config(max_bytes=300_000).build())


# Files


def test_files_of_a_folder(texts):
    documents = found(Files.Config(paths=(str(texts),)).build())
    assert len(documents) == 60
    assert documents["odd/3.txt"][0] == "texts"
    assert documents["odd/3.txt"][1].startswith("file 3: ")


@pytest.mark.parametrize(
    ("label", "label_by", "expected"),
    [
        (None, "path", {"texts"}),
        (None, "folder", {"odd", "even"}),
        (None, "file", {str(n) for n in range(60)}),
        ("mine", "folder", {"mine"}),
    ],
)
def test_labels(texts, label, label_by, expected):
    config = Files.Config(paths=(str(texts),), label=label, label_by=label_by)
    assert {document.label for document in config.build().documents()} == expected


def test_pattern_gzip_zip_hidden_and_binary_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "plain.txt").write_text("plain")
    (tmp_path / "a" / "picture.png").write_bytes(b"\x89PNG\r\n\0\0data")
    (tmp_path / "a" / ".hidden.txt").write_text("hidden")
    (tmp_path / "a" / "empty.txt").write_text("")
    (tmp_path / "a" / "packed.txt.gz").write_bytes(gzip.compress(b"packed"))
    with zipfile.ZipFile(tmp_path / "a" / "many.zip", "w") as archive:
        archive.writestr("in/one.txt", "one")
        archive.writestr("in/README", "two")
        archive.writestr("in/pixels", b"\0\1")
    everything = found(Files.Config(paths=(str(tmp_path / "a"),)).build())
    assert {key: text for key, (_, text) in everything.items()} == {
        "plain.txt": "plain",
        "packed.txt.gz": "packed",
        "many.zip!in/one.txt": "one",
        "many.zip!in/README": "two",
    }
    assert set(found(Files.Config(paths=(str(tmp_path / "a"),), pattern="**/*.txt").build())) == {"plain.txt"}
    members = Files.Config(paths=(str(tmp_path / "a" / "many.zip"),), pattern="*.txt", label_by="file").build()
    assert found(members) == {"many.zip!in/one.txt": ("one", "one")}
    single = Files.Config(paths=(str(tmp_path / "a" / "packed.txt.gz"),)).build()
    assert found(single) == {"packed.txt.gz": ("packed", "packed")}


def test_endings_in_capitals_are_the_same_kinds_of_files(tmp_path):
    """As Windows writes them: they were skipped as binary, or read as text that is none."""
    (tmp_path / "PACKED.TXT.GZ").write_bytes(gzip.compress(b"packed"))
    with zipfile.ZipFile(tmp_path / "MANY.ZIP", "w") as archive:
        archive.writestr("ONE.TXT", "one")
    texts = {key: text for key, (_, text) in found(Files.Config(paths=(str(tmp_path),)).build()).items()}
    assert texts == {"PACKED.TXT.GZ": "packed", "MANY.ZIP!ONE.TXT": "one"}
    for name in ("T.JSONL", "T.JSONL.GZ", "T.PARQUET"):
        made = write_table(tmp_path / name.lower(), [{"text": name}])
        place = tmp_path / "tables" / name
        place.parent.mkdir(exist_ok=True)
        made.rename(place)
        assert corpus_at(place) == Table.Config(paths=(str(place),))
        assert [text for _, text in found(Table.Config(paths=(str(place),)).build()).values()] == [name]
    assert len(found(Table.Config(paths=(str(tmp_path / "tables"),)).build())) == 3


def test_links_within_a_folder_do_not_repeat_text(tmp_path):
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.txt").symlink_to("one.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    assert list(found(Files.Config(paths=(str(tmp_path),)).build())) == ["one.txt"]


def test_bytes_that_are_not_text_in_the_encoding():
    assert decode_text(b"a\xffb") == "a\ufffdb"
    assert decode_text(b"caf\xe9", "latin-1") == "café"
    assert decode_text(b"\xef\xbb\xbfa\r\nb") == "a\nb"
    assert decode_text("é\n".encode("utf-16")) == "é\n"
    assert decode_text(b"\0binary") is None


# Tables


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.jsonl.gz"])
def test_tables(tmp_path, name):
    rows = [{"body": f"text {n}", "topic": "even" if n % 2 == 0 else "odd", "n": n} for n in range(6)] + [
        {"body": None, "topic": "even", "n": 0},
        {"body": "", "topic": "odd", "n": 0},
    ]
    path = write_table(tmp_path / name, rows)
    documents = list(Table.Config(paths=(str(path),), text_column="body", label_column="topic").build().documents())
    assert [(document.text, document.label) for document in documents] == [
        (row["body"], row["topic"]) for row in rows[:6]
    ]
    assert {
        document.label for document in Table.Config(paths=(str(path),), text_column="body").build().documents()
    } == {"t"}


def test_keys_of_rows_do_not_depend_on_their_order(tmp_path):
    rows = [{"text": f"text {n}"} for n in range(6)]
    there = found(Table.Config(paths=(str(write_table(tmp_path / "a.jsonl", rows)),)).build())
    back = found(Table.Config(paths=(str(write_table(tmp_path / "b.jsonl", rows[::-1])),)).build())
    assert there.keys() == back.keys()


def test_a_folder_of_tables(tmp_path):
    write_table(tmp_path / "a.jsonl", [{"text": "one"}])
    write_table(tmp_path / "b.parquet", [{"text": "two"}])
    (tmp_path / "notes.txt").write_text("no table")
    assert sorted(text for _, text in found(Table.Config(paths=(str(tmp_path),)).build()).values()) == ["one", "two"]


def test_lone_surrogates_in_json_become_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert [text for _, text in found(Table.Config(paths=(str(tmp_path / "a.jsonl"),)).build()).values()] == ["a?b"]


def test_corpus_at_picks_the_kind_by_name(tmp_path, texts):
    table = write_table(tmp_path / "x.jsonl.gz", [{"text": "one"}])
    assert corpus_at(table) == Table.Config(paths=(str(table),))
    assert corpus_at(texts) == Files.Config(paths=(str(texts),))


# Mixtures and configs


def test_a_mixture_labels_documents_with_its_own_names(texts):
    inner = Mixture.Config(domains={"x": Domain(corpus=Files.Config(paths=(str(texts / "odd"),)))})
    mixture = Mixture.Config(
        domains={
            "even": Domain(corpus=Files.Config(paths=(str(texts / "even"),)), weight=2.0),
            "rest": Domain(corpus=inner),
        }
    )
    labels = [document.label for document in mixture.build().documents()]
    assert (labels.count("even"), labels.count("rest")) == (30, 30)


@pytest.mark.parametrize(
    "config",
    [
        Stdlib.Config(max_bytes=5),
        Files.Config(paths=("a", "b"), label_by="folder"),
        Table.Config(paths=("a",), label_column="c"),
        Named.Config(name="metamath"),
        Mixture.Config(
            domains={"a": Domain(corpus=Stdlib.Config(), weight=2.0), "b": Domain(corpus=Files.Config(paths=("x",)))}
        ),
    ],
)
def test_configs_read_back_equal(config):
    assert from_dict(Corpus.Config, json.loads(json.dumps(to_dict(config)))) == config


def test_a_weight_can_be_set_by_path():
    mixture = Mixture.Config(domains={"a": Domain(corpus=Stdlib.Config())})
    assert override(mixture, {"domains.a.weight": 3.0}).domains["a"].weight == 3.0


def test_max_bytes_cuts_the_last_document_at_a_line_end(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    assert found(Files.Config(paths=(str(tmp_path),), max_bytes=9).build())["a.txt"][1] == "one\ntwo\n"
    (tmp_path / "a.txt").write_text("éé")
    assert found(Files.Config(paths=(str(tmp_path),), max_bytes=3).build())["a.txt"][1] == "é"


def test_the_fingerprint_follows_the_content(texts):
    config = Files.Config(paths=(str(texts),))
    before = config.build().fingerprint()
    assert config.build().fingerprint() == before
    assert config.replace(label="x").build().fingerprint() != before
    (texts / "odd" / "1.txt").write_text("changed")
    assert config.build().fingerprint() != before


# Named texts


def test_named_texts_from_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    (tmp_path / "text").mkdir()
    articles = "# Sosa\nA town.\n\n# Szerelemez\nEgy falu.\n"
    (tmp_path / "text" / "wikipedia_multilingual.txt.gz").write_bytes(gzip.compress(articles.encode()))
    with zipfile.ZipFile(tmp_path / "text" / "genesis.zip", "w") as archive:
        archive.writestr("genesis/german.txt", "Am Anfang")
        archive.writestr("genesis/README", "about")
    (tmp_path / "usr/share/metamath/databases").mkdir(parents=True)
    (tmp_path / "usr/share/metamath/databases/set.mm").write_text("$( proofs $)")
    assert [document.text for document in Named.Config(name="wikipedia_multilingual").build().documents()] == [
        "# Sosa\nA town.\n\n",
        "# Szerelemez\nEgy falu.\n",
    ]
    assert found(Named.Config(name="genesis").build()) == {"genesis.zip!genesis/german.txt": ("german", "Am Anfang")}
    assert found(Named.Config(name="metamath").build()) == {"set.mm": ("metamath", "$( proofs $)")}


def test_named_texts_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(
        DataError, match="no tinyshakespeare because ANABRANCH_DATA is not set; set ANABRANCH_DATA to the folder"
    ):
        list(Named.Config(name="tinyshakespeare").build().documents())
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"no genesis in {tmp_path}"):
        list(Named.Config(name="genesis").build().documents())
    monkeypatch.setitem(NAMED, "metamath", NAMED["metamath"].__class__("usr/no/such", "metamath-databases", "", ""))
    with pytest.raises(DataError, match="install it with: apt-get install metamath-databases"):
        list(Named.Config(name="metamath").build().documents())
    with pytest.raises(ConfigError, match="name is 'shakespeare'; it must be one of tinyshakespeare"):
        Named.Config(name="shakespeare")


@pytest.mark.parametrize("text", NAMED.values(), ids=NAMED)
def test_every_named_text_says_whose_it_is(text):
    assert text.source
    assert text.licence


# Splitting


def test_the_split_of_a_key_never_changes():
    # blake2b-64 of the key, big endian, against fraction * 2**64: worked out once, so that no later version moves a document
    assert stable_hash("argparse.py") == 0x56DD8D1DC3FD7954
    assert [split_of(key, 0.5) for key in ("argparse.py", "ast.py", "json/decoder.py")] == [
        "validation",
        "train",
        "validation",
    ]


@given(st.lists(st.text(max_size=8), unique=True, min_size=1), st.floats(0.01, 0.99))
def test_a_larger_fraction_only_moves_documents_to_validation(keys, fraction):
    for key in keys:
        assert split_of(key, 0) == "train"
        if split_of(key, fraction) == "validation":
            assert split_of(key, min(1.0, fraction * 1.5)) == "validation"


def test_about_the_fraction_validates():
    # 10,000 draws at 0.05: mean 500, standard deviation 22
    count = sum(split_of(f"file{number}.txt", 0.05) == "validation" for number in range(10_000))
    assert 400 < count < 600


def test_adding_documents_moves_none(texts):
    config = Files.Config(paths=(str(texts),))

    def sides():
        cut = labels_cut_inside(config.build().documents(), 0.2)
        assert not cut
        return {document.key: side for side, document in split(config.build().documents(), 0.2, cut)}

    before = sides()
    assert set(before.values()) == {"train", "validation"}
    for number in range(40):
        (texts / f"new{number}.txt").write_text("new text")
    assert before.items() <= sides().items()


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_one_long_book_is_cut_inside(tmp_path, fraction):
    text = "".join(f"line {number}\n" for number in range(300_000))  # three stretches of a mebibyte, and some
    (tmp_path / "book.txt").write_text(text)
    corpus = Files.Config(paths=(str(tmp_path / "book.txt"),)).build()
    cut = labels_cut_inside(corpus.documents(), fraction)
    assert cut == {"book"}
    parts = [(side, document.text) for side, document in split(corpus.documents(), fraction, cut)]
    assert "".join(part for _, part in parts) == text
    assert [side for side, _ in parts] == ["train", "validation"] * 4
    assert all(part.endswith("\n") for _, part in parts)
    size = sum(len(part) for side, part in parts if side == "validation")
    assert size / len(text) == pytest.approx(fraction, abs=0.001)


def test_nothing_validates_at_fraction_zero(texts):
    corpus = Files.Config(paths=(str(texts),)).build()
    assert labels_cut_inside(corpus.documents(), 0.0) == set()
    assert {side for side, _ in split(corpus.documents(), 0.0, set())} == {"train"}


@given(st.text(alphabet="ab \n", min_size=0, max_size=30), st.integers(0, 3))
def test_stretches_join_to_the_text(text, repeats):
    text = text * (repeats * STRETCH // 20)
    pieces = list(stretches(text))
    assert "".join(pieces) == text
    assert all(len(piece) <= STRETCH for piece in pieces)


def test_stretches_are_cut_where_no_blank_is_near():
    text = "x" * (STRETCH - 10) + "\ny\n\nz\n w" + "v" * 100
    assert next(stretches(text)) == "x" * (STRETCH - 10) + "\n"


# Errors


@pytest.mark.parametrize("kind", [Files, Table])
def test_a_missing_path(kind):
    with pytest.raises(
        DataError,
        match=r"^no corpus at data/wiki; name a file or folder of text$",
    ):
        list(kind.Config(paths=("data/wiki",)).build().documents())
    with pytest.raises(DataError, match="no corpus at"):
        corpus_at("data/wiki")


def test_errors_name_what_is_wrong(tmp_path):
    def read(config):
        return list(config.build().documents())

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2 is not JSON"):
        read(Table.Config(paths=(str(path),)))
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"line 1 is '\[1\]\\n'; it must be a JSON object"):
        read(Table.Config(paths=(str(path),)))
    path.write_text('{"txt": "one"}\n')
    with pytest.raises(DataError, match=r"no column 'text' in .*a.jsonl, line 1; did you mean 'txt'\?"):
        read(Table.Config(paths=(str(path),)))
    path.write_text('{"text": 5}\n')
    with pytest.raises(DataError, match="column 'text' holds 5; it must be text"):
        read(Table.Config(paths=(str(path),)))
    parquet = write_table(tmp_path / "a.parquet", [{"body": "one", "n": 1}])
    with pytest.raises(DataError, match=r"no column 'text' in .*a.parquet; it has: body, n"):
        read(Table.Config(paths=(str(parquet),)))
    parquet.write_bytes(parquet.read_bytes()[:50])
    with pytest.raises(DataError, match=r"cannot read .*a.parquet"):
        read(Table.Config(paths=(str(parquet),)))
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(os.urandom(10_000))[:5000])
    with pytest.raises(DataError, match=r"cannot read .*a.txt.gz"):
        read(Files.Config(paths=(str(packed),)))
    packed.with_suffix(".zip").write_bytes(b"PK\3\4 no zip")
    with pytest.raises(DataError, match=r"cannot read .*a.txt.zip"):
        read(Files.Config(paths=(str(packed.with_suffix(".zip")),)))
    with pytest.raises(DataError, match=r"no text in .*files that match '\*.md'"):
        read(Files.Config(paths=(str(tmp_path),), pattern="*.md"))
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no .parquet or .jsonl files in"):
        read(Table.Config(paths=(str(empty),)))
    with pytest.raises(ConfigError, match="encoding is 'utf-99'"):
        Files.Config(paths=("a",), encoding="utf-99")
    with pytest.raises(ConfigError, match="paths"):
        Files.Config(paths=())
    with pytest.raises(ConfigError, match="max_bytes is 5 on a mixture"):
        Mixture.Config(domains={"a": Domain(corpus=Stdlib.Config())}, max_bytes=5)
    with pytest.raises(ConfigError, match="weight"):
        Domain(corpus=Stdlib.Config(), weight=0.0)
