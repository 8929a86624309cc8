"""What a front end is told of a model that several devices serve."""

import pytest

from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.layout import layout_of
from anabranch.serving.elasticmoe.sizes import sizes_of
from elastic_models import save_moe


@pytest.mark.parametrize("inner", ["", "checkpoints/step-00000003"])
def test_a_model_is_called_as_one_engine_calls_it(tmp_path, inner):
    run = tmp_path / "moe"
    save_moe(run / inner)
    assert sizes_of(ElasticConfig(model=str(run)), layout_of(run))[1].model == "moe"
