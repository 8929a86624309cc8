"""Training that goes on to the bit when ranks are lost and come: real processes, real kills."""

import random
import re

import pytest

import elastic_ranks as ranks_of
from anabranch.cluster.elastic import Coordinator, Layout, Policy, census, saving
from anabranch.cluster.ranks import RankError
from anabranch.testing import Ranks
from elastic_ranks import SECRET, alone, train

STEPS = 12
SIZES = [sum(p.numel() for p in layer.parameters()) for layer in ranks_of.layers_of()]


def run(die=None, *, steps=STEPS, mesh=(2, 2), options=None, own=None, while_running=None, coordinator=None):
    """(what each rank that was not lost returned, the coordinator)."""
    replicas, stages = mesh
    given = {"layer_costs": [1.0] * len(SIZES), **(coordinator or {})}
    with Coordinator(replicas=replicas, stages=stages, secret=SECRET, **given) as host:
        arguments = (host.address, steps, {"mesh": mesh, **(options or {})}, die)
        with Ranks(replicas * stages, train, *arguments, 0.0, own, backend=None, timeout_s=60) as ranks:
            for rank in die or {}:
                ranks.expect_end(rank)
            if while_running is not None:
                while_running(ranks, host)
            return ranks.wait(), host


def losses_of(found):
    """By step, which all ranks agree on."""
    told = {}
    for one in found:
        for step, loss in one["losses"].items():
            assert told.setdefault(step, loss) == loss
    return [told[step] for step in sorted(told)]


def check_whole(found, host):
    """Every number has one owner; every rank has the same weights."""
    layout = host.layout
    assert isinstance(layout, Layout)
    census(layout, SIZES, {one["rank"]: one["owned"] for one in found})
    assert all(one["weights"] == found[0]["weights"] for one in found)
    assert all(one["status"]["steps"] == host.version for one in found)


@pytest.fixture(scope="module")
def whole():
    found, host = run()
    check_whole(found, host)
    assert [what for _, what, _ in host.history].count("epoch") == 1
    return found


def same(found, whole):
    assert losses_of(found) == losses_of(whole)
    assert found[0]["weights"] == whole[0]["weights"]


def test_it_learns_as_torch_does_in_one_process(whole):
    losses, weights = alone(STEPS)
    assert losses_of(whole) == pytest.approx(losses, rel=1e-5)
    for name, value in weights.items():
        assert ranks_of.torch.tensor(whole[0]["weights"][name]) == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1), (3, 2)])
def test_any_grid_gives_the_same_bits(whole, mesh):
    found, host = run(mesh=mesh, options={"micro_batches": 2})
    check_whole(found, host)
    same(found, whole)


def test_a_kill_and_a_join_change_no_bit(whole):
    def join(ranks, host):
        assert host.wait_for(lambda host: any(what == "lost" for _, what, _ in host.history))
        # Kept from the end until the new one is in.
        ranks.join(train, host.address, STEPS, None, None, 0.0)

    found, host = run({1: ("forward", 9)}, while_running=join, own={rank: {"pace_step": 2} for rank in range(4)})
    check_whole(found, host)
    same(found, whole)
    late = next(one for one in found if one["rank"] == 4)
    assert 0 < late["began"] < STEPS
    assert host.layout.grid.stages == ((0, 4), (2, 3))
    # Links that were there stay: the loss opens none, the join one for each rank.
    assert [one["status"]["links_ever"] for one in found] == [4, 4, 4, 3]
    assert all(one["status"]["recovery"]["total_s"] > 0 for one in found)
    # Of the newcomer's change; who was lost had been heard before.
    assert all(one["epochs"][-1]["plan"]["step_s"] > 0 for one in found)


@pytest.mark.parametrize(
    "die",
    [
        # While a step runs, after its decision, while its snapshot is on its way, and during the recovery from another's loss.
        pytest.param({0: ("reduce", 3)}, marks=pytest.mark.slow),
        pytest.param({3: ("voted", 3)}, marks=pytest.mark.slow),
        {2: ("snapshot", 4)},
        {1: ("forward", 5), 2: ("moves", 2)},
    ],
    ids=lambda die: "-".join(f"{rank}{state}" for rank, (state, _) in die.items()),
)
def test_a_loss_in_any_state_changes_no_bit(whole, die):
    found, host = run(die)
    check_whole(found, host)
    same(found, whole)
    assert len(found) == 4 - len(die)


def test_gradients_of_weights_that_come_later_change_no_bit_nor_does_a_loss_among_them(whole):
    policy = Policy(schedule_names=("decoupled",))
    found, host = run({1: ("weight", 5)}, coordinator={"policy": policy})
    check_whole(found, host)
    same(found, whole)
    assert len(found) == 3
    assert {one["status"]["plan"]["schedule"] for one in found} == {"decoupled"}


