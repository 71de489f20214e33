"""The checker that tests run dsjax under: arrays have the shapes and formats that signatures say.

Only annotations that hold a shape are checked. What else a signature says is for readers, and a wrong option is for
dsjax itself to answer, with a ValueError that says what would be right.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def _has_shape(annotation: Any) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_has_shape, get_args(annotation)))


def check(function: Callable) -> Callable:
    """Checks the annotations with shapes of a function's arguments and results at every call."""
    shapes = {name: a for name, a in function.__annotations__.items() if _has_shape(a)}
    # JAX builds dataclasses that are pytrees around things that are no arrays.
    if not shapes or function.__name__ == "__init__":
        return function
    function.__annotations__ = shapes
    return beartype(function)
