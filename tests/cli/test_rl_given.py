"""What may be given to a training of a policy: sections of its config, and nothing twice where it goes on."""

from pathlib import Path

import pytest

from anabranch.cli.options import check_settings
from anabranch.cli.rl.given import check_resumed
from anabranch.errors import ConfigError


@pytest.mark.parametrize("name", ["model.dim", "task", "tasks.gamma", "trainer.steps", ""])
def test_fields_of_other_sections_are_refused(name):
    with pytest.raises(ConfigError, match="fields of task, train and warm can be set, such as"):
        check_settings({"task.a": 1, name: 2}, ("task", "train", "warm"), "warm.steps")


def test_fields_of_these_are_not():
    check_settings({"task.world.alpha": 1, "train.steps": 2}, ("task", "train"), "task.gamma")


@pytest.mark.parametrize(("what", "seed", "named"), [("cartpole", None, "WHAT"), (None, 0, "--seed")])
def test_what_a_run_was_begun_with_is_not_said_again(what, seed, named):
    check_resumed(Path("run"), None, None)
    with pytest.raises(ConfigError, match=f"{named} is given with --resume"):
        check_resumed(Path("run"), what, seed)
