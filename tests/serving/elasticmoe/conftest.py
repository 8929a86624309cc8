"""What tests of real ranks share: a small model's folder, and the process that ranks are copied from."""

import pytest

from anabranch.serving.elasticmoe.forge import Forge
from elastic_models import save_moe


@pytest.fixture(scope="session")
def forge():
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("model") / "moe")
