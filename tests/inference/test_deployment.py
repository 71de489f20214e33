"""What a deployment says, and what a command says beside it."""

import pytest

from dsjax.inference.deployment import chosen
from dsjax.inference.layout import Layout
from dsjax.inference.settings import EngineSettings


def test_what_a_command_says_wins():
    layout, engine, precision = chosen("v3_decode_144", EngineSettings(), "auto")
    assert (layout.devices, engine.slots, engine.cache_format, precision) == (144, 18432, "fp8", "fp8")
    given = EngineSettings(slots=145, prefill_tokens=64)
    layout, engine, precision = chosen("v3_decode_144", given, "bf16")
    # Each of 144 groups has as many slots as the others.
    assert (engine.slots, engine.prefill_tokens, engine.cache_format, precision) == (288, 64, "fp8", "bf16")


def test_without_a_deployment_there_is_one_device():
    settings = EngineSettings(slots=7)
    assert chosen("", settings, "auto") == (Layout(), settings, "auto")


def test_what_cannot_be_divided():
    with pytest.raises(ValueError, match=r"engine.prefill_tokens = 30: must be a multiple of layout.tensor = 4"):
        chosen("v3_prefill_32", EngineSettings(prefill_tokens=30), "auto")
