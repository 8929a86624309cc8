"""A/B tests of a gateway: who goes where, what is kept of it, what the store says of both arms, the command and the page."""

import asyncio
import dataclasses
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cli.main import main
from anabranch.config import to_dict
from anabranch.errors import ConfigError, UnknownModelError
from anabranch.gateway.ab import arm_of, results_of, results_of_store
from anabranch.gateway.ab.assignment import _digest, counted_user, version_of
from anabranch.gateway.ab.results import result_of, unit_means
from anabranch.gateway.config import (
    ABConfig,
    DeploymentConfig,
    GatewayConfig,
    LogConfig,
    ModelConfig,
    StrategyConfig,
    find_target,
    names_of,
)
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import KeyRecord, LedgerQuery, LedgerRow, open_store
from anabranch.gateway.store.arms import ArmRow, read_arms
from anabranch.gateway.ui.ab import render_ab
from anabranch.routers.money import Price
from page_html import NASTY, Parsed

TEST = ABConfig(a="first", b="second", answers=2)
BY_USER = TEST.replace(unit="user", answers=1)


def config(folder, **fields):
    models = tuple(
        ModelConfig(
            name=name,
            price=Price.of_dollars(usd, usd),
            max_tokens=20,
            deployments=(DeploymentConfig(provider=Mock.Config(model=name, reply=f"{name} it is")),),
        )
        for usd, name in enumerate(("x", "y"), 1)
    )
    strategies = {
        "first": StrategyConfig(use="static", fields={"model": "x"}),
        "second": StrategyConfig(use="static", fields={"model": "y"}),
    }
    held = {
        "models": models,
        "strategies": strategies,
        "require_key": False,
        "store": str(folder / "gateway.db"),
        "ab": {"try": TEST},
    }
    return GatewayConfig(**{**held, **fields})


def used(settings, work):
    async def run():
        async with Gateway(settings) as gateway:
            return await work(gateway)

    return asyncio.run(run())


