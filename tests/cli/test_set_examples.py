"""The field that the help of a command names as an example of --set is one of that command's config, not of another's."""

import re
import tomllib
from pathlib import Path

import pytest

from anabranch import presets
from anabranch.adapters.adapt import AdaptTask, method_named
from anabranch.config import override
from anabranch.depth import dr_llm, ftp
from anabranch.heads.pvchat import Learning, Pretraining
from anabranch.serving.http.serve import ServeConfig
from anabranch.train import TaskRunConfig

CONFIGS = {
    "adapt": lambda: TaskRunConfig(task=AdaptTask.Config(model="m", data="d", method=method_named("lora"))),
    "compare": lambda: presets.rexmoe(),
    "depth prune": ftp.FitConfig,
    "depth search": dr_llm.SearchConfig,
    "depth train": dr_llm.FitConfig,
    "heads train": lambda: presets.dense(),
    "pvchat learn": Learning,
    "pvchat pretrain": Pretraining,
    "pvchat ways": Learning,
    "rl train": lambda: presets.dense(),
    "serve": ServeConfig,
    "train": lambda: presets.rexmoe(),
}


def examples():
    command, found = "", {}
    for line in (Path(__file__).parent / "help.txt").read_text(encoding="utf-8").splitlines():
        command = line.removeprefix("$ anabranch ") if line.startswith("$ anabranch ") else command
        if told := re.search(r"Set any field of the config, e\.g\. --set (\S+)\. May", line):
            found[command] = told[1]
    return found


def test_all_are_known():
    assert examples().keys() == CONFIGS.keys()


@pytest.mark.parametrize("command", CONFIGS)
def test_it_is_one_of_its_config(command):
    name, _, value = examples()[command].partition("=")
    made = {f"task.{name}" if name.startswith("method.") else name: tomllib.loads(f"x = {value}")["x"]}
    assert override(CONFIGS[command](), made) != CONFIGS[command]()


def test_a_field_of_another_config_is_told_with_what_there_is(capsys, tmp_path):
    from anabranch.cli.main import main

    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": "b"}\n')
    line = ["adapt", str(tmp_path / "base"), str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "run")]
    assert main([*line, "--set", "model.feed_forward.reuse=4"]) == 2
    assert (
        "--set model.feed_forward.reuse: fields of method, task, train and parallel can be set"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
