"""How fast answers are made where nobody declares it."""

import pytest

from anabranch.gateway.output_speeds import OUTPUT_SPEED, speed_at


@pytest.mark.parametrize(
    ("base_url", "speed"),
    [
        ("https://api.groq.com/openai/v1", 2000.0),
        ("https://api.cerebras.ai/v1", 6000.0),
        ("https://api.openai.com/v1", None),
        ("https://groq.com.example.org/v1", None),
        ("http://[", None),
        ("", None),
    ],
)
def test_of_those_on_hardware_made_for_it_it_is_known(base_url, speed):
    assert speed_at(base_url) == speed
    assert speed is None or speed > OUTPUT_SPEED
