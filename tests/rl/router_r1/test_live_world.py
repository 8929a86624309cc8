"""Router-R1 with a pool that is there: what its calls may cost at most, and how often they are made."""

import json

import pytest

from anabranch.rl.router_r1 import LiveWorld, PoolModel, PoolPrice, word_tokenizer
from anabranch.routers.router_r1.grammar import TAGS
from anabranch.routers.router_r1.kept_pool import KeptPool
from scripted_endpoint import chat, endpoint

# A token of many letters.
LONG = "Donaudampfschifffahrtsgesellschaft"


@pytest.fixture
def files(tmp_path):
    words = [*(f"<{tag}>" for tag in TAGS), *(f"</{tag}>" for tag in TAGS), "-", ":", "who", "small", LONG]
    word_tokenizer(words).save(tmp_path)
    rows = [{"question": f"who {number} ?", "answers": ["Ann"]} for number in range(30)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def world(files, url, **fields):
    models = {"small": PoolModel(price=PoolPrice(output_usd=1.0, input_usd=50.0), base_url=url)}
    given = {"questions": str(files / "questions.jsonl"), "tokenizer": str(files), "models": models, "turn_tokens": 20}
    return LiveWorld(LiveWorld.Config(**(given | {"held_out": 0.3} | fields)))


@pytest.mark.parametrize("word", [LONG, "who", "\u4e2d" * 30])
def test_no_question_of_a_turn_may_cost_more_than_is_told_first(files, word):
    """A turn of so many tokens was taken for so many bytes."""
    made = world(files, "http://127.0.0.1:1/v1")
    most = made.most_usd_of_call()
    turn = f"<search>small:{' '.join([word] * made.config.turn_tokens)}</search>"
    tokens = made.tokenizer.encode(turn)[: made.config.turn_tokens]
    query = made.tokenizer.decode(tokens)
    assert made.pool.live.most_usd("small", query) <= most
    made.close()


def test_a_model_that_has_too_much_to_do_is_asked_again(files, monkeypatch):
    """One 429 was no reply, and taught a router that the model is useless."""
    monkeypatch.setitem(KeptPool.__init__.__kwdefaults__, "wait_s", 0.0)
    refused = iter([429, 503])

    def says(path, body):
        status = next(refused, 200)
        usage = {"usage": {"prompt_tokens": 3, "completion_tokens": 1}}
        return status, chat("Ann") | usage if status == 200 else {"error": {"message": "busy"}}, {}

    with endpoint(says) as (url, seen):
        made = world(files, url)
        play = made.asked("who ?", ("Ann",))
        asked = made.tokenizer.encode("<think> who </think> <search> small : who </search>")
        assert "None" not in made.tokenizer.decode(play.step(tuple(asked)).tokens)
        assert (len(seen), made.pool.calls, play.invalid) == (3, 3, 0)
        made.close()
    with endpoint(lambda *_: (400, {"error": {"message": "no such field"}}, {})) as (url, seen):
        made = world(files, url)
        play = made.asked("who ?", ("Ann",))
        play.step(tuple(asked))
        assert (len(seen), play.invalid) == (1, 1)
        made.close()
