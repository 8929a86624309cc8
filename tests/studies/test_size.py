from anabranch.config import configclass
from anabranch.nn import SwiGLU
from anabranch.studies.size import RunSize


@configclass
class Size(RunSize):
    hidden_dim: int = 24


def test_settings_and_run_by_hand():
    size = Size(num_layers=3, dim=16, sequence_length=32, batch_size=4, steps=5, learning_rate=1e-2, warmup=0.4)
    settings = size.settings(full=False)
    assert (settings["size"], settings["tokens_per_run"], settings["hidden_dim"]) == ("smoke", 5 * 4 * 32, 24)
    assert size.settings(full=True)["size"] == "full"
    run = size.run_of(SwiGLU.Config(hidden_dim=size.hidden_dim))
    assert (run.model.num_layers, run.model.dim, run.model.feed_forward.hidden_dim) == (3, 16, 24)
    assert (run.data.sequence_length, run.train.batch_size, run.train.steps) == (32, 4, 5)
    assert (run.train.learning_rate, run.train.schedule.warmup) == (1e-2, 0.4)
