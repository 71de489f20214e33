"""An engine in several processes: what the one that leads tells those that follow.

What an engine does depends on what is submitted and cancelled before each step, and on tokens that all processes read.
So each process has a whole engine, and before each step process 0 tells the others what they cannot know. The words
are entries of the store of JAX's coordination service: who has nothing to do says nothing, and a process that is lost
ends those that wait for its words, as in training.
"""

import base64
import hashlib
import itertools
import json
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from operator import methodcaller
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax._src.distributed import global_state  # JAX has no public name for the store
from jaxtyping import Bool

from dsjax.data.tokenizer import Tokenizer
from dsjax.inference.load import Model
from dsjax.inference.request import Request
from dsjax.inference.sampling import Sampling
from dsjax.inference.settings import EngineSettings
from dsjax.inference.text import StopStrings, TextStream
from dsjax.parallel.preflight import require_alike

_PATIENCE = 60_000
"""Milliseconds after which one who waits looks up, to see whether a signal has come."""
_FOLDER = 256
"""Words that are deleted at once, when all processes have heard them."""
_SMALL = 1 << 20
"""Bytes of weights of which a checksum is compared, if every device has all of them."""
_engines = itertools.count()

Act = Literal["warm up", "step", "close"]


class Word(NamedTuple):
    """What all processes are to do next."""

    act: Act
    submitted: Sequence[Request] = ()
    """Before a step."""
    cancelled: Sequence[int] = ()
    """Numbers of requests."""
    program: int = 0
    """Of those to be compiled, which is next; see `Passes.warming`."""


class Words:
    """From process 0 to all others, in one order."""

    def __init__(self, tokenizer: Tokenizer):
        """Begins anew; processes make theirs in the same order.

        Args:
            tokenizer: of the requests.
        """
        self._folder, self._count, self._tokenizer = f"dsjax/engine/{next(_engines)}", 0, tokenizer
        self._full: deque[tuple[int, str]] = deque()

    @property
    def leads(self) -> bool:
        """Whether this process is the one that speaks."""
        return global_state.process_id == 0

    def say(self, word: Word, step: int) -> None:
        """Tell the others.

        Args:
            step: that it belongs to.
        """
        told = word._asdict() | {
            "submitted": list(map(_described, word.submitted)),
            "cancelled": list(word.cancelled),
        }
        number, self._count = self._count, self._count + 1
        if number and number % _FOLDER == 0:
            self._full.append((step, self._key(number - 1).rpartition("/")[0]))
        # Numbers of NumPy are as good as others.
        text = json.dumps(told, default=methodcaller("item"))
        global_state.client.key_value_set_bytes(self._key(number), text.encode())

    def heard(self, step: int) -> None:
        """Forget what was said before a step that all processes have begun."""
        while self._full and self._full[0][0] <= step:
            global_state.client.key_value_delete(self._full.popleft()[1])

    def hear(self) -> Iterator[Word]:
        """Yield words as they come, to the last one."""
        word = None
        while word is None or word.act != "close":
            text = self._wait_for(self._key(self._count))
            self._count += 1
            told = json.loads(text)
            submitted = [_request(each, self._tokenizer) for each in told["submitted"]]
            word = Word(**told | {"submitted": submitted})
            yield word

    def end(self) -> None:
        """Wait until all processes have done the last word, and forget everything."""
        global_state.client.wait_at_barrier(f"{self._folder}/end", 2**31 - 1)
        if self.leads:
            global_state.client.key_value_delete(self._folder)

    def _key(self, number: int) -> str:
        return f"{self._folder}/{number // _FOLDER}/{number % _FOLDER}"

    def _wait_for(self, key: str) -> bytes:
        while True:
            try:
                return global_state.client.blocking_key_value_get_bytes(key, _PATIENCE)
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith("DEADLINE_EXCEEDED"):
                    raise


def agree(model: Model, settings: EngineSettings) -> None:
    """Compare what all processes of an engine must have alike; to be called by all.

    Raises:
        ValueError: on every process, about what differs.
    """
    small = [leaf for leaf in jax.tree.leaves((model.params, model.biases)) if leaf.is_fully_replicated]
    digest = hashlib.blake2b(digest_size=8)
    for leaf in small:
        if leaf.nbytes <= _SMALL:
            digest.update(np.asarray(leaf).tobytes())
    require_alike(
        {
            "engine": str(settings),
            "model": str(model.config),
            "layout": str(model.layout),
            "precision": np.dtype(model.runtime.compute_dtype).name,
            "weights": digest.hexdigest(),
            "tokenizer": model.tokenizer.digest,
            "kind of device": jax.local_devices()[0].device_kind,
        }
    )


def _described(request: Request) -> dict[str, Any]:
    """Return what others have to know of a request, as JSON has it."""
    stream = request.text_stream
    return {
        "number": request.number,
        "prompt": _packed(np.asarray(request.prompt, np.int32)),
        "sampling": asdict(request.sampling),
        "max_tokens": request.max_tokens,
        "stop_ids": list(request.stop_ids),
        "stop": list(request.stops.strings),
        # What a text stream begins behind is always the end of the prompt.
        "before": len(stream.before),
        "shown": stream.shown,
        "first": None if request.first is None else [len(request.first), _packed(np.packbits(request.first))],
    }


def _request(told: dict[str, Any], tokenizer: Tokenizer) -> Request:
    prompt = _unpacked(told["prompt"], np.int32).tolist()
    return Request(
        prompt=prompt,
        sampling=Sampling(**told["sampling"]),
        max_tokens=told["max_tokens"],
        stop_ids=told["stop_ids"],
        text_stream=TextStream(tokenizer, prompt[len(prompt) - told["before"] :], told["shown"]),
        stops=StopStrings(told["stop"]),
        first=None if told["first"] is None else _mask(*told["first"]),
        number=told["number"],
    )


def _mask(length: int, packed: str) -> Bool[np.ndarray, " V"]:
    return np.unpackbits(_unpacked(packed, np.uint8), count=length).astype(bool)


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()


def _unpacked(packed: str, dtype: type) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype)
