import pytest

import anabranch.studies.training as training
from anabranch.data import Files


@pytest.fixture
def tiny_study(monkeypatch, tmp_path):
    """Puts a study on a little text and short measurements, so that its runs take seconds."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n\n\n" * 20)
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ANABRANCH_NO_KERNELS", "1")
    monkeypatch.setattr(training, "FINAL_TOKENS", 512)
    monkeypatch.setattr(training, "CURVE_TOKENS", 128)
    corpus = Files.Config(paths=(str(text),))

    def shrink(study):
        arms = [
            type(arm)(
                arm.name,
                arm.about,
                arm.config.replace(data=arm.config.data.replace(corpus=corpus, validation_fraction=0.2)),
            )
            for arm in study.arms
        ]
        return type(study)(**{**vars(study), "arms": arms})

    return shrink
