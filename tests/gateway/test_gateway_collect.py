"""What the other models would have said: asked, judged, paid for once, gone on with."""

import asyncio
import contextlib
import json
import os
import re
import sqlite3
import stat
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cli.main import main
from anabranch.errors import DataError, InputError
from anabranch.gateway.collect import TAG, Collector
from anabranch.gateway.config import load_config
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.store import LedgerQuery, LedgerRow, Store, open_store
from anabranch.routers.data import load_outcomes
from anabranch.routers.judges import ModelJudge, ReferenceJudge, prompt_of, verdict
from anabranch.routers.strategies.training import share
from anabranch.web.api_error import ApiError

CONFIG = """
require_key = true
store = "{folder}/gateway.db"
fallbacks = {{ a = ["b"] }}
[log]
prompts = {prompts}
[strategies.try]
kind = "random"
models = ["a", "b"]
{models}
"""
MODEL = """
[[models]]
name = "{name}"
max_tokens = 20
price = {{ input_usd = 10, output_usd = 10 }}
deployments = [{{ provider = {{ kind = "mock", model = "{name}", reply = "{reply}", script = {script} }} }}]
"""
REPLIES = {"a": "a says it.", "b": "b says it.", "c": "c says it.", "judge": "verdict: A"}


def write(folder, prompts=True, scripts=None):
    models = "".join(
        MODEL.format(name=name, reply=reply, script=json.dumps((scripts or {}).get(name, [])))
        for name, reply in REPLIES.items()
    )
    path = folder / "gateway.toml"
    path.write_text(CONFIG.format(folder=folder, prompts=str(prompts).lower(), models=models))
    return path


def traffic(path, num=12, models=()):
    """Requests of a user, answered by a or b."""

    async def work():
        async with Gateway(load_config(path)) as gateway:
            secret, _ = await gateway.store.create_key(models=models)
            for number in range(num):
                talk = [{"role": "system", "content": "be brief"}] if number % 3 == 0 else []
                talk = [*talk, {"role": "user", "content": f"question {number}?"}]
                tools = {"tools": [{"type": "function", "function": {"name": "f"}}]} if number == 5 else {}
                await gateway.achat(
                    {"model": "auto/try", "messages": talk, **tools}, key=secret, headers={"x-task": "t"}
                )
            # The same again, which is no new question.
            await gateway.achat({"model": "a", "messages": [{"role": "user", "content": "Question  1?"}]}, key=secret)

    asyncio.run(work())


