"""A group of real processes: what it answers before, while and after its devices change, and when some of it dies."""

import os
import random
import signal
import threading
import time
from collections import defaultdict

import pytest
import torch

from anabranch.errors import BackendError, CapacityError, InputError
from anabranch.lm.checkpoint import load_model
from anabranch.lm.seen_model import see_model
from anabranch.serving.core.request import Finish, Request, Sampling
from anabranch.serving.elasticmoe.backend import backend_of
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.group import Group
from anabranch.serving.elasticmoe.policy import Policy
from elastic_models import save_moe
from waiting import until

NEW_TOKENS = 40


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)[0].eval()


@pytest.fixture
def make(folder, fork_server):
    groups = []

    def make(**changes):
        phases = changes.pop("on_phase", lambda name: None)
        settings = {"model": str(folder), "num_blocks": 48, "max_seqs": 4, "ahead": False, "pace_s": 0.004} | changes
        group = Group(ElasticConfig(**settings), on_phase=lambda name: phases(name), fork_server=fork_server)
        groups.append(group)
        group.start()
        return group

    yield make
    for group in groups:
        group.close()


class Client:
    """Submits requests and gathers what comes."""

    def __init__(self, group) -> None:
        self.group = group
        self.tokens = defaultdict(list)
        self.finish = {}
        self.errors = []
        self._over = threading.Condition()

    def submit(self, id, prompt, **sampling):
        sampling = Sampling(**({"temperature": 0.0, "max_tokens": NEW_TOKENS} | sampling))
        self.group.ledger.submit(Request(id=id, prompt=tuple(prompt), sampling=sampling), self._take)

    def _take(self, output):
        with self._over:
            self.tokens[output.id] += output.tokens
            if output.error:
                self.errors.append(output.error)
            if output.finish is not None:
                assert output.id not in self.finish
                self.finish[output.id] = output.finish
            self._over.notify_all()

    def wait(self, count, timeout_s=60.0):
        """Until so many requests have ended."""
        with self._over:
            assert self._over.wait_for(lambda: len(self.finish) >= count, timeout_s), f"{len(self.finish)} of {count}"

    def wait_tokens(self, count, timeout_s=60.0):
        """Until so many tokens have come."""
        with self._over:
            assert self._over.wait_for(lambda: sum(map(len, self.tokens.values())) >= count, timeout_s)


def prompt_of(number):
    return [(7 * number + 3 * place) % 61 for place in range(5 + number % 20)]


@pytest.fixture(scope="module")
def greedy(model):
    """The naive twin: one sequence at a time, everything computed again for each token."""
    known = {}

    def run(number):
        if number not in known:
            tokens = prompt_of(number)
            with torch.inference_mode():
                for _ in range(NEW_TOKENS):
                    tokens.append(int(model(torch.tensor([tokens]), last_only=True).logits_BLV[0, -1].argmax()))
            known[number] = tokens[-NEW_TOKENS:]
        return known[number]

    return run


def check(client, numbers, greedy):
    client.wait(len(numbers))
    assert client.errors == []
    for number in numbers:
        assert client.finish[f"r{number}"] is Finish.LENGTH
        assert client.tokens[f"r{number}"] == greedy(number), number


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_replaced_and_its_requests_go_on(make, greedy, caplog):
    group = make(watchdog_s=1.0, devices=2)
    client = Client(group)
    for number in range(8):
        client.submit(f"r{number}", prompt_of(number))
    client.wait_tokens(4)
    os.kill(group.ledger.active.pids[1], signal.SIGSTOP)
    check(client, range(8), greedy)
    assert "device 1: its rank gives no sign of life for 1 s" in caplog.text
    assert group.counts.recoveries == 1
    assert group.is_serving


def other_weights(folder):
    """Another model of the same sizes under its name, as a release puts it there."""
    save_moe(folder.with_name("next"), seed=5)
    os.replace(folder.with_name("next") / "model.safetensors", folder / "model.safetensors")


