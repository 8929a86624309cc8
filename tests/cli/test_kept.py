"""No command writes over what it reads, nor over what it has just written: every output against every input and every other output."""

from pathlib import Path

import pytest
import typer

from anabranch import files
from anabranch.cli.main import app

# By command: its arguments, with what is read and what is written by name. An output's ending is one that the command takes.
COMMANDS = {
    "gateway import": ("{file} --out {OUT}", {"file": "a.yaml"}, {"OUT": "o.yaml"}),
    "gateway eval": (
        "{data} --test {test} --prices {prices} --router {router} --html {HTML} --picture {PICTURE} --markdown {MARKDOWN}",
        {"data": "d.jsonl", "test": "t.jsonl", "prices": "p.json", "router": "routers/knn.safetensors"},
        {"HTML": "o.html", "PICTURE": "o.svg", "MARKDOWN": "o.md"},
    ),
    "gateway fit": (
        "{data} --prices {prices} --out {OUT}",
        {"data": "routers/d.jsonl", "prices": "routers/p.json"},
        {"OUT": "routers"},
    ),
    "gateway curve": (
        "{data} --prices {prices} --picture {PICTURE}",
        {"data": "d.jsonl", "prices": "p.json"},
        {"PICTURE": "o.svg"},
    ),
    "gateway probe": ("{data} --out {OUT}", {"data": "s.json"}, {"OUT": "o.json"}),
    "gateway scale": (
        "{questions} --config {config_files} --url http://127.0.0.1:9/v1 --system1 a --out {OUT}",
        {"questions": "runs/q.jsonl", "config_files": "c.toml"},
        {"OUT": "runs/rows.jsonl"},
    ),
    "gateway collect": (
        "--config {config_files} --references {references} --judge exact --out {OUT}",
        {"config_files": "c.toml", "references": "r.jsonl"},
        {"OUT": "o.jsonl"},
    ),
    "gateway ledger export": ("--store {store} --out {OUT}", {"store": "store.csv"}, {"OUT": "o.csv"}),
    "gateway ledger backup": ("--store {store} {OUT}", {"store": "g.db"}, {"OUT": "o.db"}),
    "graph info": (
        "{source} --out {OUT} --picture {PICTURE}",
        {"source": "e.csv"},
        {"OUT": "o.csv", "PICTURE": "o.svg"},
    ),
    "graph ppr": (
        "{source} --seeds {seeds} --index {index} --out {OUT}",
        {"source": "e.csv", "seeds": "s.csv", "index": "i.anb"},
        {"OUT": "o.csv"},
    ),
    "graph embed": (
        "{source} --labels {labels} --out {OUT} --map {PICTURE} --save {SAVE}",
        {"source": "e.csv", "labels": "l.csv"},
        {"OUT": "o.npy", "PICTURE": "o.svg", "SAVE": "o.anb"},
    ),
    "graph peer": ("{LOG} --items {items} --key {KEY}", {"items": "i.csv"}, {"LOG": "o.db", "KEY": "o.key"}),
    "graph tune": ("{source} --labels {labels} --out {OUT}", {"source": "e.csv", "labels": "l.csv"}, {"OUT": "o.csv"}),
    "graph resume": (
        "{fitted} {source} --save {SAVE} --out {OUT}",
        {"fitted": "i.anb", "source": "e.csv"},
        {"SAVE": "o.anb", "OUT": "o.npy"},
    ),
    "graph transform": (
        "{fitted} --edges {edges} --features {features} --out {OUT}",
        {"fitted": "i.anb", "edges": "e.csv", "features": "f.csv"},
        {"OUT": "o.npy"},
    ),
    "graph predict": ("{fitted} {edges} --out {OUT}", {"fitted": "i.anb", "edges": "e.csv"}, {"OUT": "o.csv"}),
    "graph index": ("{vectors} --names {names} --out {OUT}", {"vectors": "v.npy", "names": "e.csv"}, {"OUT": "o.anb"}),
    "graph rewalk": (
        "{index} {source} --add {add} --remove {remove} --out {OUT} --out-graph {OUT_GRAPH}",
        {"index": "i.anb", "source": "g.anb", "add": "a.csv", "remove": "r.csv"},
        {"OUT": "o.anb", "OUT_GRAPH": "g2.anb"},
    ),
    "graph search": (
        "{index} --queries {queries} --curve {CURVE} --out {OUT}",
        {"index": "i.anb", "queries": "q.npy"},
        {"CURVE": "o.svg", "OUT": "o.csv"},
    ),
    "graph remove": ("{index} --rows 0 --out {OUT}", {"index": "i.anb"}, {"OUT": "o.anb"}),
    "graph update": ("{index} {vectors} --out {OUT}", {"index": "i.anb", "vectors": "v.npy"}, {"OUT": "o.anb"}),
    "graph rank": (
        "{clicks} jazz --test {test} --items {items} --out {OUT} --save {SAVE}",
        {"clicks": "c.csv", "test": "t.csv", "items": "i.csv"},
        {"OUT": "o.csv", "SAVE": "o.anb"},
    ),
    "plan": (
        "{model} --hardware {hardware} --shares {shares} --out {OUT} --save-hardware {SAVE} --gantt {GANTT}",
        {"model": "m/config.json", "hardware": "h.json", "shares": "s.json"},
        {"OUT": "o.json", "SAVE": "h2.json", "GANTT": "g.json"},
    ),
    "experts fit-predictor": (
        "{model} {data} --out {OUT} --save-routes {SAVE_ROUTES}",
        {"model": "m/config.json", "data": "r.npz"},
        {"OUT": "o.npz", "SAVE_ROUTES": "s.npz"},
    ),
    "adapt": (
        "{model} {data} --eval-data {evaluation} --from {source} --method mhr --out {OUT}",
        {"model": "m/config.json", "data": "m/r.jsonl", "evaluation": "m/e.jsonl", "source": "m/adapter.json"},
        {"OUT": "m"},
    ),
    "cluster fabric": (
        "--trace {trace} --network {network} --scheme wrap --picture {PICTURE} --out {OUT}",
        {"trace": "t.parquet", "network": "n.csv"},
        {"PICTURE": "o.svg", "OUT": "o.csv"},
    ),
    "cluster bench": ("--master 127.0.0.1:1 --wait 1 --secret-file {secret_file}", {"secret_file": "s.txt"}, {}),
    "cluster coordinate": ("--listen 127.0.0.1:0 --secret-file {secret_file}", {"secret_file": "s.txt"}, {}),
    "cluster master": (
        "--listen 127.0.0.1:0 --journal {JOURNAL} --secret-file {secret_file}",
        {"secret_file": "s.txt"},
        {"JOURNAL": "o.txt"},
    ),
    "cluster plan": ("{model} --ranks 1 --picture {PICTURE}", {"model": "m/config.json"}, {"PICTURE": "o.svg"}),
    "heads report": (
        "{model} --data {data} --trace {TRACE}",
        {"model": "m/config.json", "data": "t.parquet"},
        {"TRACE": "o.parquet"},
    ),
    "depth prune": (
        "{model} --data {data} --out {OUT}",
        {"model": "m/config.json", "data": "q.jsonl"},
        {"OUT": "o.safetensors"},
    ),
    "depth search": (
        "{model} --data {data} --out {OUT}",
        {"model": "m/config.json", "data": "q.jsonl"},
        {"OUT": "o.jsonl"},
    ),
    "depth train": (
        "{model} --paths {paths} --out {OUT}",
        {"model": "m/config.json", "paths": "m/p.jsonl"},
        {"OUT": "m"},
    ),
    "depth report": (
        "{model} --data {data} --routers {routers} --out {OUT}",
        {"model": "m/config.json", "data": "text/a.txt", "routers": "b/config.json"},
        {"OUT": "rep/report.json"},
    ),
    "adapters cluster": ("{pool} --clusters 1 --out {OUT}", {"pool": "p/adapter_config.json"}, {"OUT": "p"}),
    "adapters merge": ("{adapters} --out {OUT}", {"adapters": "a/adapter_config.json"}, {"OUT": "a"}),
    "adapters export": (
        "{model} {adapters} --out {OUT}",
        {"adapters": "a/adapter_config.json", "model": "m/config.json"},
        {"OUT": "a"},
    ),
    "adapters fuse": (
        "{model} {adapter} --out {OUT}",
        {"adapter": "a/adapter_config.json", "model": "m/config.json"},
        {"OUT": "m"},
    ),
    "pvchat pretrain": ("{drawings} --out {OUT}", {"drawings": "m/d.zip"}, {"OUT": "m"}),
    "pvchat learn": (
        "{model} {drawings} --name <a> --bank {bank} --out {OUT}",
        {"model": "m/config.json", "drawings": "m/a.png", "bank": "m/d.zip"},
        {"OUT": "m"},
    ),
    "pvchat ways": (
        "{model} {trials} --bank {bank} --out {OUT}",
        {"model": "m/config.json", "trials": "m/r.zip", "bank": "m/d.zip"},
        {"OUT": "m/ways.json"},
    ),
    "pvchat compose": ("{drawings} --out {OUT}", {"drawings": "m/d.zip"}, {"OUT": "m"}),
    "generate": (
        "{model} -p x --rewire --rewire-load {state} --rewire-save {SAVE}",
        {"model": "m/config.json", "state": "s.json"},
        {"SAVE": "m/o.json"},
    ),
    "adapters report": (
        "{model} {adapter} --data {data} --out {OUT}",
        {"model": "m/config.json", "adapter": "a/adapter_config.json", "data": "text/a.txt"},
        {"OUT": "rep/adapters.html"},
    ),
    "rl eval": (
        "{run} --csv {CSV} --picture {PICTURE}",
        {"run": "m/config.json"},
        {"CSV": "o.csv", "PICTURE": "o.svg"},
    ),
    "rl replay": ("{run} --out {OUT}", {"run": "m/config.json"}, {"OUT": "o.gif"}),
    "report": (
        "{model} --data {data} --out {OUT}",
        {"model": "m/config.json", "data": "text/a.txt"},
        {"OUT": "rep/report.html"},
    ),
    "oracle": (
        "{model} --data {data} --out {OUT}",
        {"model": "m/config.json", "data": "text/a.txt"},
        {"OUT": "orc/oracle.json"},
    ),
}
COMMANDS["depth oracle"] = COMMANDS["oracle"]
COMMANDS |= {f"routers {name}": COMMANDS[f"gateway {name}"] for name in ("curve", "eval", "fit", "probe", "scale")}
OWN_NAMES = (
    "report",
    "oracle",
    "depth report",
    "depth oracle",
    "adapters report",
    "gateway scale",
    "routers scale",
)  # commands whose files have their own names in the folder that is named
# Options with a place that these and other commands only read, and commands whose folders may hold nothing that is not theirs.
READ = {
    "rl train",
    "compare",
    "convert",
    "eval adapter",
    "study",
    "train",
    "heads train",  # see tests/lm/test_conversion.py, tests/train/test_resume.py
    "eval data",
    "train config_file",
    "serve config_files",
    "serve adapter_root",
    "gateway serve config_files",
    "gateway serve store",
    "serve depth",
    "serve skipper",
    "generate adapter",
    "generate depth",
    "generate skipper",
    "chat adapter",
    "chat depth",
    "chat skipper",
    "gateway replay router",
    "gateway replay prices",
    "gateway route router",
    "gateway serve router",
    "gateway add-model config_files",
    "adapt config_files",
    "gateway coe frontier router",
    "gateway coe report router",
    "routers coe frontier router",
    "routers coe report router",
    "depth eval data",
    "depth eval routers",
    "depth prune-eval data",
    "depth prune-eval skipper",
    "depth redundancy data",
    "routers replay router",
    "routers replay prices",
    "routers route router",
    "adapters recommend",
    "adapters eval",
}
# What is named on the command line is not the file but its folder.
FOLDERS = {"model": "m", "run": "m", "router": "routers", "adapters": "a", "adapter": "a", "routers": "b", "pool": "p"}