def streams_of(host):
    return [details for _, what, details in host.history if what == "stream"]


def test_layers_move_while_training_goes_on(whole):
    # Eight numbers of a piece a step, so that it takes several.
    found, host = run({1: ("forward", 5)}, coordinator={"chunk_bytes": 32})
    check_whole(found, host)
    same(found, whole)
    (stream,) = streams_of(host)
    assert stream["end"] - stream["version"] > 1
    assert host.layout.bounds != (3,)
    told = [one["status"]["recovery"] for one in found]
    assert sum(one["streamed"] for one in told) > 0
    assert sum(one["refused"] for one in told) == 0
    # What came in the stream is not sent again: whole weights of layers alone are.
    assert sum(one["moved_bytes"] for one in told) < sum(one["streamed_bytes"] for one in told)


@pytest.mark.slow
def test_what_was_damaged_on_its_way_is_sent_again(whole):
    found, host = run({1: ("forward", 5)}, own={rank: {"damage_stream": True} for rank in (0, 2, 3)})
    check_whole(found, host)
    same(found, whole)
    assert streams_of(host)
    assert sum(one["status"]["recovery"]["refused"] for one in found) > 0


@pytest.mark.slow
@pytest.mark.parametrize("state", ["stream", "observe", "vote in stream"])
def test_a_loss_while_pieces_travel_changes_no_bit(whole, state):
    def join(ranks, host):
        assert host.wait_for(lambda host: host.version > 1)
        number = ranks.join(train, host.address, STEPS, None, {4: ("observe", 2)} if state == "observe" else None, 0.0)
        if state == "observe":
            ranks.expect_end(number)

    own = {rank: {"pace_s": 0.05} for rank in range(4)}
    # For so long that the newcomer has voted, and waits for the commit.
    own[1]["naps"] = {"vote in stream": 0.5}
    found, host = run(
        None if state == "observe" else {1: (state, 2)}, own=own, while_running=join, coordinator={"chunk_bytes": 32}
    )
    same([one for one in found if one["losses"]], whole)
    assert len(streams_of(host)) >= 1
    assert len({details["rank"] for _, what, details in host.history if what == "lost"}) == 1


@pytest.mark.slow
def test_other_dropout_is_keyed_too_and_double_is_as_equal():
    options = {"dropout": "torch", "dtype": ranks_of.torch.float64}
    whole, _ = run(options=options, steps=4)
    found, host = run({2: ("forward", 4)}, options=options, steps=4)
    check_whole(found, host)
    same(found, whole)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", ["keyed", "torch"])
def test_without_a_fixed_order_it_is_equal_but_for_rounding(dropout):
    options = {"dropout": dropout}
    whole, _ = run(options=options)
    found, host = run({0: ("forward", 8)}, options={"exact": False, **options})
    check_whole(found, host)
    assert losses_of(found) == pytest.approx(losses_of(whole), rel=1e-5)


@pytest.mark.slow
def test_a_stage_that_is_lost_comes_back_from_the_second_copy(whole):
    die = {0: ("forward", 8), 1: ("forward", 8)}
    found, host = run(die, options={"snapshot_copies": 2})
    check_whole(found, host)
    same(found, whole)


@pytest.mark.slow
def test_a_rank_and_its_neighbour_are_too_much(whole):
    said = r"UnrecoverableError.*rank [01] is lost, and its neighbour is lost too; the last checkpoint: there is none"
    with pytest.raises(RankError, match=said):
        run({0: ("forward", 8), 1: ("forward", 8)})


def test_a_damaged_snapshot_is_not_used(whole):
    # What rank 0 keeps of rank 1 is damaged in memory; the second copy, in the other stage, is sound.
    own = {0: {"damage": 1}}
    found, host = run({1: ("forward", 9)}, options={"snapshot_copies": 2}, own=own)
    check_whole(found, host)
    same(found, whole)
    assert [details["owner"] for _, what, details in host.history if what == "bad snapshot"] == [1]
    with pytest.raises(RankError, match=r"rank 1 is lost, and the snapshot of it is damaged"):
        run({1: ("forward", 9)}, own=own)


def test_a_rank_that_ends_by_an_error_is_lost_and_others_go_on(whole):
    found, host = run(own={2: {"raises": 3, "tells": True}})
    ended = next(one for one in found if "error" in one)
    assert ended["error"] == "ZeroDivisionError: division by zero"
    found = [one for one in found if one is not ended]
    check_whole(found, host)
    same(found, whole)
    (lost,) = [details for _, what, details in host.history if what == "lost"]
    assert lost == {"rank": 2, "why": "it failed: ZeroDivisionError: division by zero"}
    assert all([told["lost"] for told in one["epochs"] if told["lost"]] == [{2: lost["why"]}] for one in found)


