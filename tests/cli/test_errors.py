"""Every mistake of a user's: one line on stderr, exit code 2, nothing on stdout, no traceback."""

import json
import re
import resource
import shutil
import socket
import threading

import pytest

from anabranch.cli.main import main


def one_line(found):
    code, out, err = found
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "no such command 'trian'; did you mean 'train'? (see anabranch --help)"),
        ("train --stps 5 --out x", "no such option: --stps; did you mean --steps? (see anabranch train --help)"),
        (
            "serve m --threads 4",
            "no such option: --threads; it is --set engine.threads=N here (see anabranch serve --help)",
        ),
        (
            "serve m --max-model-len=9",
            "no such option: --max-model-len; it is --set engine.max_positions=N here (see anabranch serve",
        ),
        ("train", "missing option '--out' (see anabranch train --help)"),
        ("eval", "missing argument 'MODEL' (see anabranch eval --help)"),
        ("generate x --prompt", "option '--prompt' requires an argument (see anabranch generate --help)"),
        (
            "generate x --prompt y --temperature -1",
            "--temperature is '-1': it must be greater than or equal to 0 (see anabranch generate --help)",
        ),
        (
            "convert a b --to=hf",
            "--to is 'hf': 'hf' is not one of 'native', 'huggingface' (see anabranch convert --help)",
        ),
        (
            "convert a b --to native --quantize int3",
            "--quantize is 'int3': 'int3' is not one of 'int8', 'int4' (see anabranch convert --help)",
        ),
        ("convert a b --to native --quantize int4 --group 40", "group is 40; it must be a multiple of 32"),
        ("convert a b --to native --group 64", "group is 64, but there is no quantize to use it; say int8 or int4"),
        (
            "convert a b --to huggingface --quantize int8",
            "quantize is 'int8', but only 'native' folders hold quantised weights",
        ),
        ("train dem --out x", "no preset 'dem'; did you mean 'demo'?"),
        ("train demo --size huge --out x", "size is 'huge'; use one of tiny, small, base"),
        ("train demo --out x --set nothing", "cannot read 'nothing'; write path=value"),
        (
            "train demo --out x --set model.dimm=3",
            "cannot set model.dimm: model has no field 'dimm'; did you mean 'dim'?",
        ),
        ("train demo --out x --steps -5", "train.steps is -5; it must be greater than or equal to 0"),
        ("train demo --out x --set train.precision=float8", "train.precision is 'float8'; it must be"),
        (
            "train demo --out x --set model.feed_forward.router.select.top_k=99",
            "select takes 99 experts of a token, but num_experts is 8",
        ),
        ("train demo --out x --set model.feed_forward.reuse=9", "reuse is 9, but the model has 4 routed layers"),
        *(
            (
                f"{command} --config a.toml --config b.toml",
                "--config is given 2 times (a.toml, b.toml); give one file",
            )
            for command in ("train demo --out x", "serve x --check")
        ),
        *(
            (f"gateway {command} -c a.toml --config b.toml", "--config is given 2 times (a.toml, b.toml)")
            for command in ("serve --check", "add-model m", "collect --judge exact --out o.jsonl")
        ),
        ("train demo --out x --config nowhere.toml", "cannot read nowhere.toml: no such file or directory"),
        ("train --out nowhere --resume", "no training run in nowhere"),
        ("eval nowhere", "no model at nowhere"),
        ("info nowhere", "'nowhere' is neither a model nor a preset; presets: demo, "),
        ("info demo --dtype int3", "--dtype is 'int3'; use one of float32"),
        ("report nowhere.parquet --out x", "no routing trace at nowhere.parquet"),
        ("study rexmo", "no study 'rexmo'; did you mean 'rexmoe'?"),
        ("study rexmoe --arms vanila --out x", "study 'rexmoe' has no arm 'vanila'; known: vanilla, "),
        ("study rexmoe --seeds one --out x", "--seeds is 'one'; write them as 0,1,2 or 0-4"),
        ("study rexmoe --judge-only --out x", "no finished run of study 'rexmoe' in x/rexmoe"),
        ("compare moe --out x", "1 design(s) to compare; name two or more"),
        ("compare --out x", "0 design(s) to compare; name two or more"),
        ("compare --preset famly --out x", "no group of presets 'famly'; known: family"),
        ("compare moe moe --out x", "design 'moe' is named twice; give the second another file name"),
        (
            "compare moe dense --out x --set data.validation_fraction=0.0",
            "data.validation_fraction is 0, so there would be",
        ),
        ("compare moe dens --out x", "no preset 'dens'; did you mean 'dense'?"),
    ],
)
def test_mistakes(here, work, arguments, message):
    assert message in one_line(here(*arguments.split()))
    assert not (work / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval trained --data nowhere.txt", "no corpus at nowhere.txt"),
        ("eval trained --dtype floot32", "--dtype is 'floot32'; did you mean float32?"),
        ("generate trained -p a --device meta", "device 'meta' is not available: it holds no numbers"),
        ("chat trained --message a --device nowhere", "device 'nowhere' is not available: "),
        ("eval trained --device cuda:77", "device 'cuda:77' is not available"),
        ("generate trained --prompt x --top-p 3", "top_p is 3.0; it must be 0 to 1"),
        ("generate trained --prompt=", "--prompt is empty; give at least one character"),
        ("train demo --out trained", "trained already holds a run (config.json); resume it with --resume"),
        (
            "train --out trained --resume --set model.dim=64",
            "cannot resume trained with another config: model.dim was 32",
        ),
        ("train nosuchpreset --out trained --resume", "no preset 'nosuchpreset'; known: demo, "),
        (
            "train dense --out trained --resume",
            "trained holds a run whose layers are 'rexmoe', and those of preset 'dense'",
        ),
        ("train --size small --out trained --resume", "--size is 'small', but a resumed run keeps the size"),
        ("chat trained --json", "--json needs a message; give one with --message"),
        ("convert trained text --to native", "text is not a saved model (it holds alpha), so it is not replaced"),
    ],
)
def test_mistakes_about_a_model(trained, here, arguments, message):
    assert message in one_line(here(*arguments.split()))