def _commands(command, name=()):
    if hasattr(command, "commands"):
        for key, child in command.commands.items():
            yield from _commands(child, (*name, key))
    else:
        yield " ".join(name), command


def test_every_option_that_names_a_place_is_gone_over():
    for name, command in _commands(typer.main.get_command(app)):
        places = {one.name for one in command.params if getattr(one, "metavar", None) in ("FILE", "DIR", "DST")}
        if name in READ or not places:
            continue
        text = COMMANDS.get(name, ("",))[0].lower()
        known = {"picture": "{picture}", "table_file": "{shares}", "save_hardware": "{save}"}
        known |= {"rewire_load": "{state}", "rewire_save": "{save}"}
        missed = {one for one in places if known.get(one, f"{{{one}}}") not in text and f"{name} {one}" not in READ}
        assert not missed, f"{name}: what it does with {missed} belongs into COMMANDS"


CASES = [
    (name, output, other)
    for name, (_, inputs, outputs) in COMMANDS.items()
    for output in outputs
    for other in [*inputs, *(one for one in outputs if one != output and outputs[one][-4:] == outputs[output][-4:])]
]


def _text_of(place):
    return {str(path): path.read_bytes() for path in sorted(Path(place).rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("name", "output", "other"), CASES)
def test_no_output_takes_the_place_of_an_input_or_of_another_output(name, output, other, tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    arguments, inputs, outputs = COMMANDS[name]
    for place in inputs.values():
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).write_text("years of work")
    places = {**{key: Path(FOLDERS.get(key, place)) for key, place in inputs.items()}, **outputs}
    if other in outputs:
        ending = Path(outputs[output]).suffix
        places[other] = f"one{ending}"
        places[output] = f"{tmp_path}/./one{ending}"
    elif name in OWN_NAMES:
        # The input is the one that has such a name.
        Path(outputs[output]).parent.mkdir(exist_ok=True)
        Path(outputs[output]).symlink_to(tmp_path / inputs[other])
    elif Path(outputs[output]).suffix:
        Path(outputs[output]).symlink_to(inputs[other])
    if name in OWN_NAMES:
        places["OUT"] = str(Path(outputs["OUT"]).parent)
    before = _text_of(".")
    code, out, err = here(*name.split(), *(word.format(**places) for word in arguments.split()))
    assert "would be lost" in err or "is to be written twice" in err
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert _text_of(".") == before


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_what_is_made_of_a_secret_is_as_secret(mode, tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    text = "model_list: [{model_name: a, litellm_params: {model: openai/a, api_key: sk-secret}}]\n"
    Path("config.yaml").write_text(text)
    assert here("gateway", "keys", "create", "--store", "g.db")[0] == 0
    for source in ("config.yaml", "g.db"):
        Path(source).chmod(mode)
    for made in (
        "import config.yaml --partial --out o.yaml",
        "ledger export --store g.db --out o.csv",
        "ledger backup --store g.db o.db",
    ):
        assert here("gateway", *made.split())[0] == 0
    assert {name: files.mode_of(name) for name in ("o.yaml", "o.csv", "o.db")} == dict.fromkeys(
        ("o.yaml", "o.csv", "o.db"), mode
    )