def test_a_rank_whose_own_code_ends_it_between_steps_is_lost_and_others_go_on(whole):
    found, host = run(own={1: {"raises_after": 5, "tells": True}})
    assert [one["error"] for one in found if "error" in one] == ["OSError: no more data"]
    found = [one for one in found if "error" not in one]
    check_whole(found, host)
    same(found, whole)


def test_an_error_that_ends_one_rank_after_another_at_the_same_step_ends_training():
    with pytest.raises(RankError, match=r"step 2 ends one rank after another: rank \d failed: ZeroDivisionError"):
        run(options={"raises_at_step": 2, "tells": True})


@pytest.mark.slow
def test_a_rank_that_leaves_before_the_end_is_not_missed(whole):
    found, host = run(own={3: {"quits_after": 5}})
    left = next(one for one in found if one["rank"] == 3)
    found = [one for one in found if one is not left]
    check_whole(found, host)
    same(found, whole)
    assert [details["why"] for _, what, details in host.history if what == "lost"] == ["it left before the end"]


def test_a_rank_that_is_lost_before_training_begins_is_waited_for(whole):
    def join(ranks, host):
        assert host.wait_for(lambda host: any(what == "lost" for _, what, _ in host.history))
        ranks.join(train, host.address, STEPS, None, None, 0.0)

    found, host = run({2: ("links", 1)}, while_running=join)
    check_whole(found, host)
    same(found, whole)


def test_a_loss_of_a_rank_and_its_neighbour_in_the_first_step_is_said():
    said = r"UnrecoverableError.*rank [01] is lost, and its neighbour is lost too; the last checkpoint: there is none"
    with pytest.raises(RankError, match=said):
        run({0: ("forward", 1), 1: ("forward", 1)})


@pytest.mark.slow
def test_who_has_another_model_is_refused(whole):
    with pytest.raises(
        RankError,
        match=r"its global_batch is 12, and those here have 10|its global_batch is 10, and those here have 12",
    ):
        run(own={3: {"global_batch": 12}})
    with pytest.raises(RankError, match="begins with other weights"):
        run(own={3: {"model_seed": 1}})
    # Of the same sizes, and with the same weights.
    with pytest.raises(
        RankError, match=r"its layers differ at 0: Sequential [0-9a-f]{16}, and those here have Sequential"
    ):
        run(own={3: {"rate": 0.4}})


def test_weights_that_all_ask_for_are_there_though_one_is_lost_meanwhile(whole):
    """Rank 2 gives the weights of its stage to no one; rank 3 needs none of them, had what it asked for, and left the others alone."""
    found, host = run({2: ("weights", 1)})
    same(found, whole)
    assert all(one["weights"] == whole[0]["weights"] for one in found)
    assert sorted(one["rank"] for one in found) == [0, 1, 3]
    assert [details["rank"] for _, what, details in host.history if what == "lost"] == [2]


@pytest.mark.parametrize(("rank", "state"), [(3, "save"), (0, "manifest")])
def test_a_checkpoint_during_which_one_is_lost_is_whole(whole, tmp_path, rank, state):
    """Others have written their slices when rank 3 is lost; and all have when rank 0 is, which was to say so on the disk."""
    folder = tmp_path / "kept"
    found, host = run({rank: (state, 1)}, options={"saves": (str(folder), [4])}, own={3: {"naps": {"save": 0.4}}})
    check_whole(found, host)
    same(found, whole)
    assert all(not one["unsaved"] for one in found)
    version, slices = saving.read_slices(folder, SIZES)
    assert version == 4
    assert sorted(slices) == list(range(len(SIZES)))
    # It is told of once, when it is there.
    assert [details for _, what, details in host.history if what == "saved"] == [{"version": 4, "why": None}]


@pytest.mark.slow
def test_a_rank_that_is_stuck_is_cast_out_and_not_those_who_wait_for_it(whole):
    own = {1: {"stuck": (3, 9.0), "tells": "all"}}
    found, host = run(own=own, options={"timeout_s": 3.0})
    ended = next(one for one in found if "error" in one)
    assert (ended["rank"], ended["error"].partition(" ")[0]) == (1, "PeerError:")
    found = [one for one in found if one is not ended]
    check_whole(found, host)
    same(found, whole)
    (lost,) = [details for _, what, details in host.history if what == "lost"]
    assert lost["rank"] == 1
    assert "it is stuck: rank" in lost["why"]