@pytest.mark.parametrize("victim", ["rank", "memory"])
def test_a_model_that_was_replaced_is_not_mixed_with_the_one_that_serves(make, victim, tmp_path, caplog):
    """What is replaced reads the model again: its config and tokenizer, or all weights."""
    folder = save_moe(tmp_path / "moe")
    group = make(model=str(folder), devices=2)
    assert group.info.files == see_model(folder)
    client = Client(group)
    client.submit("a", prompt_of(1))
    client.wait(count=1)
    other_weights(folder)
    client.submit("b", prompt_of(1))
    client.wait(count=2)
    assert client.tokens["b"] == client.tokens["a"]
    client.submit("c", prompt_of(2), max_tokens=100)
    client.wait_tokens(2 * NEW_TOKENS + 2)
    if victim == "rank":
        group.ledger.active.kill(1)
    else:
        group.memory.process.kill()
        group.ledger.active.kill(0)
    client.wait(count=3)
    assert client.finish["c"] is Finish.ERROR
    assert any("model.safetensors is another file" in error for error in client.errors)
    until(lambda: group.is_closed and str(folder) in caplog.text)


def test_a_change_that_would_read_another_model_is_refused(make, tmp_path):
    folder = save_moe(tmp_path / "moe")
    group = make(model=str(folder), devices=1)
    client = Client(group)
    client.submit("a", prompt_of(1))
    client.wait(count=1)
    group.prepare_standby(2)
    other_weights(folder)
    # One that stood ready had read what it needs, and weights come from the devices.
    assert len(group.scale(2).new) == 2
    with pytest.raises(BackendError, match=r"model\.safetensors is another file"):
        group.scale(3)
    client.submit("b", prompt_of(1))
    client.wait(count=2)
    assert client.tokens["b"] == client.tokens["a"]


@pytest.mark.slow
def test_a_fork_server_that_has_died_is_replaced_when_ranks_are_wanted(folder):
    group = Group(ElasticConfig(model=str(folder), num_blocks=16, ahead=False))
    group.start()
    try:
        dead = group.fork_server
        os.kill(dead.pid, signal.SIGKILL)
        while dead.is_alive:
            time.sleep(0.01)
        assert group.scale(2).phases.keys() >= {"switch", "commit"}
        assert group.fork_server is not dead
        assert len(group.devices) == 2
    finally:
        group.close()


def test_logits_before_while_and_after(make, model, device):
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits_BLV[0]
    seen = []

    def probe(name=None):
        if name in (None, "warm"):
            seen.append(group.ledger.active.all("probe", tokens=tokens))

    group = make(on_phase=probe, device=device)
    for devices in (3, 2, 1):
        probe()
        group.scale(devices)
    probe()
    assert [len(answers) for answers in seen] == [1, 1, 3, 3, 2, 2, 1]
    for answers in seen:
        for logits in answers.values():
            torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mode", "weights"), [("migrate", "shared"), ("drain", "own"), ("migrate", "own")])
def test_streams_live_through_changes_unchanged(make, greedy, device, mode, weights):
    group, numbers = make(mode=mode, weights=weights, device=device), range(10)  # more than one device runs at once
    client = Client(group)
    for number in numbers:
        client.submit(f"r{number}", prompt_of(number))
    client.wait_tokens(20)
    for devices in (2, 3, 1):
        report = group.scale(devices)
        assert set(report.phases) >= {"plan", "prepare", "attach", "warm", "switch", "release", "commit"}
    check(client, numbers, greedy)
    stats = group.counts.stats(group)
    assert stats.counters["elastic_scale_events"] == 3
    assert stats.counters["elastic_downtime_s"] == 0
    assert stats.counters["elastic_requests_rerun"] == 0
    assert stats.counters["elastic_bytes_disk"] == 0
    assert stats.gauges["elastic_devices"] == 1
    usage = group.memory.usage()
    assert (stats.counters["elastic_bytes_p2p"] > 0) == (weights == "own")
    assert usage["resident"] <= group.layout.dense_bytes + group.layout.expert_total + group.kv_bytes
    sizes = [matrix.bytes * matrix.experts for layer in group.layout.layers for matrix in layer]
    assert sum(usage["read"].values()) == sum(sizes) + sum(entry.bytes for entry in group.layout.dense)


