"""What an engine within another process is told, and what the parts of a server make of it that have no socket."""

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.errors import AnabranchError, ConfigError
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.admission import AdmissionConfig
from anabranch.serving.http.inside_config import BODY_BYTES, InsideConfig

MADE = InsideConfig(
    engine=ServingConfig(model="folder/river", name="brook", process=False),
    admission=AdmissionConfig(max_in_flight=3),
    reasoning_format="think",
    tool_format="hermes",
    restarts=0,
)


def test_it_reads_back_as_it_was_written():
    assert from_dict(InsideConfig, to_dict(MADE)) == MADE
    assert InsideConfig().engine.process is False


def test_a_server_without_a_socket_has_the_same_names_and_no_limits_of_bodies():
    http = MADE.http
    assert (http.name, http.admission, http.restarts) == ("brook", MADE.admission, 0)
    assert (http.reasoning_format, http.tool_format) == ("think", "hermes")
    assert (http.limits.body_bytes, http.limits.bodies_bytes, http.limits.deadline_s) == (BODY_BYTES, BODY_BYTES, None)
    assert (http.access_log, http.page) == (False, False)
    # What no name is given is called by its path.
    assert InsideConfig().http.name is None


def test_what_may_not_be_is_refused():
    with pytest.raises(ConfigError, match="restarts is -1"):
        InsideConfig(restarts=-1)
    with pytest.raises(ConfigError, match="restart"):
        from_dict(InsideConfig, {"restart": 1})


def test_a_check_reads_what_is_there(tmp_path):
    with pytest.raises(AnabranchError, match="none"):
        InsideConfig(engine=ServingConfig(model=str(tmp_path / "none"), process=False)).check()