@pytest.mark.parametrize("command", ["train demo", "rl train cartpole", "rl train router-r1"])
def test_a_folder_with_a_run_is_refused_with_what_its_command_has(here, work, command):
    """``auto`` is of ``train`` alone; what a message says to do can be done."""
    held = work / "held"
    held.mkdir(exist_ok=True)
    (held / "config.json").write_text("{}")
    message = one_line(here(*command.split(), "--out", "held"))
    assert "held already holds a run (config.json); resume it with --resume, or choose another folder" in message
    assert ("--resume auto" in message) == (command == "train demo")


def test_unreadable_text(trained, here, work):
    (work / "noise.bin").write_bytes(bytes(range(256)) * 50)
    message = one_line(here("eval", "trained", "--data", "noise.bin"))
    assert "noise.bin" in message


def test_config_that_is_not_toml(here, work):
    (work / "bad.toml").write_text("model = [")
    assert "bad.toml is not TOML" in one_line(here("train", "--out", "x", "--config", "bad.toml"))


DEEP = {
    "names": ".".join("a" * 3000) + ".b = 1",
    "names of a header": "[" + ".".join("a" * 3000) + "]\nb = 1",
    "tables": "x = " + "{a = " * 3000 + "1" + "}" * 3000,
    "lists": "a = " + "[" * 50_000,
    "lists that end": "a = " + "[" * 200 + "]" * 200,
    "long integer": "a = " + "9" * 5000,
}


@pytest.mark.parametrize("door", ["train --out x", "serve trained", "compare bad.toml --out x", "gateway serve"])
@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in DEEP.items()])
def test_config_that_is_deep_or_has_a_long_integer_is_not_toml(here, work, door, text):
    (work / "bad.toml").write_text(text)
    arguments = door.split() if "bad.toml" in door else [*door.split(), "--config", "bad.toml"]
    message = one_line(here(*arguments))
    assert re.match(
        r"bad\.toml(:1)?(:| is) not TOML: (it is nested too deeply|exceeds the limit .*digits)", message, re.I
    )


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in DEEP.items()])
def test_assignments_that_are_deep_or_have_a_long_integer_are_told(here, text):
    name, _, value = text.partition(" = ")
    message = one_line(here("train", "--out", "x", "--set", f"model.{name}={value}".replace("\n", "")))
    assert re.match(r"cannot set '?model\.", message)


def test_config_with_an_unknown_field(here, work):
    (work / "wrong.toml").write_text("preset = 'moe'\n[train]\nstep = 3\n")
    message = one_line(here("train", "--out", "x", "--config", "wrong.toml"))
    assert message == "cannot set train.step: train has no field 'step'; did you mean 'steps'?"


