import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Every test has a token cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ANABRANCH_CACHE", str(folder))
    monkeypatch.delenv("ANABRANCH_DATA", raising=False)
    return folder


@pytest.fixture
def texts(tmp_path):
    """A folder of 60 small text files of different lengths, in two subfolders."""
    folder = tmp_path / "texts"
    for number in range(60):
        file = folder / ("odd" if number % 2 else "even") / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            f"file {number}: " + "".join(chr(97 + (number * 7 + i * i) % 26) for i in range(40 + number)) + "\n"
        )
    return folder