async def ask(gateway, user, model="auto/try", score=None, key=None, **fields):
    """The side, the model that answered, and the request's id."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "hello"}],
        **({"user": user} if user else {}),
        **fields,
    }
    reply = await gateway.handle("chat", body, key=key, headers={"x-cache": "deny"} if not fields else {})
    id = reply.headers["x-request-id"]
    if score is not None:
        await gateway.feedback({"request_id": id, "score": score}, key=key)
    return reply.headers.get("x-route-arm"), reply.headers["x-route-model"], id


def test_a_key_that_makes_up_users_weighs_as_much_as_any_other(tmp_path):
    """It scores one arm 1 and the other 0, as often as it likes; where it is trusted, its users count."""

    async def work(gateway):
        evil, record = await gateway.store.create_key("evil")
        if gateway.config.ab["try"].trusts:
            await gateway.reload(
                dataclasses.replace(gateway.config, ab={"try": BY_USER.replace(trusts=(f"key:{record.id}",))})
            )
        for number in range(40):
            side, _, id = await ask(gateway, f"fake{number}", key=evil)
            await gateway.feedback({"request_id": id, "score": float(side == "try a")}, key=evil)
        [result] = await results_of(gateway.store, gateway.config)
        return result.a.units + result.b.units, result.found

    assert used(config(tmp_path, ab={"try": BY_USER}), work) == (1, "not resolved")
    (tmp_path / "other").mkdir()
    units, found = used(config(tmp_path / "other", ab={"try": BY_USER.replace(trusts=("key:x",))}), work)
    assert (units, found) == (40, "a")


def test_a_running_test_goes_on_with_a_version_that_knows_whom_it_trusts():
    # sha256 of the settings as they were written before.
    told = {name: value for name, value in to_dict(TEST).items() if name != "trusts"}
    assert version_of("try", TEST) == _digest("try", json.dumps(told, sort_keys=True))[:12]
    assert version_of("try", BY_USER.replace(trusts=("key:x",))) != version_of("try", BY_USER)
    # Users were told apart by their keys before: that is another test.
    told = {name: value for name, value in to_dict(BY_USER).items() if name != "trusts"}
    assert version_of("try", BY_USER) != _digest("try", json.dumps(told, sort_keys=True))[:12]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unit": "user", "trusts": ("ann",)}, "trusts has 'ann'; write key:ID or team:NAME"),
        ({"trusts": ("key:x",)}, 'for unit = "user"'),
    ],
)
def test_whom_a_test_trusts_is_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        TEST.replace(**fields)


# Who goes where


@given(st.text(max_size=20), st.text(max_size=20), st.floats(0.01, 0.99))
def test_a_side_is_that_of_the_key_and_never_changes(key, user, share):
    test = TEST.replace(share=share)
    arm = arm_of("try", test, key=key, user=user)
    assert arm == arm_of("try", test, key=key, user=user)
    if key:
        assert arm == arm_of("try", test, key=key, user="")
    assert (arm.strategy, arm.side) in (("first", "a"), ("second", "b"))
    counted = bool(key or user)
    assert bool(arm.unit) == counted
    assert arm.probability == (1.0 if not counted else share if arm.side == "b" else 1 - share)
    # Whoever is in b stays there when b grows.
    if arm.side == "b":
        assert arm_of("try", test.replace(share=min(0.995, share + 0.005)), key=key, user=user).side == "b"


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_shares_are_kept_and_salts_split_anew(share):
    test = TEST.replace(share=share)
    first = np.array([arm_of("try", test, key=f"k{n}", user="").side == "b" for n in range(4000)])
    other = np.array([arm_of("try", test.replace(salt="new"), key=f"k{n}", user="").side == "b" for n in range(4000)])
    named = np.array([arm_of("more", test, key=f"k{n}", user="").side == "b" for n in range(4000)])
    for split in (first, other, named):
        assert split.mean() == pytest.approx(share, abs=0.03)
    for split in (other, named):
        assert (first & split).mean() == pytest.approx(share**2, abs=0.03)  # as if drawn apart


def test_users_of_a_key_are_split_where_that_is_wished():
    by_user = TEST.replace(unit="user")
    sides = {arm_of("try", by_user, key="k", user=f"u{n}").side for n in range(30)}
    assert sides == {"a", "b"}
    assert {arm_of("try", TEST, key="k", user=f"u{n}").side for n in range(30)} <= {"a", "b"}
    assert len({arm_of("try", TEST, key="k", user=f"u{n}").unit for n in range(30)}) == 1
    # A key that belongs to somebody is theirs, whatever its requests say; else only those that are trusted name users.
    trusting = by_user.replace(trusts=("key:t", "team:red"))
    for record, named, user, among in (
        (None, "u", "u", ""),
        (KeyRecord(id="k"), "u", "", ""),
        (KeyRecord(id="k", user="ann"), "u", "ann", "owner"),
        (KeyRecord(id="k", user="ann", team="red"), "u", "ann", "owner"),
        (KeyRecord(id="t"), "u", "u", "key:t"),
        (KeyRecord(id="t", team="blue"), "u", "u", "team:blue"),
        (KeyRecord(id="k", team="red"), "u", "u", "team:red"),
        (KeyRecord(id="k", team="blue"), "u", "", ""),
    ):
        assert counted_user(trusting, record, named) == (user, among)
    # One name among others is somebody else, and no name runs into what stands before it.
    units = {
        arm_of("try", by_user, key="k", user=user, among=among).unit
        for user, among in (("ab", "key:t"), ("b", "key:ta"), ("ab", "team:t"), ("ab", "owner"), ("ab", ""))
    }
    assert len(units) == 5
    # Who changes key stays.
    assert arm_of("try", by_user, key="old", user="u", among="owner") == arm_of(
        "try", by_user, key="new", user="u", among="owner"
    )


def test_a_user_who_changes_key_stays_in_the_arm_and_is_one(tmp_path):
    """Before, the same user came to either side with another key, and counted in both."""
    trusting = BY_USER.replace(trusts=("team:red",))

    async def work(gateway):
        for number in range(12):
            told = set()
            for turn in range(2):
                own, _ = await gateway.store.create_key(f"own {number} {turn}", user=f"user {number}")
                told.add((await ask(gateway, "", key=own, score=1.0))[:2])
            assert len(told) == 1
        seen = []
        for turn in range(2):
            red, _ = await gateway.store.create_key(f"red {turn}", team="red")
            seen.append([(await ask(gateway, f"user {number}", key=red))[:2] for number in range(12)])
        assert seen[0] == seen[1]
        assert len(set(seen[0])) == 2
        rows = await gateway.store.look(read_arms)
        return {(row.arm["arm"], row.arm["unit"]) for row in rows}

    units = used(config(tmp_path, ab={"try": trusting}), work)
    # Who owns a key is not who is named so by a team.
    assert len(units) == len({unit for _, unit in units}) == 24


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ab": {"try": TEST.replace(b="gone")}}, r"ab\.try\.b is 'gone'; known: first, second"),
        ({"ab": {"first": TEST}}, r"ab\.first is called as strategies\.first"),
        ({"ab": {"a/b": TEST}}, r"ab\.a/b: a name of a strategy has no spaces"),
        ({"log": LogConfig(decisions=False)}, r"ab\.try: a test is read from decisions"),
    ],
)
def test_configs_that_make_no_test_are_refused(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"b": "first"}, "a and b are both 'first'"),
        ({"metric": "cost"}, "most_usd goes with metric"),
        ({"most_usd": 1.0}, "most_usd goes with metric"),
        ({"share": 1.0}, "share"),
        ({"answers": 0}, "answers"),
        ({"metric": "joy"}, "metric"),
    ],
)
def test_tests_that_compare_nothing_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ABConfig(**{"a": "first", "b": "second", **fields})


def test_a_test_is_named_as_a_strategy_is(tmp_path):
    settings = config(tmp_path)
    assert "auto/try" in names_of(settings)
    target = find_target(settings, "auto/try?lambda=2")
    assert (target.test, target.strategy, target.model, dict(target.knobs)) == ("try", None, None, {"lambda": "2"})
    with pytest.raises(UnknownModelError, match="auto/try"):
        find_target(settings, "auto/tri")


# What is kept


def test_users_keep_their_side_and_decisions_say_it(tmp_path):
    async def work(gateway):
        found = {}
        for number in range(20):
            seen = [await ask(gateway, f"user {number}") for _ in range(2)]
            assert seen[0][:2] == seen[1][:2]
            found[f"user {number}"] = seen[0]
        id = found["user 0"][2]
        [decision] = await gateway.store.decisions(id)
        row = (await gateway.store.ledger())[-1]
        nobody = await ask(gateway, None)
        routed = await gateway.aroute(
            {"model": "auto/try", "user": "user 0", "messages": [{"role": "user", "content": "hello"}]}
        )
        return found, decision, row, nobody, routed

    found, decision, row, nobody, routed = used(config(tmp_path), work)
    assert {(side, model) for side, model, _ in found.values()} == {("try a", "x"), ("try b", "y")}
    for user, (side, _, _) in found.items():
        assert side == f"try {arm_of('try', TEST, key='', user=user).side}"
    side, model, _ = found["user 0"]
    told = decision.body["ab"]
    assert (told["test"], told["arm"], told["probability"]) == ("try", side[-1], 0.5)
    assert told["unit"] == arm_of("try", TEST, key="", user="user 0").unit
    assert told["config"]["answers"] == 2
    assert "salt" not in told["config"]
    assert decision.strategy == {"a": "first", "b": "second"}[side[-1]]
    assert (row.requested, row.strategy) == ("auto/try", decision.strategy)
    assert nobody[:2] == ("try a", "x")
    assert routed.model == model


def test_arms_share_no_answers(tmp_path):
    """Two users of one gateway without keys, one in each arm, ask the same: what is cached for one arm is no answer of the other."""
    users = {arm_of("try", TEST, key="", user=f"u{n}").side: f"u{n}" for n in range(20)}

    async def work(gateway):
        first = [await ask(gateway, users[side], temperature=0) for side in "ab"]
        again = [await ask(gateway, users[side], temperature=0) for side in "ab"]
        return first, again

    first, again = used(config(tmp_path), work)
    assert [model for _, model, _ in first] == ["x", "y"]
    assert [model for _, model, _ in again] == ["x", "y"]


# What the store says


def rows_of(*answers, test=TEST, name="try", version=None):
    """Rows by arm, unit and score, in their order; the place of a score is ten times that of its request."""
    from anabranch.gateway.ab.assignment import version_of

    return [
        ArmRow(
            {"test": name, "arm": arm, "unit": unit, "version": version or version_of(name, test)},
            place,
            "ok",
            10**6,
            score,
            None if score is None else 10 * place,
        )
        for place, (arm, unit, score) in enumerate(answers, 1)
    ]


def test_a_key_counts_once_with_its_first_answers():
    rows = rows_of(
        ("a", "k", 1.0),
        ("b", "m", 0.0),
        ("a", "k", None),
        ("b", "m", 1.0),
        ("a", "k", 0.0),
        ("a", "k", 1.0),
        ("a", "n", 1.0),
    )
    assert unit_means(rows, TEST) == [("b", 0.5), ("a", 0.5)]
    assert unit_means(rows, TEST.replace(answers=1)) == [("a", 1.0), ("b", 0.0), ("a", 1.0)]
    # Feedback that comes late counts when it comes.
    late = [dataclasses.replace(rows[0], score_seq=1000), *rows[1:]]
    assert unit_means(late, TEST) == [("b", 0.5), ("a", 0.5)]
    assert unit_means(late[:5], TEST) == [("b", 0.5), ("a", 0.5)]
    result = result_of("try", TEST, [*rows, *rows_of(("a", "", 1.0))])
    assert (result.a.requests, result.a.units, result.a.waiting, result.a.mean) == (5, 1, 1, 0.5)
    assert (result.b.requests, result.b.units, result.b.waiting, result.uncounted) == (2, 1, 0, 1)
    assert result.a.cost_usd == pytest.approx(0.001)


def test_units_count_in_the_order_in_which_they_could_be_valued():
    """By the place of the feedback, not of the request; of requests without any by their own. Rows may come in any order."""
    rows = rows_of(("a", "k", 1.0), ("b", "m", 0.0), ("a", "n", 0.5))
    one = TEST.replace(answers=1)
    late = [dataclasses.replace(rows[0], score_seq=25), *rows[1:]]
    assert unit_means(late, one) == [("b", 0.0), ("a", 1.0), ("a", 0.5)]
    assert unit_means(late[::-1], one) == unit_means(late, one)
    assert unit_means(rows[::-1], TEST.replace(metric="success", answers=1)) == [("a", 1.0), ("b", 1.0), ("a", 1.0)]
    # What a key was given first is what counts, whatever was said first of it in the file.
    mixed = rows_of(("a", "k", 0.25), ("a", "k", 0.75))
    assert unit_means([dataclasses.replace(mixed[0], score_seq=99), mixed[1]], one) == [("a", 0.75)]


def test_whose_a_request_is_and_its_side_are_told_by_different_digits():
    """Else the hash in the store would say of which share of the keys it is, and order them by it."""
    for number in range(20):
        arm = arm_of("try", TEST, key=f"k{number}", user="")
        parts = ("unit", "try", "key", f"k{number}")
        digest = hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()
        assert (arm.side == "b") == (int(digest[:16], 16) < 2**63)
        assert arm.unit == digest[16:32]


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from("klmn"), st.sampled_from([None, 0.0, 0.5, 1.0])), max_size=40
    ),
    st.integers(0, 40),
)
def test_what_was_seen_is_not_changed_by_what_comes(answers, cut):
    rows = rows_of(*((arm, arm + unit, score) for arm, unit, score in answers))
    whole, part = unit_means(rows, TEST), unit_means(rows[:cut], TEST)
    assert whole[: len(part)] == part


def test_success_and_cost_are_read_of_every_request():
    rows = [
        dataclasses.replace(row, status=status, cost_nano=nano)
        for row, (status, nano) in zip(
            rows_of(*[("a", f"u{n}", None) for n in range(5)]),
            [("ok", 10**8), ("error", 0), ("refused", 0), ("cancelled", 2 * 10**8), ("ok", 10**12)],
            strict=True,
        )
    ]
    one = {"answers": 1}
    # Who left had no answer; what was refused came to no model.
    assert [value for _, value in unit_means(rows, TEST.replace(metric="success", **one))] == [1, 0, 0, 1]
    cost = TEST.replace(metric="cost", most_usd=0.4, **one)
    # 10 cents, an answer that was given up after 20 cents, and more than the most; what failed for nothing is no answer.
    assert [value for _, value in unit_means(rows, cost)] == pytest.approx([0.75, 0.5, 0.0])
    result = result_of("try", cost, rows)
    assert (result.a.mean, result.most) == (pytest.approx(0.7 / 3), 0.4)
    assert 0 <= result.a.low <= result.a.mean <= result.a.high <= 0.4


def test_an_arm_that_answers_nothing_is_not_the_cheaper_one():
    cost, rows = TEST.replace(metric="cost", most_usd=0.01, answers=1), []
    for number in range(400):
        side = "ab"[number % 2]
        arm = {"test": "try", "arm": side, "unit": f"u{number}"}
        rows.append(ArmRow(arm, number, "ok" if side == "a" else "error", 5 * 10**6 if side == "a" else 0, None, None))
    result = result_of("try", cost, rows)
    assert (result.found, result.b.units) == ("not resolved", 0)


def test_lost_calls_that_are_charged_count_for_their_arm():
    """Every other call of b is lost, and charged its worst case; the others are a little cheaper than those of a."""
    cost, rows = TEST.replace(metric="cost", most_usd=0.01, answers=2), []
    for number in range(600):
        side, is_lost = "ab"[number // 2 % 2], number // 2 % 2 == 1 and number % 2 == 0
        arm = {"test": "try", "arm": side, "unit": f"u{number // 2}"}
        nano = 10**7 if is_lost else 4 * 10**6 if side == "a" else 3 * 10**6
        rows.append(ArmRow(arm, number, "error" if is_lost else "ok", nano, None, None))
    result = result_of("try", cost, rows)
    assert (result.found, result.a.mean, result.b.mean) == ("a", pytest.approx(0.004), pytest.approx(0.0065))
    assert (result.a.cost_usd, result.b.cost_usd) == (pytest.approx(0.004), pytest.approx(0.0065))


def made_result(better=0.9, worse=0.1, num=120, **fields):
    draw = np.random.default_rng(0)
    answers = []
    for n in range(num):
        side = "ab"[n % 2]
        answers += [(side, f"u{n}", float(draw.random() < (better if side == "b" else worse))) for _ in range(2)]
    test = TEST.replace(**fields)
    return result_of("try", test, rows_of(*answers, test=test))


def test_a_difference_is_told_with_its_side_and_else_left_open():
    found = made_result()
    assert (found.found, found.a.units, found.b.units) == ("b", 60, 60)
    assert found.p < 0.05
    assert found.a.low < found.a.mean < found.a.high < found.b.low < found.b.mean < found.b.high
    assert found.sentence().startswith(f"second (b) scored better than first: found after {found.at} keys")
    same = made_result(0.5, 0.5)
    assert same.found == "not resolved"
    assert "120 keys with 2 answers each leave it open whether first (a) or second (b) is better" in same.sentence()
    empty = result_of("try", TEST, [])
    assert (empty.found, empty.p, empty.a.mean, empty.a.low, empty.a.high) == ("not resolved", 1.0, None, 0.0, 1.0)


@pytest.fixture
def tried(tmp_path):
    """A store with a test in it, made by HTTP's own doors: y is liked, x is not."""
    settings = config(tmp_path)

    async def work(gateway):
        for number in range(36):
            for _ in range(2):
                _, model, _ = await ask(gateway, f"user {number}")
                await ask(gateway, f"user {number}", score=1.0 if model == "y" else 0.0)
        await ask(gateway, None, score=1.0)
        return await results_of(gateway.store, settings), await results_of_store(gateway.store)

    return settings, tmp_path, *used(settings, work)


