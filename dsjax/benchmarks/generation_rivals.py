"""Who writes in `benchmarks.generation`: our engine, and transformers in a Python of its own."""

import json
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.benchmarks.generation import Answers, Generate, Rival
from dsjax.inference.cache import bytes_per_page
from dsjax.inference.engine import Engine
from dsjax.inference.load import Model
from dsjax.inference.sampling import Sampling
from dsjax.inference.settings import EngineSettings

SCRIPT = Path(__file__).with_name("transformers_generate.py")
GREEDY = Sampling(temperature=0.0)
PAGE = 64
"""Tokens of a page of the cache."""


class EngineRival:
    """The engine, with all programs compiled.

    Attributes:
        engine: the engine.
    """

    def __init__(self, model: Model, options: Generate, *, speculate: int = 0, cached: int = 0):
        """Compiles, and reads the prompts that are to be cached.

        Args:
            speculate: drafts per step.
            cached: prompts, of a page each, that the prefix cache knows though no request has them any more.
        """
        self._max_tokens = options.max_tokens
        slots, context = max(options.batches), max(options.prompt_tokens + options.max_tokens, 2 * PAGE)
        room = 0
        if cached:
            page_bytes = bytes_per_page(model.config, PAGE, model.runtime.compute_dtype, "compute")
            room = (1 + slots * -(-context // PAGE) + cached) * page_bytes
        how = EngineSettings(slots=slots, context=context, page_size=PAGE, speculate=speculate, cache_bytes=room)
        self.engine = Engine(model, how)
        self.engine.warm_up()
        for ids in np.random.default_rng(0).integers(1, model.config.vocab_size, (cached, PAGE)).tolist():
            self.engine.submit(ids, GREEDY, max_tokens=1, stop_ids=[])
        self.engine.run()

    def __call__(self, prompts: list[list[int]]) -> Answers:
        """Continue prompts greedily, all at the same time."""
        begin = time.perf_counter()
        requests = [self.engine.submit(ids, GREEDY, max_tokens=self._max_tokens, stop_ids=[]) for ids in prompts]
        self.engine.run()
        seconds = time.perf_counter() - begin
        return Answers(seconds, [[token.id for token in request.tokens] for request in requests])


class Transformers:
    """transformers' `generate`, for batches of prompts of one length.

    Attributes:
        versions: of torch and transformers.
    """

    def __init__(self, python: str, path: str, max_tokens: int):
        """Starts the process.

        Raises:
            ValueError: there is no such Python, or it cannot load the weights.
        """
        self._python, self._max_tokens = python, max_tokens
        try:
            self._process = subprocess.Popen(
                [python, str(SCRIPT), path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise ValueError(f"torch = {python!r}: {error.strerror}; it must be a Python") from None
        self.versions = self._answer()

    def __enter__(self) -> "Transformers":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def with_threads(self, threads: int) -> Rival:
        """Return the rival that has so many threads."""
        return partial(self.continued, threads)

    def continued(self, threads: int, prompts: list[list[int]], margins: bool = False) -> Answers:
        """Continue prompts greedily, all at the same time.

        Args:
            margins: whether to tell, for each token, how far its score is above the next best.

        Raises:
            ValueError: the process ended.
        """
        wanted = {"prompts": prompts, "max_tokens": self._max_tokens, "threads": threads, "margins": margins}
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return Answers(**self._answer())

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"torch = {self._python!r}: its process ended; what it said is above")
        return json.loads(line)
