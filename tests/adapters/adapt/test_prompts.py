"""What is written around prompts: the same tokens in training, in measurements and where the model is asked."""

import json
import shutil

import pytest

from anabranch.adapters.adapt import measure_rows, read_rows
from anabranch.adapters.adapt.prompts import asked_ids, common_template, template_in, write_template
from anabranch.data import ByteTokenizer
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import load_model
from anabranch.train import Trainer
from every_method import FOLDERS, make_place, name_of, run_of

BYTES = ByteTokenizer.Config().build()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("prompts"))


def test_a_template_is_written_around_a_prompt():
    assert bytes(asked_ids(BYTES, "a {b}", "Q: {prompt}\nA: ")) == b"Q: a {b}\nA: "


def test_the_form_of_a_chat_is_what_chat_gives_the_model():
    messages = [{"role": "user", "content": "how many?"}]
    assert asked_ids(BYTES, "how many?", "chat") == BYTES.encode_chat(BYTES.apply_chat_template(messages))


def test_rows_are_learned_in_the_form_of_a_chat(place, tmp_path):
    run = run_of("lora", place, steps=1)
    trainer = Trainer(run.replace(task=run.task.replace(template="chat")), tmp_path / "run")
    row = read_rows(place / "rows.jsonl")[0]
    asked = asked_ids(trainer.task.tokenizer, row.prompt, "chat")
    learned = trainer.task.learned
    assert asked in [
        ids[:start].tolist() for ids, start in zip(learned.token_NL, learned.start_N.tolist(), strict=True)
    ]
    trainer.fit()
    written = trainer.task.write(tmp_path / "adapter")
    assert template_in(written.folder) == "chat"
    # It takes the place of an adapter with its note, of both forms.
    assert template_in(trainer.task.write(tmp_path / "adapter").folder) == "chat"


@pytest.mark.parametrize("case", ["dynmole", "lora"])
def test_a_note_is_replaced_with_its_adapter(place, tmp_path, case):
    trainer = Trainer(run_of(case, place, steps=1), tmp_path / "run")
    trainer.fit()
    for _ in range(2):
        assert template_in(trainer.task.write(tmp_path / "adapter").folder) == "{prompt}\n"


def noted(place, name, template, out):
    """A copy of an adapter with such a note."""
    shutil.copytree(place / name, out / name)
    if template is not None:
        write_template(out / name, template)
    return out / name


@pytest.mark.parametrize("case", ["gate from adapter", "lora_mixer from adapters", "mhr from full", "poly from mu"])
def test_what_begins_from_adapters_writes_prompts_as_they_learned_them(place, tmp_path, case):
    """If all of them say the same, and nobody another thing."""
    names = sorted(
        {name for told in FOLDERS[name_of(case)].values() for name in ([told] if isinstance(told, str) else told)}
    )
    for name in ("base", "rows.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    for name in names:
        noted(place, name, "Q: {prompt} A:", tmp_path)
    run = run_of(case, tmp_path, steps=1)
    assert run.task.build().template == "Q: {prompt} A:"
    assert run.task.replace(template="chat").build().template == "chat"
    trainer = Trainer(run, tmp_path / "run")
    trainer.fit()
    assert template_in(trainer.task.write(tmp_path / "adapter").folder) == "Q: {prompt} A:"
    (tmp_path / names[0] / "prompt.json").unlink()
    assert run.task.build().template == "{prompt}\n"


def test_several_adapters_have_a_form_in_common_or_none(place, tmp_path):
    one = noted(place, "law", "chat", tmp_path)
    assert common_template([one]) == "chat"
    assert common_template([]) is None
    other = noted(place, "sql", None, tmp_path)
    assert common_template([one, other]) is None
    write_template(other, "chat")
    assert common_template([one, other]) == "chat"
    write_template(other, "{prompt}")
    assert common_template([one, other]) is None


def test_measured_rows_are_asked_in_the_form_that_is_said(place):
    model, tokenizer = load_model(place / "base")
    rows = read_rows(place / "rows.jsonl")[:4]
    found = {
        form: measure_rows(model, tokenizer, rows, template=form).all.nats_per_token for form in ("chat", "{prompt}\n")
    }
    wide = BYTES.apply_chat_template([{"role": "user", "content": "{prompt}"}])
    assert found["chat"] == pytest.approx(measure_rows(model, tokenizer, rows, template=wide).all.nats_per_token)
    assert found["chat"] != pytest.approx(found["{prompt}\n"])


def test_what_is_no_template(place, tmp_path):
    with pytest.raises(
        ConfigError, match=r"template is 'x'; \{prompt\} in it stands for what is asked, or it is 'chat'"
    ):
        run_of("lora", place).task.replace(template="x")
    assert template_in(tmp_path) is None
    for bad in ("[]", '{"template": 3}', "{}", '{"template": ""}', '{"template": "Chat"}', '{"template": "{prompt"}'):
        (tmp_path / "prompt.json").write_text(bad)
        with pytest.raises(CheckpointError, match=r"prompt\.json"):
            template_in(tmp_path)
    write_template(tmp_path, "é {prompt}")
    assert json.loads((tmp_path / "prompt.json").read_text()) == {"template": "é {prompt}"}