def test_sampled_streams_are_those_of_a_group_that_never_changed(make):
    streams = []
    for changes in ((), (2, 1)):
        group = make()
        client = Client(group)
        for number in range(4):
            client.submit(f"r{number}", prompt_of(number), temperature=1.0, seed=number, presence_penalty=0.5)
        client.wait_tokens(8)
        for devices in changes:
            group.scale(devices)
        client.wait(count=4)
        streams.append(dict(client.tokens))
        group.close()
    assert streams[0] == streams[1]


def test_requests_of_a_device_that_leaves_bring_their_cache(make, greedy, device):
    for _ in range(6):
        group, numbers = make(devices=2, device=device), range(6)
        client = Client(group)
        for number in numbers:
            client.submit(f"r{number}", prompt_of(number))
        client.wait_tokens(100)  # every one has filled a block
        report = group.scale(1)
        check(client, numbers, greedy)
        assert report.tokens_again < 16 * 4
        group.close()
        # Else all had ended before the device left, which a machine's load decides.
        if report.tokens_brought:
            break
    assert report.tokens_brought >= 16


DEATHS = [
    (phase, who) for phase in ("prepare", "attach", "warm", "switch", "release") for who in ("old", "new", "memory")
]
ON_CUDA = [
    ("prepare", "memory"),
    ("attach", "new"),
    ("switch", "old"),
    ("switch", "memory"),
]  # they differ by attaching alone


@pytest.mark.parametrize(
    ("device", "phase", "victim"),
    [*(("cpu", *each) for each in DEATHS), *(("standin", *each) for each in ON_CUDA)],
    indirect=["device"],
)
def test_a_death_in_any_phase_loses_nothing(make, greedy, device, phase, victim):
    killed = []

    def kill(name):
        if name != phase or killed:
            return
        killed.append(name)
        if victim == "memory":
            group.memory.process.kill()
            group.memory.process.popen.wait()
        else:
            instance = group.ledger.active if victim == "old" or group.coming is None else group.coming
            instance.kill(instance.devices[-1])

    group, numbers = make(on_phase=kill, device=device), range(6)
    client = Client(group)
    for number in numbers:
        client.submit(f"r{number}", prompt_of(number))
    client.wait_tokens(10)
    try:
        group.scale(2)
    except BackendError as error:
        assert "serve on" in str(error)  # noqa: PT017  # whether it fails depends on the phase; that it serves does not
    check(client, numbers, greedy)
    assert killed
    assert group.is_serving
    late = Client(group)
    late.submit("r3", prompt_of(3))
    check(late, [3], greedy)
    report = group.scale(3)  # and it can change still
    assert group.devices == report.new


def test_a_rank_dies_outside_of_any_change(make, greedy, device):
    group, numbers = make(devices=2, device=device), range(8)
    client = Client(group)
    for number in numbers:
        client.submit(f"r{number}", prompt_of(number))
    client.wait_tokens(40)
    group.ledger.active.kill(1)
    check(client, numbers, greedy)
    stats = group.counts.stats(group)
    assert stats.counters["elastic_recoveries"] == 1
    assert stats.counters["generation_tokens"] == 8 * NEW_TOKENS  # none twice, none forgotten with its rank
    assert stats.counters["prompt_tokens"] == sum(len(prompt_of(number)) for number in numbers)
    assert stats.counters["finished_length"] == 8
    assert stats.counters["elastic_requests_rerun"] > 0
    assert stats.counters["elastic_downtime_s"] > 0
    assert group.memory.usage()["moved"]["disk"] == sum(group.memory.usage()["read"].values())  # nothing was read again


@pytest.mark.parametrize("weights", ["own", "shared"])
def test_a_lost_device_is_replaced(make, greedy, device, weights):
    group, numbers = make(devices=2, weights=weights, device=device), range(6)
    client = Client(group)
    for number in numbers:
        client.submit(f"r{number}", prompt_of(number))
    client.wait_tokens(20)
    report = group.scale((0, 5), lost=(1,))
    check(client, numbers, greedy)
    assert group.devices == (0, 5)
    assert (report.bytes["disk"] > 0) == (weights == "own")  # what only the lost device had


