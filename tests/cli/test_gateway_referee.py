"""``anabranch gateway`` fit, eval and route: from files to files, what ``--json`` promises, and what mistakes give."""

import gzip
import json
import os
import re
import subprocess
import sys

import pytest

from anabranch.cli.main import main
from made_outcomes import MODELS, made_outcomes, write_outcomes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Outcomes to learn from and others to judge on, in each format, and fitted routers."""
    folder = tmp_path_factory.mktemp("gateway")
    learned, other = made_outcomes(160), made_outcomes(40, seed=1)
    write_outcomes(folder / "data.jsonl", learned)
    (folder / "data.jsonl.gz").write_bytes(gzip.compress((folder / "data.jsonl").read_bytes()))
    write_outcomes(folder / "other.jsonl", other)
    header = "prompt,subject," + ",".join(f"{name}_correct" for name in MODELS)
    lines = [
        f"{text},{other.task[row]},{','.join(map(str, other.score_NM[row]))}" for row, text in enumerate(other.query)
    ]
    (folder / "other.csv").write_text("\n".join([header, *lines]))
    (folder / "prices.json").write_text(
        json.dumps({name: {"input": at + 1, "output": 2 * at + 1} for at, name in enumerate(MODELS)})
    )
    assert main(f"gateway fit {folder}/data.jsonl --out {folder}/routers --quiet".split()) == 0
    return folder


@pytest.fixture
def run(place, capsys, monkeypatch):
    """Runs a command in the folder: code, stdout, stderr."""
    monkeypatch.chdir(place)

    def run(*arguments):
        code = main(["gateway", *arguments])
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


def told(found):
    """The JSON of a command that went well, with nothing else on stdout."""
    code, out, err = found
    assert code == 0, err
    return json.loads(out)


@pytest.mark.slow
def test_a_line_that_writes_beside_the_routers_works_again(run, place):
    line = "eval other.jsonl --router routers --markdown routers/e.md --html routers/e.html --picture routers/e.svg --json --quiet"
    for _ in range(2):
        told(run(*line.split()))
    (place / "routers/lost.md").symlink_to("knn.safetensors")
    code, _, err = run(*"eval other.jsonl --router routers --markdown routers/lost.md".split())
    assert (code, "would be lost" in err) == (2, True)
    for made in ("e.md", "e.html", "e.svg", "lost.md"):
        (place / "routers" / made).unlink()


def test_fit_then_eval_judges_on_what_was_held_out(run):
    found = told(
        run("fit", "data.jsonl", "--out", "made", "--strategy", "ridge", "--strategy", "knn", "--json", "--quiet")
    )
    assert (list(found["routers"]), found["learned"], found["held_out"]) == (["ridge", "knn"], 128, 32)
    judged = told(run("eval", "data.jsonl", "--router", "made", "--json", "--quiet"))
    assert judged["num_test"] == 32
    assert [one["name"] for one in judged["strategies"]] == ["ridge", "knn"]
    assert {"name", "score", "cost", "aiq", "interval"} <= judged["strategies"][0].keys()
    assert judged["baselines"]["best_single"]["model"] in MODELS


def test_a_gzipped_file_gives_the_same_numbers(run):
    plain, packed = (
        told(run("eval", name, "--seeds", "1", "--json", "--quiet")) for name in ("data.jsonl", "data.jsonl.gz")
    )
    assert plain["data"] == packed["data"]
    assert [one["score"] for one in plain["strategies"]] == [one["score"] for one in packed["strategies"]]


def test_eval_learns_judges_and_writes_pages(run, place):
    found = told(
        run(
            "eval",
            "data.jsonl",
            "--strategy",
            "knn",
            "--set",
            "knn.k=5",
            "--html",
            "page.html",
            "--picture",
            "curve.svg",
            "--markdown",
            "table.md",
            "--seeds",
            "1",
            "--json",
            "--quiet",
        )
    )
    assert found["wrote"] == ["curve.svg", "page.html", "table.md"]
    assert found["num_train"] == 128
    page = (place / "page.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 1
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert "<script" not in page
    assert (place / "curve.svg").read_text().startswith("<svg")
    assert "| knn |" in (place / "table.md").read_text()


def test_a_csv_file_without_costs_and_with_prices(run):
    plain = told(run("eval", "other.csv", "--strategy", "ridge", "--seeds", "1", "--json", "--quiet"))
    assert plain["strategies"][0]["cost"] is None
    mapping = "query=prompt,task=subject,score:small=small_correct,score:large=large_correct"
    prices = ["--prices", "prices.json", "--seeds", "1", "--json", "--quiet"]
    priced = told(run("eval", "other.csv", "--strategy", "ridge", "--columns", mapping, *prices))
    assert priced["models"] == ["small", "large"]
    assert priced["strategies"][0]["cost"] > 0
    assert priced["strategies"][0]["apgr"] is not None


def test_what_a_table_was_read_as_is_said(run, place):
    lines = (place / "other.csv").read_text().split("\n")
    odd = [
        lines[0] + ",year," + ",".join(f"cost:{name}" for name in MODELS),
        *(line + ",2025,0.1,0.2,0.3" for line in lines[1:]),
    ]
    (place / "odd.csv").write_text("\n".join(odd))
    known = {"models": list(MODELS), "costs": list(MODELS), "left_out": {"year": "not scores, by its name"}}
    said = "left out of odd.csv: year (not scores, by its name)"
    for line in (
        "fit odd.csv --out odd --strategy ridge --quiet",
        "eval odd.csv --strategy ridge --seeds 1 --quiet",
        "replay odd.csv --router odd --allow-leak --quiet",
    ):
        code, out, err = run(*line.split())
        assert code == 0, err
        assert err.count(said) == 1
        if "replay" not in line:
            assert re.search(rf"^models +{', '.join(MODELS)}$", out, re.MULTILINE)
            assert re.search(r"^costs +of all models$", out, re.MULTILINE)
        assert known.items() <= told(run(*line.split(), "--json"))["read"].items()
    (place / "odd.csv").write_text("\n".join(odd).replace(",2025,0.1", ",2025,none at all", 1))
    code, out, err = run("fit", "odd.csv", "--out", "odd2")
    assert (code, out) == (2, "")
    assert "odd.csv, line 2: cost of 'small' (column 'cost:small') is 'none at all'" in err
    assert not (place / "odd2").exists()


@pytest.mark.slow
def test_other_outcomes_are_judged_whole_and_shared_ones_refused(run, place):
    assert told(run("eval", "other.jsonl", "--router", "routers", "--json", "--quiet"))["num_test"] == 40
    (place / "half.jsonl").write_text("\n".join((place / "data.jsonl").read_text().splitlines()[:80]))
    code, out, err = run("eval", "half.jsonl", "--router", "routers", "--quiet")
    assert (code, out) == (2, "")
    assert re.search(r"error: \d+ of 80 questions were learned from", err)
    unseen = told(run("eval", "half.jsonl", "--router", "routers", "--unseen", "--json", "--quiet"))
    leak = told(run("eval", "half.jsonl", "--router", "routers", "--allow-leak", "--json", "--quiet"))
    assert 0 < unseen["num_test"] < leak["num_test"] == 80
    code, _, err = run("eval", "data.jsonl", "--test", "half.jsonl", "--quiet")
    assert code == 2
    assert "80 of 80 test questions were learned from" in err


def test_route_explains_one_query(run):
    found = told(run("route", "write verses about rain", "--router", "routers", "--strategy", "knn", "--json"))
    assert (
        found["candidates"][0]["model"] == "medium"
        or found["candidates"][0]["quality"] >= found["candidates"][1]["quality"]
    )
    assert found["details"]["neighbours"]
    cheap = told(
        run(
            "route",
            "write verses about rain",
            "--router",
            "routers/knn.safetensors",
            "--trade-off",
            "1000000",
            "--json",
        )
    )
    assert cheap["candidates"][0]["model"] == "small"
    code, out, _ = run("route", "write verses about rain", "--router", "routers/ridge.safetensors")
    assert code == 0
    assert "why     ridge expects" in out


def write_log(place):
    """`log.jsonl`: one answer a query, drawn with a chance of one in three."""
    other = made_outcomes(300, seed=2)
    lines = []
    for row, text in enumerate(other.query):
        model = MODELS[row % 3]
        line = {
            "query": text,
            "scores": {model: other.score_NM[row, row % 3]},
            "cost": {model: other.cost_NM[row, row % 3]},
        }
        lines.append(json.dumps({**line, "probability": {model: 1 / 3}}))
    (place / "log.jsonl").write_text("\n".join(lines))


def test_replay_estimates_what_routers_would_have_earned(run, place):
    write_log(place)
    found = told(run("replay", "log.jsonl", "--router", "routers", "--strategy", "knn", "--json", "--quiet"))
    assert (found["rows"], found["has_probabilities"]) == (300, True)
    one = found["strategies"][0]
    assert 50 < one["matched"] < 150
    assert one["interval"][0] < one["score"] < one["interval"][1]
    code, out, _ = run("replay", "log.jsonl", "--router", "routers", "--quiet")
    assert code == 0
    assert "the log: 300 scored answers" in out
    code, _, err = run("replay", "data.jsonl", "--router", "routers", "--quiet")
    assert code == 2
    assert "questions were learned from" in err
    assert "Take them out (--unseen), or allow the leak on purpose (--allow-leak" in err
    unseen, leak = (
        told(run("replay", "data.jsonl", "--router", "routers", option, "--json", "--quiet"))
        for option in ("--unseen", "--allow-leak")
    )
    assert 0 < unseen["rows"] < leak["rows"] == 160


def test_estimates_beyond_the_range_of_scores_are_explained(run, place):
    """Of a few rows that all match, drawn with a chance of one in three, IPS is three times their scores."""
    rows = [
        {"query": f"add the numbers {row}", "scores": {"medium": 1.0}, "probability": {"medium": 1 / 3}}
        for row in range(30)
    ]
    (place / "lucky.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(f"gateway fit {place}/lucky.jsonl --out {place}/lucky --strategy knn --quiet".split()) == 0
    code, out, _ = run("replay", "lucky.jsonl", "--router", "lucky", "--allow-leak", "--quiet")
    assert code == 0
    assert "single ones may pass the range of scores" in out
    assert "Here they do for knn." in out
    write_log(place)
    code, out, _ = run("replay", "log.jsonl", "--router", "routers", "--quiet")
    assert (code, "may pass the range" in out) == (0, False)


def test_what_a_log_leaves_open_is_to_be_collected(run, place):
    """All models alike: nobody is better, and the other models are to be asked the same questions."""
    rows = [
        {
            "query": f"add the numbers {row}",
            "scores": {MODELS[row % 3]: float(row % 5 > 1)},
            "probability": {MODELS[row % 3]: 1 / 3},
        }
        for row in range(200)
    ]
    (place / "alike.jsonl").write_text("\n".join(map(json.dumps, rows)))
    collect = "anabranch gateway collect --config gateway.toml --judge MODEL --out outcomes.jsonl"
    found = told(run("eval", "alike.jsonl", "--strategy", "knn", "--json", "--quiet"))["verdict"]
    assert (found["resolved"], found["next"]) == (False, collect)
    told(run("fit", "alike.jsonl", "--out", "alike", "--strategy", "knn", "--json", "--quiet"))
    found = told(run("eval", "alike.jsonl", "--router", "alike", "--json", "--quiet"))["verdict"]
    assert (found["resolved"], found["next"]) == (False, collect)
    # What is recommended is kept all the same.
    assert (place / "alike" / "recommended.json").exists()


def test_tables_are_plain_text_with_every_baseline(run):
    code, out, _ = run("eval", "other.jsonl", "--router", "routers", "--quiet")
    assert code == 0
    for word in ("knn", "random choice", "best single", "best model of the true task", "oracle", *MODELS):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval", "missing argument 'DATA' (see anabranch gateway eval --help)"),
        ("fit data.jsonl", "missing option '--out' (see anabranch gateway fit --help)"),
        ("evl x", "no such command 'evl'; did you mean 'eval'? (see anabranch gateway --help)"),
        ("eval none.jsonl", "cannot read none.jsonl: no such file or directory"),
        ("eval prices.toml", "prices.toml is a config by its name"),
        ("eval data.jsonl --embedder bert", "no embedder of kind 'bert'; known: hashed, minilm"),
        ("eval data.jsonl --strategy knn --set knn.q=1", "Knn has no field 'q'"),
        ("eval data.jsonl --set knn=1", "--set has 'knn'; write NAME.FIELD=VALUE"),
        ("eval data.jsonl --picture x.gif", "--picture is 'x.gif'; its name must end in .png or .svg"),
        ("eval data.jsonl --html x.txt", "--html is 'x.txt'; its name must end in .html"),
        (
            "eval data.jsonl --router none",
            "none is no folder of routers: it has no manifest.json; make one with fit",
        ),
        ("eval other.csv --columns prompt", "columns have 'prompt'; write query=COLUMN"),
        ("eval other.jsonl --router routers --strategy irt", "routers has no router 'irt'; it has knn, cluster, ridge"),
        (
            "fit data.jsonl --out x --hold-out 0.001",
            "--hold-out is 0.001, which leaves one side of 160 questions empty",
        ),
        ("route", "missing argument 'TEXT' (see anabranch gateway route --help)"),
        ("route q", "missing option '--router' (see anabranch gateway route --help)"),
    ],
)
def test_a_mistake_is_told_in_one_line(run, arguments, message):
    code, out, err = run(*arguments.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"error: {message}")


def test_a_blank_query_is_refused(run):
    code, _, err = run("route", " ", "--router", "routers")
    assert (code, err) == (2, "error: the query is empty; write what is asked\n")


def test_a_damaged_router_is_refused(run, place):
    content = (place / "routers" / "knn.safetensors").read_bytes()
    (place / "cut.safetensors").write_bytes(content[:-20])
    code, _, err = run("route", "q", "--router", "cut.safetensors")
    assert code == 2
    assert "cut.safetensors is damaged or no router" in err
    (place / "gateway.toml").write_text("[[models]]\nname = 'small'\n")
    code, _, err = run("eval", "other.jsonl", "--router", "gateway.toml")
    assert code == 2
    assert err.splitlines()[-1].endswith(
        "gateway.toml is damaged or no router: it is no whole safetensors file, which fit writes"
    )


@pytest.mark.slow
def test_routes_and_judgements_of_light_strategies_load_no_torch(place):
    script = (
        "import sys; from anabranch.cli.main import main\n"
        "assert main('gateway fit data.jsonl --out light --quiet --json'.split()) == 0\n"
        "assert main('gateway eval data.jsonl --router light --quiet --json'.split()) == 0\n"
        "assert main(['gateway', 'route', 'add', '--router', 'light', '--json']) == 0\n"
        "import asyncio\n"
        "from anabranch.gateway import Gateway\n"
        "async def ask():\n"
        "    async with Gateway(store=None) as gateway:\n"
        "        await gateway.achat({'model': 'auto', 'messages': [{'role': 'user', 'content': 'x'}]})\n"
        "asyncio.run(ask())\n"
        "heavy = {'torch', 'matplotlib', 'scipy', 'numba', 'pyarrow', 'tokenizers', 'networkx', 'starlette', 'uvicorn'}\n"
        "assert not heavy & sys.modules.keys(), sorted(heavy & sys.modules.keys())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# The verdict


def test_eval_ends_in_a_verdict_and_route_uses_what_it_recommends(run, place):
    write_outcomes(place / "many.jsonl", made_outcomes(1500, seed=3))
    options = "--out many --strategy knn --strategy ridge --json --quiet"
    assert told(run("fit", "many.jsonl", *options.split()))["best_single"] == "large"
    code, out, err = run("route", "add the numbers 7", "--router", "many", "--json")
    assert code == 0
    assert "no router of many is recommended yet (anabranch gateway eval DATA --router many" in err
    assert json.loads(out)["recommended"] is None
    found = told(run("eval", "many.jsonl", "--router", "many", "--html", "many.html", "--json", "--quiet"))["verdict"]
    assert (found["best_single"], found["chosen_on"], found["resolved"]) == ("large", "train", True)
    assert found["gains"][0]["found"] == "better"
    assert found["gains"][0]["interval"][0] > 0
    assert found["next"] == "anabranch gateway serve --config gateway.toml --router many"
    chosen = found["recommended"]
    assert (chosen["kind"], chosen["name"]) == ("strategy", found["gains"][0]["name"])
    assert "<h2>Verdict</h2>" in (place / "many.html").read_text()
    routed = told(run("route", "add the numbers 7", "--router", "many", "--json"))
    assert (routed["router"], routed["recommended"]) == (chosen["name"], chosen)
    code, out, _ = run("route", "add the numbers 7", "--router", "many")
    assert f"router  {chosen['name']}: eval recommends {chosen['name']}, since it is better than large" in out
    other = "ridge" if chosen["name"] == "knn" else "knn"
    assert told(run("route", "add", "--router", "many", "--strategy", other, "--json"))["recommended"] is None
    # Until the next evaluation it can be served: of what is fitted anew, what was recommended before, which is said.
    told(run("fit", "many.jsonl", *options.split()))
    kept = told(run("route", "add", "--router", "many", "--json"))["recommended"]
    assert kept == {**chosen, "reason": kept["reason"]}
    assert "judged before the routers were fitted anew" in kept["reason"]
    code, _, err = run("fit", "many.jsonl", "--out", "many", "--strategy", "cluster", "--quiet")
    assert code == 0
    assert "what was recommended of many is not among the new routers; until eval, nothing is" in err
    assert not (place / "many" / "recommended.json").exists()


def test_where_nothing_is_resolved_the_best_single_model_is_recommended(run, place):
    told(run("fit", "other.jsonl", "--out", "few", "--json", "--quiet"))
    code, out, _ = run("eval", "other.jsonl", "--router", "few", "--quiet")
    assert code == 0
    said = [line for line in out.splitlines() if line.startswith(("verdict", "next"))]
    assert "not resolved on 8 questions" in said[0]
    assert "Cost at equal quality is not resolved" in said[1]
    best = json.loads((place / "few" / "recommended.json").read_text())["best_single"]
    assert said[2].startswith(f"verdict Recommended: always {best}, since it did best on what was learned from")
    assert said[2].endswith("and nothing is shown to be better or cheaper at equal quality.")
    assert said[3] == "next    anabranch gateway serve --config gateway.toml --router few"
    routed = told(run("route", "add the numbers 7", "--router", "few", "--json"))
    assert (routed["router"], routed["recommended"]["kind"], routed["candidates"][0]["model"]) == (best, "model", best)


def test_a_part_of_the_routers_or_a_leak_is_not_kept(run, place):
    told(run("fit", "data.jsonl", "--out", "part", "--json", "--quiet"))
    code, out, err = run("eval", "data.jsonl", "--router", "part", "--strategy", "knn", "--json", "--quiet")
    assert code == 0
    assert "what is recommended is not kept in part: only knn was judged" in err
    assert json.loads(out)["verdict"]["next"].startswith("anabranch gateway ")
    code, _, err = run("eval", "data.jsonl", "--router", "part", "--allow-leak", "--quiet")
    assert (code, "--allow-leak" in err) == (0, True)
    assert not (place / "part" / "recommended.json").exists()


def test_the_next_command_without_routers_on_the_disk(run):
    found = told(run("eval", "data.jsonl", "--strategy", "knn", "--seeds", "1", "--json", "--quiet"))["verdict"]
    wanted = {
        "strategy": "anabranch gateway fit data.jsonl --out routers --strategy knn",
        "model": "anabranch gateway eval data.jsonl --strategy all",
    }
    assert found["next"] == wanted[found["recommended"]["kind"]]


def test_a_damaged_recommendation_is_told_in_a_line(run, place):
    told(run("fit", "other.jsonl", "--out", "hurt", "--json", "--quiet"))
    (place / "hurt" / "recommended.json").write_text("{")
    code, out, err = run("route", "q", "--router", "hurt")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "recommended.json cannot be read" in err
    code, out, err = run("serve", "--router", "hurt", "--check")
    assert (code, out, err.count("\n")) == (2, "", 1)
