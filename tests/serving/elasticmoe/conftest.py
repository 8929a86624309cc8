"""What tests of elastic serving share: a small model's folder, the process that ranks are copied from, and each backend."""

import pytest

from anabranch.serving.elasticmoe.backend import backend_of
from anabranch.serving.elasticmoe.cuda import CudaBackend
from anabranch.serving.elasticmoe.cuda_driver import LIBRARY
from anabranch.serving.elasticmoe.fork_server import ForkServer
from anabranch.serving.elasticmoe.mapped import HOST
from elastic_backends import BACKENDS, NEEDS_GPU, Standin, compile_standin
from elastic_models import save_moe


@pytest.fixture(scope="session")
def fork_server(standin_path):
    with pytest.MonkeyPatch.context() as patch:
        if standin_path is not None:  # ranks that are told to compute on CUDA devices do so on the stand-in
            patch.setenv(LIBRARY, str(standin_path))
        fork_server = ForkServer()
    yield fork_server
    fork_server.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("model") / "moe")


@pytest.fixture(scope="session")
def standin_path(tmp_path_factory):
    return compile_standin(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def standin(standin_path, monkeypatch):
    """The driver's library is the stand-in, here and in processes that are started; all that is held must be given back."""
    if standin_path is None:
        pytest.skip("a stand-in for the CUDA driver needs a C compiler and Linux")
    monkeypatch.setenv(LIBRARY, str(standin_path))
    backend_of.cache_clear()
    standin = Standin(standin_path)
    assert standin.held() == {}
    yield standin
    backend_of.cache_clear()
    assert standin.held() == {}


@pytest.fixture(params=["cpu", "standin", pytest.param("cuda", marks=NEEDS_GPU)])
def device(request):
    """What a group computes on: ``device`` of `ElasticConfig`."""
    if request.param == "standin":
        request.getfixturevalue("standin")
        return "cuda"
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "cpu":
        yield HOST
        return
    if request.param != "cuda":
        monkeypatch.setenv("STANDIN_GPUS", "2" if request.param == "standin-2" else "1")
        request.getfixturevalue("standin")
    backend = CudaBackend()
    yield backend
    backend.close()
