"""The open training and inference system for DeepSeek-V3-family models in JAX.

The names below are dsjax's public face; each is imported when it is first used, so that a command's `--help` does not
wait for JAX.
"""

from importlib import import_module
from typing import Any

_HOME = {
    # Settings
    "Config": "dsjax.config",
    "ModelConfig": "dsjax.config",
    "load_config": "dsjax.settings",
    "load_model_config": "dsjax.settings",
    # The model: mathematics and parameters
    "Runtime": "dsjax.runtime",
    "Transformer": "dsjax.model.transformer",
    "abstract_parameters": "dsjax.model.transformer",
    "initial_parameters": "dsjax.model.transformer",
    "parameter_count": "dsjax.model.flops",
    # Weights of others
    "load_huggingface": "dsjax.checkpoint.huggingface",
    "save_huggingface": "dsjax.checkpoint.huggingface",
    # Inference
    "Engine": "dsjax.inference.engine",
    "EngineSettings": "dsjax.inference.settings",
    "Sampling": "dsjax.inference.sampling",
    "load_model": "dsjax.inference.load",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsjax' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