def test_results_come_from_the_store(tried):
    settings, _, [of_config], [of_store] = tried
    assert of_config == of_store
    assert (of_config.found, of_config.uncounted) == ("b", 1)
    assert (of_config.a.mean, of_config.b.mean) == (0.0, 1.0)
    assert of_config.a.requests + of_config.b.requests == 36 * 4
    assert of_config.a.units + of_config.b.units == 36
    assert of_config.b.cost_usd == pytest.approx(2 * of_config.a.cost_usd, rel=0.01)
    assert of_config.sentence().endswith("at whatever moment one looks (p " + f"{of_config.p:.2g}).")

    async def other(gateway):
        return await results_of(gateway.store, gateway.config), await results_of_store(gateway.store)

    # Other settings are another test, which has seen nothing.
    [anew], [old] = used(settings.replace(ab={"try": TEST.replace(share=0.4)}), other)
    assert (anew.a.requests, anew.found) == (0, "not resolved")
    assert old == of_store


def test_what_a_strategy_asks_to_decide_is_a_cost_of_its_arm(tmp_path):
    settings = config(tmp_path)
    asks = StrategyConfig(use="prompt", fields={"model": "x"})
    settings = settings.replace(strategies={**settings.strategies, "second": asks})
    user = next(name for name in map(str, range(50)) if arm_of("try", TEST, key="", user=name).side == "b")

    async def work(gateway):
        await ask(gateway, user)
        return await gateway.store.ledger(LedgerQuery(calls=True)), await results_of(gateway.store, settings)

    rows, [found] = used(settings, work)
    assert [bool(row.parent_id) for row in rows].count(True) == 1
    assert found.b.cost_usd == pytest.approx(sum(row.cost_nano for row in rows) / 1e9)
    assert found.b.cost_usd > max(row.cost_nano for row in rows) / 1e9