@pytest.fixture
def damaged(trained, work):
    """A copy of the trained run, and the folder of its newest checkpoint."""
    shutil.rmtree(work / "damaged", ignore_errors=True)
    shutil.copytree(work / "trained", work / "damaged")
    return max((work / "damaged" / "checkpoints").glob("step-*"))


def test_weights_cut_short(damaged, here):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in one_line(here("eval", "damaged"))
    assert "model.safetensors" in one_line(here("train", "--out", "damaged", "--resume", "--quiet"))


def test_config_of_a_model_damaged(damaged, here):
    (damaged / "config.json").write_text("{")
    assert "config.json" in one_line(here("info", damaged))


def test_trace_damaged(here, work):
    (work / "broken.parquet").write_bytes(b"PAR1 nothing")
    assert "broken.parquet" in one_line(here("report", "broken.parquet", "--out", "x"))


def test_dense_model_has_no_routing_to_report(here, tiny, data):
    # Dense layers are as wide as K experts; the option for experts alone does not apply to them.
    options = [option for option in tiny if "hidden_dim" not in option]
    assert here("train", "dense", "--out", "dense", "--steps", 1, "--quiet", *options, *data)[0] == 0
    message = one_line(here("report", "dense", "--out", "x"))
    assert message == "dense has no routed layers, so there is no routing to report"


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_full_disk(cli, work, tiny, data, trained):
    done = cli("train", "demo", "--out", "full", "--steps", 10, "--quiet", *tiny, *data, preexec_fn=limit_files)
    assert "no room left on disk" in one_line((done.returncode, done.stdout, done.stderr))


def test_place_that_cannot_be_written(here, tiny, data):
    message = one_line(here("train", "demo", "--out", "/proc/nowhere", "--steps", 1, "--quiet", *tiny, *data))
    assert "/proc/nowhere" in message


def test_the_same_in_a_process_of_its_own(cli):
    done = cli("eval", "nowhere", "--json")
    one_line((done.returncode, done.stdout, done.stderr))


def test_json_on_stdout_is_one_object(trained, here):
    for arguments in ("info trained --json", "info --json", "study --json", "eval trained --json --tokens 200"):
        code, out, _ = here(*arguments.split())
        assert code == 0
        assert isinstance(json.loads(out), dict)


def test_options_of_other_servers_are_settings_that_there_are():
    from anabranch.cli.main import _SERVE_SETTINGS
    from anabranch.serving.config import ServingConfig

    for setting in _SERVE_SETTINGS.values():
        group, _, name = setting.partition("=")[0].partition(".")
        assert group == "engine"
        assert hasattr(ServingConfig(), name)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("gateway route x --router r --trade-off much", "--trade-off is 'much': it must be a valid number (see "),
        ("gateway serve --port much", "--port is 'much': it must be a valid integer (see "),
    ],
)
def test_a_value_is_told_in_our_words(capsys, line, told):
    assert main(line.split()) == 2
    assert told in capsys.readouterr().err


def test_a_gateway_that_is_not_there_or_is_none_is_told_in_our_words(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def speak():
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        speaker = threading.Thread(target=speak)
        speaker.start()
        assert main(["gateway", "add-model", "x", "--url", f"http://127.0.0.1:{port}"]) == 2
        speaker.join()
    assert (
        f"http://127.0.0.1:{port} does not answer as a gateway does: what it sent is no JSON" in capsys.readouterr().err
    )
    assert main(["gateway", "add-model", "x", "--url", f"http://127.0.0.1:{port}"]) == 2
    assert f"cannot reach http://127.0.0.1:{port}: connection refused; give --url" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["localhost:8080", "http://", "http://[your-host]:8080", "http://a:port"])
def test_an_address_of_a_gateway_that_is_none_is_told(capsys, url):
    assert main(["gateway", "add-model", "x", "--url", url]) == 2
    assert f"--url is {url!r}; write http://HOST:PORT" in capsys.readouterr().err


def test_what_a_file_or_a_server_said_steers_no_terminal(capsys):
    assert main(["eval", "\x1b]0;owned\x07\x1b[2Jno-model"]) == 2
    told = capsys.readouterr().err
    assert "no-model" in told
    assert not {"\x1b", "\x07"} & set(told)