@pytest.mark.slow
def test_a_rank_that_is_slow_and_cannot_be_missed_is_waited_for(whole):
    found, host = run(own={1: {"stuck": (3, 9.0)}}, options={"timeout_s": 3.0, "snapshot_copies": 0})
    check_whole(found, host)
    same(found, whole)
    assert [details["rank"] for _, what, details in host.history if what == "stuck"] == [1]


def test_a_run_goes_on_in_another_layout_from_what_it_saved(whole, tmp_path):
    folder = tmp_path / "kept"
    run(steps=5, options={"saves": (str(folder), [2, 4])})
    assert saving.newest(folder).name == "step-0000000004"
    found, host = run(mesh=(1, 3), options={"resume": str(folder)})
    check_whole(found, host)
    assert losses_of(found) == losses_of(whole)[4:]
    assert found[0]["weights"] == whole[0]["weights"]


@pytest.mark.slow
def test_a_disk_that_is_full_costs_the_checkpoint_alone(whole, tmp_path):
    folder = tmp_path / "kept"
    own = {2: {"full_from": 2}}
    found, _ = run(options={"saves": (str(folder), [2, 4])}, own=own)
    same(found, whole)
    assert all("rank 2: CapacityError" in text or "rank 2: OSError" in text for one in found for text in one["unsaved"])
    assert [len(one["unsaved"]) for one in found] == [1] * 4
    assert saving.newest(folder).name == "step-0000000002"
    # After a loss that cannot be mended it is named.
    with pytest.raises(RankError, match=r"the last checkpoint: .*kept \(step 2\)"):
        run({0: ("forward", 14), 1: ("forward", 14)}, options={"saves": (str(folder), [2])})


def schedule_of(seed):
    """Who dies where: a function of the seed."""
    chance = random.Random(seed)
    states = [
        "forward",
        "backward",
        "reduce",
        "update",
        "vote",
        "voted",
        "commit",
        "snapshot",
        "epoch",
        "links",
        "moves",
        "ready",
        "go",
    ]
    first, second = chance.sample(range(4), 2)
    # Two losses, of ranks that do not keep each other's snapshots.
    if first // 2 == second // 2:
        second = (second + 2) % 4
    die = {first: (chance.choice(states[:8]), chance.randint(2, 6))}
    if chance.random() < 0.6:
        state = chance.choice(states)
        die[second] = (state, chance.randint(2, 6) if state in states[:8] else 2)
    return die


def check_seed(seed, whole):
    die = schedule_of(seed)
    found, host = run(die)
    same(found, whole)
    lost = {details["rank"] for _, what, details in host.history if what == "lost"}
    # One that was to end in a recovery that did not come lived on.
    assert lost <= set(die), [(what, str(details)) for _, what, details in host.history][-9:]
    if len(found) == len(host.layout.grid.ranks):
        check_whole(found, host)


@pytest.mark.parametrize("seed", range(1))
def test_seeded_losses_change_no_bit(whole, seed):
    check_seed(seed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 200))
def test_many_seeded_losses_change_no_bit(whole, seed):
    check_seed(seed, whole)


@pytest.mark.slow
def test_a_rank_that_says_nothing_is_cast_out(whole):
    def stop(ranks, host):
        assert host.wait_for(lambda host: host.version >= 2)
        ranks.kill(3, ranks_of.signal.SIGSTOP)
        ranks.expect_end(3)

    found, host = run(
        while_running=stop, coordinator={"patience_s": 1.5}, own={rank: {"pace_s": 0.05} for rank in range(4)}
    )
    check_whole(found, host)
    same(found, whole)
    assert any("silent" in str(details) for _, what, details in host.history if what == "lost")


def test_a_link_that_breaks_between_two_who_live_is_opened_again(whole):
    found, host = run(own={3: {"cuts": 2}})
    check_whole(found, host)
    same(found, whole)
    assert not [details for _, what, details in host.history if what == "lost"]
    assert [what for _, what, _ in host.history].count("epoch") == 2


def test_who_has_left_has_been_heard():
    """A process may end as soon as `close` is done: nothing may still be on its way then."""
    with Coordinator(replicas=1, stages=1, secret=SECRET) as host:
        train(0, 1, host.address, 2, {"mesh": (1, 1)})
        assert [what for _, what, _ in host.history][-1] == "left"
        assert host.ranks == ()


def test_what_is_told_of_a_state(whole):
    status = whole[0]["status"]
    assert status["stages"] == [[0, 1], [2, 3]]
    assert status["links"] == 3
    assert [stage["ranks"] for stage in status["plan"]["stages"]] == status["stages"]
    assert status["plan"]["step_s"] > 0
    assert status["recovery"]["detect_s"] == 0
    assert re.fullmatch("[0-9a-f]{32}", whole[0]["digest"])