def told(capsys, *arguments, code=0):
    capsys.readouterr()
    assert main(["gateway", "ab", *map(str, arguments)]) == code
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


def test_the_command_reads_a_config_or_a_store(tried, capsys):
    _, folder, [expected], _ = tried
    models = "".join(
        f'[[models]]\nname = "{name}"\ndeployments = [{{ provider = {{ kind = "mock" }}, name = "{name}" }}]\n'
        for name in "xy"
    )
    strategies = "".join(
        f'[strategies.{name}]\nkind = "static"\nmodel = "{model}"\n'
        for name, model in (("first", "x"), ("second", "y"))
    )
    place = folder / "gateway.toml"
    place.write_text(f'store = "gateway.db"\n{models}{strategies}[ab.try]\na = "first"\nb = "second"\nanswers = 2\n')
    store = folder / "gateway.db"
    for arguments in ((store,), (store, "try"), (place,), (place, "try")):
        assert json.loads(told(capsys, *arguments, "--json")) == {"tests": [json.loads(json.dumps(expected.to_dict()))]}
    shown = told(capsys, store)
    assert "auto/try: 50% of keys get b, by score" in shown
    assert f"verdict {expected.sentence()}" in shown
    assert "1 requests with neither key nor user" in shown
    assert "no A/B test 'gone' in" in told(capsys, store, "gone", code=2)
    assert "there are try" in told(capsys, place, "gone", code=2)
    place.write_text(f'store = "gateway.db"\n{models}{strategies}')
    assert "has no A/B test; add [ab.NAME] with two strategies a and b" in told(capsys, place, code=2)


