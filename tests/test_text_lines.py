"""Files of lines: numbers and ends as they are, gzip by its first bytes, and each way not to be one."""

import gzip

import pytest

from anabranch.errors import DataError
from anabranch.text_lines import read_lines

TEXT = "\ufefffirst\n\nünd\r\nlast"


def test_lines_have_their_numbers_and_ends(tmp_path):
    path = tmp_path / "lines.gz"
    lines = [(1, "first\n"), (2, "\n"), (3, "ünd\r\n"), (4, "last")]
    # Whatever the name says.
    for data in (TEXT.encode(), gzip.compress(TEXT.encode())):
        path.write_bytes(data)
        assert list(read_lines(path)) == lines


def test_what_is_not_asked_for_is_not_read(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"fine\n\xff\n")
    assert next(read_lines(path)) == (1, "fine\n")
    with pytest.raises(DataError, match=r"line 2: not UTF-8 \(invalid start byte at byte 0\)"):
        list(read_lines(path))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*: no such file or directory"):
        list(read_lines(tmp_path / "none"))
    with pytest.raises(DataError, match=r"cannot read .*: is a directory"):
        list(read_lines(tmp_path))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"line\n" * 1000)[:30])
    with pytest.raises(DataError, match="is a damaged gzip file"):
        list(read_lines(tmp_path / "cut.gz"))
