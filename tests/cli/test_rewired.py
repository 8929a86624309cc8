"""``--rewire`` of conversations: what ``generate`` keeps in a file, and ``chat`` from message to message."""

import io
import json
import os
from dataclasses import replace

import pytest

from anabranch.adapters.rewiring import Rerouter, Rewiring
from anabranch.cli.rewired import KeptState, library_fields
from anabranch.data import ByteTokenizer
from anabranch.errors import DataError
from anabranch.lm import Decoder, SamplingConfig, load_model, save_model
from anabranch.nn import MoE, SelfAttention

SETTINGS = Rewiring(interval=4, eta=0.5, steps=2, scale_step=False, least_tail=4)
OPTIONS = [
    "--rewire",
    *(f"--rewire-set={name}={json.dumps(getattr(SETTINGS, name))}" for name in ("interval", "eta", "steps")),
    "--rewire-set=scale_step=false",
    "--rewire-set=least_tail=4",
]
GREEDY = SamplingConfig(max_tokens=9, temperature=0)
PROMPTS = ["def add(a, b): return a + b\n", "def add(a, b): return a + b\nand what comes then"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewired") / "moe"
    body = {"dim": 16, "num_layers": 2, "attention": SelfAttention.Config(num_heads=2), "init_std": 0.4}
    layer = MoE.Config(num_experts=4, hidden_dim=16)
    save_model(folder, Decoder.Config(**body, feed_forward=layer).build(seed=0), ByteTokenizer())
    return folder


def continued(mixture, prompts, encode, config=SETTINGS):
    """(tokens of each, the state behind all) as the library goes on with one state."""
    model, tokenizer = load_model(mixture)
    rerouter = Rerouter(model, config)
    state, made = rerouter.new_state(), []
    sampling = GREEDY.replace(stop=tuple(tokenizer.stop_ids))
    for prompt in prompts:
        state.go_on()
        made += rerouter.generate([encode(tokenizer, prompt)], sampling, states=[state])
    return made, rerouter.told_state(state)


def test_generate_goes_on_with_the_state_of_a_file(mixture, tmp_path, here):
    line = ["generate", mixture, "--max-tokens", 9, "--temperature", 0, *OPTIONS, "--json"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    code, out, err = here(*line, "--prompt", PROMPTS[0], "--rewire-save", one)
    assert (code, err) == (0, "")
    first = json.loads(out)
    code, out, err = here(*line, "--prompt", PROMPTS[1], "--rewire-load", one, "--rewire-save", two)
    assert (code, err) == (0, "")
    second = json.loads(out)
    made, told = continued(mixture, PROMPTS, lambda tokenizer, text: tokenizer.encode(text))
    assert [first["token_ids"], second["token_ids"]] == made
    kept = json.loads(two.read_text())
    assert {**kept, "seconds": 0} == {**told, "seconds": 0}
    assert (first["rewiring"]["steps"], second["rewiring"]["steps"]) == (6, 12)
    assert len(second["rewiring"]["phases"]) == 3
    code, out, _ = here(*line, "--prompt", PROMPTS[1])
    assert json.loads(out)["rewiring"]["phases"][0]["loss_before"] != second["rewiring"]["phases"][0]["loss_before"]


def test_limits_are_of_each_line(mixture, tmp_path, here):
    line = ["generate", mixture, "--max-tokens", 2, "--json", *OPTIONS, "--rewire-set=most_steps=1", "-p", PROMPTS[0]]
    assert here(*line, "--rewire-save", tmp_path / "a.json")[0] == 0
    code, out, _ = here(*line, "--rewire-load", tmp_path / "a.json")
    assert (code, json.loads(out)["rewiring"]["steps"]) == (0, 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read"),
        ("", "cannot read"),
        ("[]", "it holds a list"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "cannot be gone on with: it is no state of a rewired request"),
        ({"delta": [[0.0] * 4, [0.0, 0.0, "1e999", 0.0]]}, "its delta[1][2] is inf"),
        ({"model": "rt_0123456789abcdef"}, "it is of the routers 'rt_0123456789abcdef'"),
        ({"delta": [[0.0] * 4]}, "its delta is 1 lists; it must be 2 lists"),
    ],
)
def test_a_file_that_is_no_state_of_the_model(mixture, tmp_path, here, content, says):
    place = tmp_path / "state.json"
    if isinstance(content, dict):
        told = continued(mixture, [], None)[1]
        place.write_text(json.dumps({**told, **content}).replace('"1e999"', "1e999"))
    elif content is not None:
        place.write_text(content)
    saved = tmp_path / "out.json"
    saved.write_text("as it was")
    line = ["--rewire", "--rewire-load", place, "--rewire-save", saved, "--max-tokens", 2]
    code, out, err = here("generate", mixture, "-p", "x", *line)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert str(place) in err
    assert err.count("\n") == 1
    assert saved.read_text() == "as it was"


def test_what_does_not_go_together(mixture, tmp_path, here):
    place = tmp_path / "state.json"
    for option in ("--rewire-load", "--rewire-save"):
        code, _, err = here("generate", mixture, "-p", "x", option, place)
        assert (code, err) == (2, f"error: {option} is given, but --rewire is not; give both\n")
    place.write_text("x" * 100)
    code, _, err = here("generate", mixture, "-p", "x", "--rewire", "--rewire-load", place, "--rewire-save", place)
    assert (code, "would be lost if it were written" in err) == (2, True)
    inside = mixture / "state.json"
    code, _, err = here("generate", mixture, "-p", "x", "--rewire", "--rewire-save", inside)
    assert (code, inside.exists()) == (2, False)
    assert "would be lost" in err
    with place.open("wb") as file:
        file.truncate((64 << 20) + 1)
    code, _, err = here("generate", mixture, "-p", "x", "--rewire", "--rewire-load", place)
    assert (code, "a state has at most 67,108,864" in err) == (2, True)
    for more, says in (
        (["--rewire-set", "steps=3"], "--rewire-set is given, but --rewire is not"),
        (["--rewire", "--streams", 2], "--streams cannot be combined with --rewire"),
        (["--rewire", "--min-p", 0.1], "--min-p cannot be combined with --rewire"),
        (["--rewire", "--memory", "1GB"], "--memory cannot be combined with --rewire"),
        (["--rewire", "--quantize", "int8", "--expert-budget", "1MB"], "no gradient, which --rewire needs"),
    ):
        code, _, err = here("chat", mixture, "-m", "x", *more)
        assert (code, says in err) == (2, True), err


def talk(here, monkeypatch, mixture, lines, *options):
    """(code, stdout, stderr) of a conversation of these lines."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return here("chat", mixture, "--temperature", 0, "--max-tokens", 9, *OPTIONS, *options)


def in_library(mixture, messages, config=SETTINGS):
    """(answers, state) of a conversation of these messages, with one state."""
    tokenizer = load_model(mixture)[1]
    said = []

    def encode(tokenizer, message):
        said.append({"role": "user", "content": message})
        return tokenizer.encode_chat(tokenizer.apply_chat_template(said))

    made = []
    model, _ = load_model(mixture)
    rerouter = Rerouter(model, config)
    state, sampling = rerouter.new_state(), GREEDY.replace(stop=tuple(tokenizer.stop_ids))
    for message in messages:
        state.go_on()
        [ids] = rerouter.generate([encode(tokenizer, message)], sampling, states=[state])
        made.append(tokenizer.decode(ids))
        said.append({"role": "assistant", "content": made[-1]})
    return made, state


def shown(answers):
    from anabranch.cli.output import visible

    return "".join(f"{visible(answer)}\n" for answer in answers)


def test_chat_keeps_vectors_from_message_to_message_until_reset(mixture, monkeypatch, here):
    messages = ["who is it that says this?", "and what comes then?", "nothing"]
    answers, state = in_library(mixture, messages)
    assert not state.is_zero
    anew = [in_library(mixture, messages[:1])[0][0]]
    code, out, err = talk(here, monkeypatch, mixture, [*messages, "/reset", messages[0]])
    assert (code, err) == (0, "")
    assert out == shown([*answers, *anew])
    # A limit is of each message.
    few = replace(SETTINGS, most_steps=1)
    code, out, err = talk(here, monkeypatch, mixture, messages, "--rewire-set=most_steps=1")
    assert (code, out) == (0, shown(in_library(mixture, messages, few)[0]))
    assert "note: routers were not turned: the request has taken its 1 steps (most_steps)" in err


def test_a_message_that_cannot_be_answered_takes_back_what_was_fitted_to_it(mixture, monkeypatch, here):
    messages = ["who is it that says this?", "and what comes then?"]
    answers, _ = in_library(mixture, messages)
    adapt, calls = Rerouter._adapt, []

    def failing(self, *arguments, **more):
        calls.append(1)
        reports = adapt(self, *arguments, **more)
        if len(calls) == 5:
            from anabranch.errors import CapacityError

            raise CapacityError("no room")
        return reports

    monkeypatch.setattr(Rerouter, "_adapt", failing)
    code, out, err = talk(here, monkeypatch, mixture, [messages[0], "something that fails", messages[1]])
    assert (code, err) == (0, "error: no room\n")
    assert out.startswith(shown(answers[:1]))
    assert out.endswith(shown(answers[1:]))


def test_one_message_tells_how_routers_were_turned(mixture, here):
    line = ["chat", mixture, *OPTIONS, "--json", "--temperature", 0]
    code, out, err = here(*line, "-m", "who is it that says this?", "--max-tokens", 5)
    assert (code, err) == (0, "")
    told = json.loads(out)["rewiring"]
    assert (told["steps"], len(told["phases"])) == (4, 2)
    code, out, err = here(*line, "-m", "who is it that says this?", "--max-tokens", 2, "--expert-budget", "16KiB")
    assert (code, json.loads(out)["rewiring"]["steps"]) == (0, 2)


def test_what_is_no_file_is_told_before_the_model_is_read(here, tmp_path):
    """A device has no end, a pipe waits for ever, and where the state cannot be written it would be lost with all tokens."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("{}")
    for line, said in (
        (["--rewire-load", "/dev/zero"], "/dev/zero is no file; give one that --rewire-save wrote"),
        (["--rewire-load", tmp_path / "pipe"], "pipe is no file"),
        (["--rewire-save", "/dev/full"], "it is a device or a pipe, not a file"),
        (["--rewire-save", tmp_path / "file" / "a.json"], "cannot write"),
        (["--rewire-save", tmp_path], "it is a folder; choose another name"),
    ):
        code, out, err = here("generate", tmp_path / "no-model", "-p", "x", "--rewire", *line)
        assert (code, out, said in err) == (2, "", True), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_a_state_is_read_up_to_its_greatest_size(tmp_path, monkeypatch):
    monkeypatch.setattr("anabranch.cli.rewired.MOST_STATE_BYTES", 10)
    place = tmp_path / "state.json"
    for size in (2, 10):
        place.write_text(f"{'{}':<{size}}")
        assert KeptState(rewire_load=place).read("model", rewires=True) == {}
    place.write_text(f"{'{}':<11}")
    with pytest.raises(DataError, match=r"state\.json has 11 bytes; a state has at most 10$"):
        KeptState(rewire_load=place).read("model", rewires=True)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, ""),
        ({"min_p": 0.0, "repetition_penalty": 1.0}, ""),
        ({"min_p": 0.1}, "min_p"),
        ({"min_p": 0.0, "repetition_penalty": 1.1}, "repetition_penalty"),
        ({"min_p": 0.1, "repetition_penalty": 1.1}, "min_p and repetition_penalty"),
    ],
)
def test_what_its_makers_asked_for_and_the_library_has_not_is_noted(fields, named, capsys):
    said = f"note: the model's generation_config.json has {named}, which --rewire leaves out\n" if named else ""
    for talks in (True, False):
        assert library_fields({**fields, "temperature": 0}, "--rewire", talks=talks) == {"temperature": 0}
        assert capsys.readouterr() == ("", said if talks else "")


def test_why_routers_were_not_turned_is_told_once(mixture, here):
    line = ["generate", mixture, "-p", PROMPTS[0], "--max-tokens", 13, "--temperature", 0, *OPTIONS]
    line.append("--rewire-set=most_steps=1")
    code, out, _ = here(*line, "--json")
    skipped = [phase["skipped"] for phase in json.loads(out)["rewiring"]["phases"] if phase["skipped"]]
    assert (code, len(skipped), len(set(skipped))) == (0, 4, 1)
    code, _, err = here(*line)
    assert code == 0
    assert [text for text in err.splitlines() if "not turned" in text] == [
        f"note: routers were not turned: {skipped[0]}"
    ]
