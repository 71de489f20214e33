"""How well the model predicts held-out tokens, and how well counting n-grams would have."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int32, PyTree

from dsjax.data.batches import Windows
from dsjax.data.ngram import baselines
from dsjax.data.tokens import TokenCache
from dsjax.parallel.mesh import BATCH_AXES
from dsjax.parallel.sharding import place

Evaluate = Callable[[PyTree, PyTree, Int32[Array, "B S1"]], dict[str, Array]]


class Validation:
    """Validates on the same held-out windows every time, in whole batches."""

    def __init__(
        self, data: TokenCache, evaluate: Evaluate, mesh: Mesh, *, sequence_length: int, batch: int, sequences: int
    ):
        """Choose the windows.

        Args:
            evaluate: means of a batch's losses, see `training.step`.
            mesh: over which batches are divided.
            batch: windows at a time; as many for every device.
            sequences: windows in all, evenly spread over the held-out documents because neighbours resemble each
                other, and as many as fill batches; 0 for all there are.

        Raises:
            ValueError: there are fewer windows than devices.
        """
        self._evaluate, self._data, self._mesh = evaluate, data, mesh
        windows = Windows(data.validation, sequence_length)
        count = min(sequences or len(windows), len(windows))
        shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        self._batch = min(batch, count // shards * shards)
        if not self._batch:
            raise ValueError(
                f"data.validation_fraction: {len(windows)} windows of {sequence_length} tokens are held out, and "
                f"train.validation_sequences = {sequences}; {shards} devices need one each"
            )
        count -= count % self._batch
        spread = np.arange(count) * len(windows) // count
        self.rows = np.concatenate([windows.rows(int(at), 1) for at in spread])
        """The windows, int32[sequences, sequence_length + 1]."""

    def __call__(self, params: PyTree, biases: PyTree) -> dict[str, float]:
        """Return `loss` and `loss_mtp` of stacked weights, nats per token."""
        parts = [
            self._evaluate(params, biases, self._placed(self.rows[at : at + self._batch]))
            for at in range(0, len(self.rows), self._batch)
        ]
        return {key: float(np.mean([part[key] for part in parts])) for key in ("loss", "loss_mtp")}

    def _placed(self, rows: Int32[np.ndarray, "B S1"]) -> Int32[Array, "B S1"]:
        return place(lambda first, count: rows[first : first + count], rows.shape, 0, self._mesh)

    def baselines(self, vocab_size: int, cache: Path) -> dict[str, float]:
        """Return the loss of interpolated Kneser-Ney bigrams and trigrams on the same predictions, nats per token.

        Args:
            cache: file that keeps the result for when the run is resumed.
        """
        key = f"{self._data.fingerprint} {self.rows.shape}"
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # not there, or cut short by a crash
            known = json.loads(cache.read_text())
            if known["of"] == key:
                return known["nats_per_token"]
        found = baselines(self._data.train, self.rows, vocab_size)
        result = {"Kneser-Ney bigram": found.bigram, "Kneser-Ney trigram": found.trigram}
        cache.write_text(json.dumps({"of": key, "nats_per_token": result}))
        return result