def references(folder, num=12):
    """Every third question has an answer that only c gives, the others one that a gives; one has none."""
    path = folder / "references.jsonl"
    rows = [{"query": f"question {n}?", "answer": "C says it" if n % 3 == 0 else "a says it"} for n in range(1, num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def collect(capsys, path, out, *arguments, code=0):
    capsys.readouterr()
    three = [word for name in "abc" for word in ("--model", name)]
    given = ["gateway", "collect", "-c", str(path), "--out", str(out), "--rate", "100000", *three, *map(str, arguments)]
    assert main([*given, "--json"]) == code
    said = capsys.readouterr()
    return json.loads(said.out) if code == 0 else said.err


def collected_rows(folder):
    async def work():
        async with open_store(str(folder / "gateway.db"), serves=False) as store:
            return await store.ledger(LedgerQuery(tag=TAG, limit=1000)), await store.budgets()

    return asyncio.run(work())


def test_a_log_becomes_a_table_of_all_outcomes(tmp_path, capsys):
    path, out = write(tmp_path), tmp_path / "outcomes.jsonl"
    traffic(path)
    before = open(path).read()
    done = collect(capsys, path, out, "--judge", "exact", "--references", references(tmp_path))
    # Of twelve, one has tools and one no reference; of each one answer was there.
    assert (done["questions"], done["calls"], done["reused"], done["unjudged"], done["failed"]) == (10, 20, 10, 1, 0)
    rows, _ = collected_rows(tmp_path)
    assert len(rows) == 20
    assert all((row.status, row.attempts, row.requested) == ("ok", 1, row.model) for row in rows)
    data = load_outcomes(out)
    assert (data.models, set(data.task)) == (("a", "b", "c"), {"t"})
    assert np.isfinite(data.score_NM).all()
    for query, score, answers in zip(data.query, data.score_NM, data.answers, strict=True):
        is_third = int(query.split()[1].rstrip("?")) % 3 == 0
        assert score.tolist() == ([0, 0, 1] if is_third else [1, 0, 0])
        assert answers == {name: REPLIES[name] for name in "abc"}
    assert (data.cost_NM > 0).all()
    assert (
        sum(row.cost_nano for row in rows) < data.cost_NM.sum() * 1e9 + 0.5
    )  # the users' own answers are in the table too
    assert stat.S_IMODE(os.stat(out).st_mode) == 0o600
    again = collect(capsys, path, out, "--judge", "exact", "--references", tmp_path / "references.jsonl")
    assert (again["questions"], again["there"], again["calls"]) == (0, 10, 0)
    assert main(["gateway", "fit", str(out), "--out", str(tmp_path / "routers"), "--quiet", "--hold-out", "0.3"]) == 0
    assert main(["gateway", "eval", str(out), "--router", str(tmp_path / "routers"), "--quiet"]) == 0
    assert open(path).read() == before


def test_its_own_budget_ends_it_and_nothing_is_paid_twice(tmp_path, capsys):
    path, out = write(tmp_path), tmp_path / "outcomes.jsonl"
    traffic(path)
    options = ("--judge", "contains", "--references", references(tmp_path))
    first = collect(capsys, path, out, *options, "--budget", "0.0014")
    assert "budget of tag collect" in first["stopped"]
    assert 0 < first["questions"] < 10
    rows, [budget] = collected_rows(tmp_path)
    assert budget.spent_nano == sum(row.cost_nano for row in rows) <= budget.limit_nano
    assert budget.reserved_nano == 0
    # A line was cut off when the machine went down: its answers are still there.
    raw = out.read_bytes()
    out.write_bytes(raw[:-30])
    second = collect(capsys, path, out, *options, "--budget", "1")
    assert second["there"] == first["questions"] - 1
    rows, _ = collected_rows(tmp_path)
    assert len([row for row in rows if row.status == "ok"]) == 20
    assert len({line for line in out.read_text().splitlines() if json.loads(line)}) == 10


def test_a_model_that_fails_is_asked_again_by_the_next_run(tmp_path, capsys):
    path, out = write(tmp_path, scripts={"c": ["400"] * 4}), tmp_path / "outcomes.jsonl"
    traffic(path)
    first = collect(capsys, path, out, "--judge", "exact", "--references", references(tmp_path))
    assert (first["questions"], first["failed"]) == (6, 4)
    write(tmp_path)
    second = collect(capsys, path, out, "--judge", "exact", "--references", tmp_path / "references.jsonl")
    assert (second["questions"], second["calls"], second["reused"]) == (4, 4, 8)


def test_a_model_that_never_answers_is_named_and_how_to_leave_it_out(tmp_path, capsys):
    path, out = write(tmp_path, scripts={"c": ["400"] * 20}), tmp_path / "outcomes.jsonl"
    traffic(path, 12)
    asked = ["-c", str(path), "--out", str(out), "--judge", "exact", "--references", references(tmp_path)]
    assert main(["gateway", "collect", *map(str, asked), "--rate", "9999"]) == 2
    told = capsys.readouterr().err
    assert "Most often c: scripted failure; --model NAME, once for each of the others, leaves one out" in told


def test_it_says_what_it_has_spent_and_asked_and_why_something_came_to_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(REPLIES, "judge", "both are fine, I could not say")
    path, out = write(tmp_path, scripts={"c": ["400"]}), tmp_path / "outcomes.jsonl"
    traffic(path, 4)
    done = collect(capsys, path, out, "--judge", "judge")
    rows, _ = collected_rows(tmp_path)
    assert done["cost_usd"] == pytest.approx(sum(row.cost_nano for row in rows) / 1e9)
    assert done["cost_usd"] > 0
    assert (done["failed"], done["unjudged"], done["judge_calls"]) == (1, 3, 6)
    assert done["unreadable"] == ["both are fine, I could not say"]
    [(why, count)] = done["unanswered"].items()
    assert why.startswith("c: ")
    assert count == 1
    assert main(["gateway", "collect", "-c", str(path), "--out", str(out), "--judge", "judge", "--rate", "9999"]) == 0
    said = capsys.readouterr().out
    assert "cost    $" in said
    assert "judged  " in said
    assert re.search(r"^no answer 1 time: c: ", said, re.MULTILINE)
    assert "unclear a judgement that ends in 'both are fine, I could not say'" in said


def test_a_run_that_its_budget_stops_before_it_has_anything_is_no_success(tmp_path, capsys):
    path, out = write(tmp_path), tmp_path / "outcomes.jsonl"
    traffic(path, 4)
    err = collect(capsys, path, out, "--judge", "judge", "--budget", "0.000001", code=2)
    assert f"error: nothing was collected, and there is no {out}: " in err
    assert "budget of tag collect" in err
    assert not out.exists()


def test_a_log_gets_a_line_now_and_then_and_not_one_for_each_question(tmp_path, capsys):
    path, out = write(tmp_path), tmp_path / "outcomes.jsonl"
    traffic(path, 6)
    given = ["--judge", "exact", "--references", str(references(tmp_path)), "--rate", "100000"]
    assert main(["gateway", "collect", "-c", str(path), "--out", str(out), *given]) == 0
    assert capsys.readouterr().err == ""


def test_a_model_judges_in_both_orders(tmp_path, capsys):
    path, out = write(tmp_path), tmp_path / "outcomes.jsonl"
    traffic(path, 4)
    done = collect(capsys, path, out, "--judge", "judge", "--anchor", "b", "--limit", 3)
    assert (done["questions"], done["judge"]) == (3, "judge against b")
    # It always likes the first, which says nothing.
    assert load_outcomes(out).score_NM.tolist() == [[0.5, 0.5, 0.5]] * 3
    rows, _ = collected_rows(tmp_path)
    assert sum(row.model == "judge" for row in rows) == 3 * 2 * 2


@pytest.fixture
def after_first_look(monkeypatch):
    """Have something done once a collector has looked for the first time; gives how many questions it had after each look."""
    real, looks, todo = Collector.run, [], []

    async def run(collector, *arguments, **more):
        done = await real(collector, *arguments, **more)
        looks.append(done.questions)
        while todo:
            await asyncio.to_thread(todo.pop())
        return done

    def plan(work):
        todo.append(work)
        return looks

    monkeypatch.setattr(Collector, "run", run)
    return plan


def test_new_questions_are_collected_while_they_come_in(tmp_path, capsys, after_first_look):
    """Three questions are there; more come while it waits, and it ends once it has five."""
    path, out = write(tmp_path), tmp_path / "outcomes.jsonl"
    traffic(path, 3)
    looks = after_first_look(lambda: traffic(path, 8))
    done = collect(capsys, path, out, "--judge", "judge", "--every", "1s", "--limit", 5)
    assert looks == [3, 5]
    assert (done["questions"], done["there"]) == (5, 0)
    assert len(set(load_outcomes(out).query)) == 5


def test_a_key_that_is_made_while_it_looks_is_known(tmp_path, capsys, monkeypatch):
    """Questions that came with it were passed over until the end of the run, however long that watched."""
    path, out = write(tmp_path), tmp_path / "outcomes.jsonl"
    traffic(path, 3)
    real, looks = Store.keys, []

    async def keys(store):
        looks.append(1)
        return [] if len(looks) == 1 else await real(store)

    # From here on: before, the gateway itself looks.
    real_run = Collector.run

    async def run(collector, *arguments, **more):
        monkeypatch.setattr(Store, "keys", keys)
        return await real_run(collector, *arguments, **more)

    monkeypatch.setattr(Collector, "run", run)
    done = collect(capsys, path, out, "--judge", "judge")
    assert (done["questions"], done["not_allowed"], len(looks)) == (3, 0, 2)


WRONG = {
    "no references": (("--judge", "exact"), "needs --references"),
    "references for a model": (("--judge", "judge", "--references", "references.jsonl"), "goes with --judge"),
    "a judge that is not there": (("--judge", "nobody"), "no model 'nobody'"),
    "an anchor that is not compared": (("--judge", "judge", "--anchor", "judge"), "--anchor is 'judge'"),
    "another store": (("--judge", "judge", "--store", "none.db"), "no store at"),
    "another ending": (("--judge", "judge", "--out", "x.csv"), ".jsonl"),
    "longer answers than may be": (("--judge", "judge", "--max-tokens", "9" * 20), "the limit of the config"),
    "no time at all": (("--judge", "judge", "--every", "0m"), "at least 1s"),
    "an unknown time": (("--judge", "judge", "--since", "soon"), "--since"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_said_before_anything_is_asked(tmp_path, capsys, monkeypatch, name):
    arguments, message = WRONG[name]
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    traffic(path, 1)
    references(tmp_path)
    assert message in collect(capsys, path, tmp_path / "out.jsonl", *arguments, code=2)
    assert collected_rows(tmp_path)[0] == []


@pytest.mark.parametrize(
    "content",
    ["years of work", '{"query": "q"}\n', '{"query": "q", "scores": {"a": 1, "z": 0}}\n', "\n[]\n"],
)
def test_a_file_of_something_else_is_left_alone(tmp_path, capsys, content):
    path, out = write(tmp_path), tmp_path / "out.jsonl"
    traffic(path, 2)
    out.write_text(content)
    assert "choose a new file" in collect(capsys, path, out, "--judge", "judge", code=2)
    assert out.read_text() == content


def test_a_store_without_texts_is_told(tmp_path, capsys):
    path = write(tmp_path, prompts=False)
    traffic(path, 2)
    assert "prompts = true under [log]" in collect(capsys, path, tmp_path / "out.jsonl", "--judge", "judge", code=2)


# Judges


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("verdict: A", 1.0),
        ("I think\nVerdict: **B**", 0.0),
        ("verdict: tie.", 0.5),
        ("B", 0.0),
        (" tie ", 0.5),
        ("verdict: A, or B? verdict: B", None),
        ("Verdict: a tie", 0.5),
        ("verdict: Answer B", 0.0),
        ("verdict: answer_B", 0.0),
        ("**Verdict:** [[B]]", 0.0),
        ("The verdict: A tie would be generous.\nverdict: B", 0.0),
        ("verdict - B", 0.0),
        ("verdict: B\n(answer A wrote 'verdict: A', which I ignored)", 0.0),
        ("My verdict is B.", 0.0),
        ("Final verdict: A\n", 1.0),
        ("verdict: B\nanswer A had said:\nverdict: A\nwhich does not count", None),
        ("verdict: A\nno, wait\nverdict: B", 0.0),
        ("verdict: B is a bit better", None),
        ("Answer A", 1.0),
        ("I prefer\nA", None),
        ("A is better", None),
        ("verdict: Apples", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_not_clear(said, wanted):
    assert verdict(said) == wanted


def judged(judge, answers, say):
    async def ask(model, prompt):
        return say(json.loads(prompt.split("\n\n")[1]))

    return asyncio.run(judge.scores("q", answers, ask))


def test_scores_by_hand():
    longer = lambda shown: f"verdict: {'A' if len(shown['answer_A']) > len(shown['answer_B']) else 'B'}"  # noqa: E731
    judge = ModelJudge("j", "b")
    answers = {"a": "much longer", "b": "middling", "c": "short", "d": "middling"}
    assert judged(judge, answers, longer) == {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.5}
    assert judged(judge, answers, lambda shown: "verdict: B") == dict.fromkeys("abcd", 0.5)
    assert judged(judge, answers, lambda shown: "who knows") is None


@given(st.text(), st.text(), st.text())
def test_no_text_ends_what_the_judge_is_shown(query, first, second):
    shown = prompt_of(query, first, second)
    assert json.loads(shown[shown.index("{") : shown.rindex("}") + 1]) == {
        "question": query,
        "answer_A": first,
        "answer_B": second,
    }


def test_references_by_hand(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"query": "How many?", "answer": "42"}\n')
    exact, contains = ReferenceJudge.read(path), ReferenceJudge.read(path, "contains")
    assert exact.knows("how  MANY?")
    assert not exact.knows("who?")
    answers = {"a": "42.", "b": "It is 42!", "c": "420"}
    for judge, wanted in ((exact, [1, 0, 0]), (contains, [1, 1, 0])):
        assert list(asyncio.run(judge.scores("How many?", answers, None)).values()) == wanted
    for bad in ("[]", '{"query": "q"}', '{"query": "q", "answer": "?"}', "{"):
        path.write_text(bad + "\n")
        with pytest.raises(DataError, match=r"r.jsonl, line 1"):
            ReferenceJudge.read(path)


# Who may be asked, and what counts as an answer


def used(path, *asked, key=None, **created):
    """Requests of users: (model, messages or text, further fields); with a key of its own if ``created`` says of which kind."""

    async def work():
        async with Gateway(load_config(path)) as gateway:
            secret = (await gateway.store.create_key(**created))[0]
            for model, text, fields in asked:
                messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
                await gateway.achat({"model": model, "messages": messages, **fields}, key=secret)

    asyncio.run(work())


def lines_of(out):
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_questions_of_a_key_go_to_no_model_that_it_may_not_use(tmp_path, capsys):
    """The judge is one of them."""
    path, out = write(tmp_path), tmp_path / "out.jsonl"
    for models in (["a"], ["a", "b", "c"]):
        used(path, ("a", f"secret of {len(models)}", {}), models=models)
    used(path, ("a", "open to all four", {}), models=["a", "b", "c", "judge"])
    done = collect(capsys, path, out, "--judge", "judge")
    assert (done["questions"], done["not_allowed"]) == (1, 2)
    assert [line["query"] for line in lines_of(out)] == ["open to all four"]
    rows, _ = collected_rows(tmp_path)
    assert len(rows) == 2 + 4
    # Without the judge, what is open to the three may be compared by a rule.
    (tmp_path / "r.jsonl").write_text('{"query": "secret of 3", "answer": "a says it"}\n')
    done = collect(capsys, path, tmp_path / "o2.jsonl", "--judge", "exact", "--references", tmp_path / "r.jsonl")
    assert (done["questions"], done["not_allowed"], done["unjudged"]) == (1, 1, 1)


def test_a_share_is_drawn_by_a_secret_of_the_store(tmp_path, capsys):
    path, out = write(tmp_path), tmp_path / "out.jsonl"
    used(path, *(("a", f"question {number}?", {}) for number in range(24)))

    async def secret():
        async with open_store(str(tmp_path / "gateway.db"), serves=False) as store:
            return await store.secret("collect")

    drawn = asyncio.run(secret())
    wanted = {f"question {number}?" for number in range(24) if share("collect", drawn, f"question {number}?") < 0.5}
    for _ in range(2):
        collect(capsys, path, out, "--judge", "judge", "--share", 0.5)
        assert {line["query"] for line in lines_of(out)} == wanted


def test_a_key_that_may_not_hides_a_question_from_nobody(tmp_path, capsys):
    path, out = write(tmp_path), tmp_path / "out.jsonl"
    used(path, ("a", "asked by both", {}), ("a", "Asked by  both", {}), models=["a"])
    used(path, ("a", "asked by both", {}))
    done = collect(capsys, path, out, "--judge", "judge")
    assert (done["questions"], done["not_allowed"]) == (1, 1)
    # A question that no judge knows is one, whoever asks it.
    (tmp_path / "r.jsonl").write_text('{"query": "other", "answer": "a says it"}\n')
    used(path, ("a", "asked by both", {}))
    done = collect(capsys, path, tmp_path / "o2.jsonl", "--judge", "exact", "--references", tmp_path / "r.jsonl")
    assert (done["questions"], done["not_allowed"], done["unjudged"]) == (0, 1, 1)


def test_what_users_were_told_is_not_asked_again_but_only_whole_and_plain_answers(tmp_path, capsys):
    path, out = write(tmp_path), tmp_path / "out.jsonl"
    fields = [{}, {"max_tokens": 2}, {"temperature": 1.5}, {"stop": ["x"]}, {"max_tokens": 20}]
    used(path, *((model, f"question {n}?", more) for n, more in enumerate(fields) for model in "abc"))
    done = collect(capsys, path, out, "--judge", "judge")
    assert (done["questions"], done["calls"], done["reused"]) == (5, 9, 6)
    assert all(line["answers"] == {name: REPLIES[name] for name in "abc"} for line in lines_of(out))


def test_an_empty_answer_is_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(REPLIES, "b", "")
    path, out = write(tmp_path), tmp_path / "out.jsonl"
    used(path, ("a", "question?", {}))
    for calls in (2, 0):
        assert collect(capsys, path, out, "--judge", "judge")["calls"] == calls
    assert lines_of(out)[0]["answers"]["b"] == ""


def test_conversations_are_told_apart_and_judged_whole(tmp_path, capsys):
    """Two that end in yes were one question, of which the judge saw the yes."""
    path, out = write(tmp_path), tmp_path / "out.jsonl"
    talks = [
        [
            {"role": "user", "content": ask},
            {"role": "assistant", "content": f"{ask} Sure?"},
            {"role": "user", "content": "yes"},
        ]
        for ask in ("Delete the file?", "Translate it?")
    ]
    used(path, *(("a", talk, {}) for talk in talks))
    for wanted in (2, 0):
        assert collect(capsys, path, out, "--judge", "judge")["questions"] == wanted
    assert [line["messages"] for line in lines_of(out)] == talks
    shown = prompt_of(talks[0], "x", "y")
    assert json.loads(shown[shown.index("{") : shown.rindex("}") + 1])["conversation"] == talks[0]
    judge = ReferenceJudge({"yes": "done"})
    assert (judge.knows(talks[0]), judge.knows([{"role": "system", "content": "s"}, talks[0][2]])) == (False, True)
    assert main(["gateway", "fit", str(out), "--out", str(tmp_path / "r"), "--quiet"]) == 0


def test_a_file_is_of_one_judge(tmp_path, capsys):
    path, out = write(tmp_path), tmp_path / "out.jsonl"
    used(path, ("a", "question 1?", {}))
    collect(capsys, path, out, "--judge", "judge", "--anchor", "a")
    assert "judged by judge against a, not by judge against b" in collect(
        capsys, path, out, "--judge", "judge", "--anchor", "b", code=2
    )


def test_a_place_that_cannot_be_written_is_noticed_before_anything_is_paid_for(tmp_path, capsys):
    path = write(tmp_path)
    used(path, ("a", "question 1?", {}))
    (tmp_path / "folder.jsonl").mkdir()
    for out in (tmp_path / "nowhere" / "out.jsonl", tmp_path / "folder.jsonl"):
        assert f"cannot write {out}" in collect(capsys, path, out, "--judge", "judge", code=2)
    assert collected_rows(tmp_path)[0] == []


def test_a_budget_with_room_for_one_call_after_another_is_enough(tmp_path, capsys):
    """Side by side their worst cases did not fit, which was taken for its end."""
    path, out = write(tmp_path), tmp_path / "out.jsonl"
    path.write_text(path.read_text().replace("max_tokens = 20", "max_tokens = 2000"))
    used(path, ("a", "question 1?", {}), ("a", "question 2?", {}))
    (tmp_path / "r.jsonl").write_text(
        '{"query": "question 1?", "answer": "x"}\n{"query": "question 2?", "answer": "x"}\n'
    )
    options = ("--judge", "exact", "--references", tmp_path / "r.jsonl", "--budget", "0.025")
    done = collect(capsys, path, out, *options)
    assert (done["questions"], done["stopped"]) == (2, "")


def test_nobody_else_carries_the_tag_of_collecting(tmp_path):
    async def work():
        async with Gateway(load_config(write(tmp_path))) as gateway:
            secret, _ = await gateway.store.create_key("mallory")
            await gateway.store.set_budget(f"tag:{TAG}", 10**9)
            body = {"model": "b", "messages": [{"role": "user", "content": "hi"}]}
            with pytest.raises(ApiError, match="tag collect"):
                await gateway.achat(body, key=secret, headers={"x-tags": f"x,{TAG}"})
            with pytest.raises(InputError, match="no key may carry it"):
                await gateway.store.create_key("mallory", tags=[TAG])
            return (await gateway.store.budgets())[0].spent_nano

    assert asyncio.run(work()) == 0


def test_what_is_collected_of_a_question_goes_when_the_question_goes(tmp_path, capsys):
    """Its text is copied nowhere in the store, and its answers are as old as it is."""
    path = write(tmp_path)
    used(path, ("a", "MY-OLD-SECRET?", {}))

    def held(*statements):
        with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db")) as connection, connection:
            return [connection.execute(sql).fetchall() for sql in statements][-1]

    for table in ("ledger", "texts", "decisions"):
        held(f"UPDATE {table} SET ts_us = ts_us - 29 * 86400 * 1000000")
    collect(capsys, path, tmp_path / "out.jsonl", "--judge", "judge")
    assert held("SELECT count(*) FROM texts WHERE body LIKE '%MY-OLD-SECRET%'") == [(1,)]
    assert held("SELECT count(*) FROM collected") == [(6,)]

    async def prune():
        async with open_store(str(tmp_path / "gateway.db"), serves=False) as store:
            await store.prune(time.time() - 28 * 86400)

    asyncio.run(prune())
    assert held("SELECT count(*) FROM texts") == held("SELECT count(*) FROM collected") == [(0,)]


def test_watching_a_store_without_texts_waits_for_them(tmp_path, capsys, after_first_look):
    path, out = write(tmp_path), tmp_path / "outcomes.jsonl"
    used(path)
    looks = after_first_look(lambda: used(path, ("a", "question 1?", {})))
    done = collect(capsys, path, out, "--judge", "judge", "--every", "1s", "--limit", 1)
    assert (done["questions"], looks) == (1, [0, 1])


@pytest.mark.parametrize("option", ["--since", "--every"])
def test_times_beyond_all_calendars_are_refused(tmp_path, capsys, option):
    path = write(tmp_path)
    used(path, ("a", "question 1?", {}))
    said = collect(capsys, path, tmp_path / "o.jsonl", "--judge", "judge", option, "99999999999w", code=2)
    assert f"{option} is '99999999999w'" in said


DAMAGED = [
    "{",
    "null",
    "[]",
    '{"endpoint":"chat"}',
    '{"query":5,"endpoint":"chat"}',
    '{"query":"x","endpoint":"chat","messages":"no"}',
    '{"query":"x","endpoint":"chat","messages":[1]}',
    '{"query":"x","endpoint":"chat","task":5}',
    '{"query":"x","endpoint":"chat","answer":5,"settings":7,"asked_nano":"x"}',
]


def test_damaged_rows_are_passed_over(tmp_path, capsys):
    path = write(tmp_path)

    async def work():
        async with Gateway(load_config(path)) as gateway:
            secret, _ = await gateway.store.create_key()
            for number in range(len(DAMAGED) + 1):
                body = {"model": "auto/try", "messages": [{"role": "user", "content": f"question {number}?"}]}
                reply = await gateway.handle("chat", body, key=secret)
                await gateway.feedback({"request_id": reply.headers["x-request-id"], "score": 1}, key=secret)

    asyncio.run(work())
    with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db")) as connection, connection:
        for number, body in enumerate(DAMAGED, 1):
            connection.execute("UPDATE texts SET body = ? WHERE rowid = ?", (body, number))
        for body in ('{"candidates": [5]}', "7", '{"candidates": {"a": 1}, "probability": "x"}'):
            connection.execute("UPDATE decisions SET body = ? WHERE rowid = ?", (body, 7))
    store = tmp_path / "gateway.db"
    assert main(["gateway", "fit", str(store), "--out", str(tmp_path / "r"), "--quiet", "--json"]) == 0
    assert (
        main(["gateway", "replay", str(store), "--router", str(tmp_path / "r"), "--json", "--allow-leak", "--quiet"])
        == 0
    )
    done = collect(capsys, path, tmp_path / "out.jsonl", "--judge", "judge")
    assert done["questions"] >= 1


@pytest.mark.parametrize("content", [b"", b"no database at all"])
def test_a_file_that_is_no_store_is_left_as_it_is(tmp_path, capsys, content):
    path = tmp_path / "empty.db"
    path.write_bytes(content)
    assert main(["gateway", "fit", str(path), "--out", str(tmp_path / "r"), "--quiet"]) == 2
    assert "empty.db" in capsys.readouterr().err
    assert path.read_bytes() == content


def test_what_others_hold_of_a_budget_for_a_while_does_not_end_the_watch(tmp_path, capsys, monkeypatch):
    """It ended for good, though a second later there was room."""
    monkeypatch.setattr("anabranch.gateway.collect.calls.PATIENCE", 1)
    path, out = write(tmp_path), tmp_path / "out.jsonl"
    used(path, ("a", "question 1?", {}))
    is_held = threading.Event()

    async def hold():
        async with open_store(str(tmp_path / "gateway.db")) as store:
            try:
                await store.set_budget("global", 10**8)
                # All but the price of the one question, which may have been settled by now.
                held = await store.reserve("live", ["global"], 10**8 - 50_000)
            finally:
                is_held.set()
            await asyncio.sleep(1.5)
            await store.release(held, LedgerRow(request_id="live"))

    other = threading.Thread(target=lambda: asyncio.run(hold()))
    other.start()
    is_held.wait()
    done = collect(capsys, path, out, "--judge", "judge", "--every", "1s", "--limit", 1)
    other.join()
    assert (done["questions"], done["stopped"]) == (1, "")