def test_clients_that_leave_during_a_change(make, greedy):
    def leave(name):
        if name == "switch":
            client.group.ledger.is_paused = True
            client.group.ledger.abort("r0")
            client.group.ledger.is_paused = False

    group = make(on_phase=leave)
    client = Client(group)
    client.submit("r0", prompt_of(0), max_tokens=100, ignore_eos=True)  # longer than the change
    for number in range(1, 4):
        client.submit(f"r{number}", prompt_of(number))
    client.wait_tokens(4)
    group.scale(2)
    client.wait(count=4)
    assert client.finish["r0"] is Finish.ABORT
    for number in (1, 2, 3):
        assert client.tokens[f"r{number}"] == greedy(number)
    stats = group.counts.stats(group)
    assert stats.gauges["running"] == stats.gauges["waiting"] == 0


def test_refusals(make):
    group = make(device_memory=1 << 20, policy=Policy(max_devices=3))
    with pytest.raises(InputError, match="devices is 4; it must be 1 to"):
        group.scale(4)
    with pytest.raises(InputError, match="mode is 'jump'"):
        group.scale(2, mode="jump")
    with pytest.raises(InputError, match="lost has device 7; the group has device"):
        group.plan(1, lost=(7,))
    with pytest.raises(InputError, match="the prompt has the token 61"):
        group.ledger.submit(Request(id="a", prompt=(61,)), print)
    with pytest.raises(InputError, match="the prompt has 128 tokens"):
        group.ledger.submit(Request(id="a", prompt=(1,) * 128), print)
    with pytest.raises(CapacityError, match="device 0 would need"):
        make(device_memory=1 << 18)


def test_a_second_command_is_refused_if_so_chosen(make):
    refused = []

    def again(name):
        if name == "warm":

            def other():
                with pytest.raises(InputError, match="a change of devices is under way"):
                    group.scale(3)
                refused.append(True)

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    group = make(busy="refuse", on_phase=again)
    group.scale(2)
    assert refused == [True]
    assert group.devices == (0, 1)


def test_weights_may_be_copied_and_read_instead(make, greedy):
    """The ablations: without mapping, without peers, without a fork server's copies on standby. Slower, and the same."""
    group = make(mapped=False, weights="own", p2p=False, standby=0)
    client = Client(group)
    client.submit("r1", prompt_of(1))
    report = group.scale(2)
    check(client, [1], greedy)
    assert report.bytes["p2p"] == 0
    assert report.bytes["disk"] > 0


def test_nothing_is_left_behind(folder, fork_server, device):
    if device == "cuda":
        backend_of("cuda")  # the driver may keep files of its own as long as the process lives
    before = set(os.listdir("/proc/self/fd"))
    group = Group(ElasticConfig(model=str(folder), num_blocks=16, ahead=True, device=device), fork_server=fork_server)
    group.start()
    pids = [group.memory.process.pid, *group.ledger.active.pids.values()]
    group.scale(2)
    pids += group.ledger.active.pids.values()
    group.close()
    until(lambda: set(os.listdir("/proc/self/fd")) <= before)
    until(lambda: all(not os.path.exists(f"/proc/{pid}") or _is_zombie(pid) for pid in pids))


def _is_zombie(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().split(")")[1].split()[0] == "Z"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_changes_under_load(make, greedy):
    """Random devices, modes and deaths, a thousand of them: nothing is dropped. ``ANABRANCH_SCALE_EVENTS=60`` for a short form."""
    events, draw = int(os.environ.get("ANABRANCH_SCALE_EVENTS", "1000")), random.Random(0)
    group = make(policy=Policy(max_devices=4))
    served = 0
    for event in range(events):
        client = Client(group)
        numbers = draw.sample(range(24), draw.randint(0, 8))
        for number in numbers:
            client.submit(f"r{number}", prompt_of(number))
        if event % 20 == 19:
            active = group.ledger.active
            active.kill(draw.choice(active.devices))  # the next change may begin before this is found out
        else:
            group.scale(draw.randint(1, 4), mode=draw.choice(["migrate", "drain"]))
        check(client, numbers, greedy)
        served += len(numbers)
    stats = group.counts.stats(group)
    assert stats.counters["elastic_requests"] == served
    assert stats.counters["elastic_scale_failures"] == 0
    print(events, "events", served, "requests", stats.counters)
