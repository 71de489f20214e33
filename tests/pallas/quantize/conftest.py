"""Running kernels in Mosaic GPU's interpreter, which may hang: a kernel may wait for what never comes."""

import atexit
import os
import threading
from collections.abc import Callable

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

SECONDS = 120
"""After which an interpreted kernel hangs: they take one or two."""
_hanging: list[str] = []


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> Callable:
    """A function that calls another, which interprets kernels, and fails if they race or hang."""

    def run(f: Callable, *args, seconds: float = SECONDS, **kwargs):
        if _hanging:
            pytest.fail(f"the interpreter hangs since {_hanging[0]}")
        outcome = {}

        def call() -> None:
            try:
                outcome["result"] = jax.block_until_ready(f(*args, impl="interpret", **{"num_sms": 2} | kwargs))
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            _hanging.append(request.node.name)
            atexit.register(os._exit, 1)  # JAX's own handler would wait for the kernel
            pytest.fail(f"the interpreter hangs: {seconds} s")
        if "error" in outcome:
            interpret_pallas_call.reset_gpu_interpret_mode_state()
            raise outcome["error"]
        races = interpret_pallas_call.get_races()
        assert not races.races_found, races
        return outcome["result"]

    return run
