"""``anabranch plan``: the paper's table, every way to name a model and hardware, the search and its files."""

import json
import sys

import pytest

from anabranch.cli.main import main
from anabranch.cli.plan import read_hardware
from anabranch.errors import ConfigError


def out_of(capsys, *words):
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_the_table_of_the_paper_is_printed(capsys):
    text = out_of(capsys, "llama-2-70b", "--hardware", "a100")
    for line in (
        "8 x a100",
        "512 tokens in, 1024 out, 2048 an iteration",
        "bound   compute   T_R 0.296",
        "1,892 of each device",
        "114.17   45.08    31.32",
        "11.01    1.22     0.00",
        "1.47   28.89     0.00",
    ):
        assert line in text, line


def test_json_says_the_same(capsys):
    found = json.loads(out_of(capsys, "llama-2-70b", "--hardware", "a100", "--json"))
    assert found["bound"] == "compute"
    assert found["t_r"] == pytest.approx(0.2956, abs=1e-4)
    assert sum(row["compute_ms"] for row in found["operations"]) == pytest.approx(114.17, abs=0.02)
    assert found["operations"][0]["resource"] == "compute"
    assert "pipeline" not in found


@pytest.mark.parametrize(
    "words", [("moe",), ("smollm2-135m", "--dtype", "int4"), ("mixtral-8x7b", "--devices", "2", "--dtype", "int8")]
)
def test_presets_and_published_models_on_numbers(words, capsys):
    numbers = "compute=100T,bandwidth=1T,memory=80G,network=50G"
    found = json.loads(out_of(capsys, *words, "--hardware", numbers, "--json"))
    assert found["hardware"]["compute"] == 1e14
    assert found["optimal_tokens_s"] > 0


def test_a_saved_model_is_read_by_its_config(tmp_path, capsys):
    from anabranch.lm import Decoder, save_model

    save_model(tmp_path / "model", Decoder.Config(dim=32, num_layers=2).build())
    found = json.loads(out_of(capsys, str(tmp_path / "model"), "--hardware", "a100", "--json"))
    assert found["model"]["name"] == "model"
    assert found["model"]["parameters"] == pytest.approx(
        Decoder.Config(dim=32, num_layers=2).count().parameters, rel=0.01
    )


def test_search_writes_a_pipeline_that_is_read_again(tmp_path, capsys):
    path, picture = tmp_path / "pipeline.json", tmp_path / "pipeline.svg"
    words = (
        "llama-3-8b",
        "--hardware",
        "a100",
        "--batch",
        "512",
        "--prompt",
        "1024",
        "--output",
        "512",
        "--out",
        str(path),
        "--gantt",
        str(picture),
    )
    text = out_of(capsys, *words, "--budget", "2")
    assert "one after the other" in text
    assert "kqv.0" in text
    assert picture.read_text().startswith("<svg")
    before = path.read_text()
    found = json.loads(out_of(capsys, *words, "--budget", "0", "--json"))
    assert path.read_text() == before
    assert found["pipeline"]["speedup"] == json.loads(before)["speedup"] > 1


def test_what_is_known_is_listed(capsys):
    text = out_of(capsys)
    assert "llama-2-70b" in text
    assert "gaudi3" in text
    assert "mixtral-8x7b" in json.loads(out_of(capsys, "--json"))["models"]


FIGURES = {"compute": "1T", "bandwidth": "2T", "memory": "80G"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lama-3-8b", "--hardware", "a100"), "did you mean 'llama-3-8b'"),
        (("llama-3-8b", "--hardware", "a10"), "did you mean 'a100'"),
        (("llama-3-8b", "--hardware", "compute=1T,bandwith=2"), "bandwith=2"),
        (("llama-3-8b", "--hardware", "compute=1T,memory=80G"), "has no bandwidth"),
        (("llama-3-8b", "--hardware", "a100", "--dtype", "fp4"), "--dtype is 'fp4'"),
        (("llama-2-70b", "--hardware", "a100", "--devices", "1"), "137,950,658,560 of weights"),
        (("llama-3-8b", "--hardware", "none.json"), "cannot read none.json"),
        (("no/such/model", "--hardware", "a100"), "no model at"),
        *(
            (
                (
                    "llama-3-8b",
                    "--hardware",
                    ",".join(f"{name}={number}" for name, number in {**FIGURES, part: figure}.items()),
                ),
                part,
            )
            for part in ("compute", "bandwidth", "memory", "network")
            for figure in ("1e400T", "1e300P", "1e-320", "inf", "nan", "0" if part != "network" else "-1")
        ),
        *((("llama-3-8b", "--hardware", "a100", "--prompt", number), "prompt") for number in ("inf", "nan", "1e300")),
        *((("llama-3-8b", "--hardware", "a100", "--output", number), "output") for number in ("inf", "nan", "1e300")),
        (("llama-3-8b", "--hardware", "a100", "--batch", "9" * 400), "dense_batch"),
        (("llama-3-8b", "--hardware", "a100", "--devices", "9" * 400), "num_devices"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["plan", *words]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert message in told.err
    assert told.out == ""


def test_share_tables_are_read(tmp_path, capsys):
    from anabranch.serving.planning import PAPER_TABLE

    path = tmp_path / "shares.json"
    path.write_text(json.dumps(PAPER_TABLE.to_dict()))
    words = ("llama-3-8b", "--hardware", "a100", "--search", "--budget", "0", "--shares", str(path))
    assert "pipeline" in out_of(capsys, *words)
    path.write_text("{}")
    assert main(["plan", *words]) == 2
    assert "not a table of shares" in capsys.readouterr().err


def test_a_profile_that_was_saved_is_read(tmp_path, capsys):
    path = tmp_path / "mine.json"
    first = json.loads(
        out_of(
            capsys,
            "llama-3-8b",
            "--hardware",
            "compute=100T,bandwidth=1T,memory=80G",
            "--save-hardware",
            str(path),
            "--json",
        )
    )
    again = json.loads(out_of(capsys, "llama-3-8b", "--hardware", str(path), "--json"))
    assert again == first
    before = path.read_bytes()
    assert main(["plan", "llama-3-8b", "--hardware", str(path), "--devices", "4", "--save-hardware", str(path)]) == 2
    assert "mine.json is read, and would be lost if it were written" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_this_machine_is_measured(tmp_path, monkeypatch, capsys):
    import functools

    from anabranch.serving.planning import measure

    quick = functools.partial(measure.measure, seconds=0.01, stream_bytes=1 << 20)
    monkeypatch.setattr(measure, "measure", quick)
    monkeypatch.setattr(
        measure, "measure_shares", functools.partial(measure.measure_shares, seconds=0.01, stream_bytes=1 << 20)
    )
    out = tmp_path / "pipeline.json"
    assert main(["plan", "demo", "--batch", "512", "--out", str(out), "--budget", "0.1", "--json"]) == 0
    told = capsys.readouterr()
    assert "measuring how operations slow each other" in told.err
    assert json.loads(told.out)["pipeline"]["key"]["table"]["machine"]
    before = out.read_bytes()
    # Measured anew, to other figures; the machine is the same, and so is the pipeline.
    monkeypatch.setattr(sys.modules["anabranch.serving.planning.search"], "search", None)
    assert main(["plan", "demo", "--batch", "512", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pipeline"]["period_s"] == json.loads(before)["period_s"]
    assert out.read_bytes() == before
    found = read_hardware("cpu", "float32")
    assert found.compute > 1e8
    assert found.memory_bandwidth > 1e7
    assert found.network_bandwidth == 0
    with pytest.raises(ConfigError, match="no hardware"):
        read_hardware("zzz")