# The page


@pytest.mark.parametrize("results", [[], ["b"], ["open", "empty"]])
def test_the_page_is_whole_html_without_scripts_or_inline_styles(results):
    made = {"b": made_result(), "open": made_result(0.5, 0.5), "empty": result_of("try", TEST, [])}
    text = render_ab([made[name] for name in results])
    parsed = Parsed(text)
    names = [name for name, _ in parsed.attributes]
    assert "style" not in names
    assert "script" not in parsed.tags
    assert [value for name, value in parsed.attributes if name in ("src", "href") and not value.startswith("/ui")] == []
    assert "nan" not in text.lower().replace("anabranch", "")


def test_the_page_shows_both_arms_and_names_are_never_run():
    one = made_result()
    text = render_ab([one])
    for said in ("auto/try", "a: first", "b: second", "b is better", f"{one.b.mean:.4g}", f"{one.a.requests:,}"):
        assert said in text
    nasty = dataclasses.replace(one, name=NASTY, a=dataclasses.replace(one.a, strategy=NASTY))
    shown = render_ab([nasty])
    assert "<script>alert" not in shown
    Parsed(shown)


# On both kinds of store


def test_requests_of_tests_are_read_with_the_last_word_of_a_key(url):
    async def main():
        async with open_store(url) as store:
            assert await store.look(read_arms) == []
            arm = arm_of("try", TEST, key="k", user="")
            for id, requested, body in (
                ("one", "auto/try", {"ab": arm.to_dict()}),
                ("two", "auto/try?lambda=2", {"ab": arm.to_dict(), "details": {"why": '%"ab":{"test":%'}}),
                ("plain", "auto/first", {"details": {"ab": {"test": "try"}}}),
                ("named", "x", {"ab": arm.to_dict()}),
            ):
                await store.append(LedgerRow(request_id=id, requested=requested, model="x"))
                await store.append_decision(id, "first", "x", body)
            for score in (0.25, 1.0):
                await store.feedback("two", score)
            # Another's word, which is not the first.
            await store.feedback("two", 0.5, key_id="k", owner="")
            return arm, await store.look(read_arms), [row.score for row in await store.feedbacks("two")]

    arm, [one, two], scores = asyncio.run(main())
    assert sorted(scores) == [0.5, 1.0]
    assert one.arm == two.arm == json.loads(json.dumps(arm.to_dict()))
    assert (one.status, one.cost_nano, one.score, one.score_seq) == ("ok", 0, None, None)
    assert (two.score, two.seq > one.seq) == (1.0, True)
    assert isinstance(two.score_seq, int)
