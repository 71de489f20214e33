"""Windows of the token file, in order or in a globally shuffled order that is a pure function of the index.

A window is `sequence_length + 1` tokens and starts where the last one's final token stands, so that every token but
the first is the target of exactly one prediction. The state of the data is one integer: the sequences consumed.
"""

import grain
import numpy as np
from jaxtyping import Int32, Integer


class Windows:
    """The windows in the order of the file, for validation."""

    def __init__(self, tokens: Integer[np.ndarray, " tokens"], sequence_length: int) -> None:
        """Takes windows from tokens, which may be memory-mapped.

        Raises:
            ValueError: there are too few tokens for one window.
        """
        if len(tokens) < sequence_length + 1:
            raise ValueError(f"{len(tokens)} tokens are fewer than one window of {sequence_length + 1}")
        view = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)
        self._windows = view[::sequence_length]

    def __len__(self) -> int:
        return len(self._windows)

    def rows(self, first: int, count: int) -> Int32[np.ndarray, "count length"]:
        """Returns windows `first` to `first + count - 1`; the last dimension is `sequence_length + 1`.

        Raises:
            IndexError: there are not so many.
        """
        if first < 0 or first + count > len(self):
            raise IndexError(f"windows {first} to {first + count - 1} of {len(self)}")
        return self._windows[first : first + count].astype(np.int32)


class Batches:
    """All windows in an order shuffled over the whole file, then all again in another order, without end."""

    def __init__(self, tokens: Integer[np.ndarray, " tokens"], sequence_length: int, seed: int) -> None:
        """Shuffles the windows of tokens, which may be memory-mapped.

        Raises:
            ValueError: there are too few tokens for one window, or the seed does not fit 32 bits.
        """
        if not 0 <= seed < 2**32:
            raise ValueError(f"train.seed = {seed}: must be between 0 and {2**32 - 1}")
        self._windows = Windows(tokens, sequence_length)._windows
        self._order = grain.MapDataset.range(len(self._windows)).seed(seed).shuffle().repeat()

    def __len__(self) -> int:
        """Windows of one epoch."""
        return len(self._windows)

    def rows(self, first: int, count: int) -> Int32[np.ndarray, "count length"]:
        """Returns sequences `first` to `first + count - 1` of the run; the last dimension is `sequence_length + 1`.

        A host asks for its own rows of a step's batch: which hosts there are changes nothing in the batch.
        """
        return self._windows[[self._order[index] for index in range(first, first + count)]].astype(np.int32)
