"""A batch is a pure function of its index, whoever asks for it; an epoch is every window once."""

import numpy as np
import pytest

from dsjax.data.batches import Batches, Windows

LENGTH = 8


@pytest.fixture
def tokens(tmp_path) -> np.memmap:
    """Numbers that say where they stand: 99 windows and a rest."""
    path = tmp_path / "train.bin"
    np.arange(99 * LENGTH + 5, dtype=np.uint16).tofile(path)
    return np.memmap(path, np.uint16, mode="r")


def test_windows_predict_every_token_once(tokens):
    windows = Windows(tokens, LENGTH)
    rows = windows.rows(0, len(windows))
    assert rows.shape == (99, LENGTH + 1) and rows.dtype == np.int32
    assert np.array_equal(rows[:, 1:].ravel(), np.arange(1, 99 * LENGTH + 1))
    assert np.array_equal(rows[:, :-1].ravel(), np.arange(99 * LENGTH))
    assert np.array_equal(windows.rows(7, 3), rows[7:10])
    for first, count in ((-1, 2), (98, 2), (99, 1)):
        with pytest.raises(IndexError):
            windows.rows(first, count)


@pytest.mark.parametrize("rest", range(LENGTH))
def test_the_last_window_is_used_if_it_is_whole(rest):
    windows = Windows(np.arange(2 * LENGTH + 1 + rest), LENGTH)
    assert len(windows) == 2 + (rest == LENGTH)


def test_an_epoch_is_every_window_once_and_the_next_is_another(tokens):
    batches = Batches(tokens, LENGTH, seed=3)
    assert len(batches) == 99
    order = batches.rows(0, 4 * 99)[:, 0] // LENGTH
    epochs = order.reshape(4, 99)
    for epoch in epochs:
        assert sorted(epoch) == list(range(99))
        assert abs(np.corrcoef(epoch, np.arange(99))[0, 1]) < 0.4, "shuffled over the whole file"
    for one in range(4):
        for other in range(one):
            assert np.mean(epochs[one] == epochs[other]) < 0.1
    assert np.mean(Batches(tokens, LENGTH, seed=4).rows(0, 99)[:, 0] // LENGTH == epochs[0]) < 0.1


@pytest.mark.parametrize("hosts", [1, 2, 8])
def test_the_global_batch_is_the_same_on_any_number_of_hosts(tokens, hosts):
    whole = Batches(tokens, LENGTH, seed=0)
    size, step = 16, 11  # across the end of an epoch
    share = size // hosts
    parts = [Batches(tokens, LENGTH, seed=0).rows(step * size + host * share, share) for host in range(hosts)]
    assert np.array_equal(np.concatenate(parts), whole.rows(step * size, size))


def test_the_state_is_one_integer(tokens):
    """Other sizes before (a ramp, other micro-batches) leave the sequences that follow as they are."""
    one, other = Batches(tokens, LENGTH, seed=0), Batches(tokens, LENGTH, seed=0)
    one.rows(0, 40)
    for first in range(0, 40, 4):
        other.rows(first, 4)
    assert np.array_equal(one.rows(40, 8), other.rows(40, 8))
    assert np.array_equal(Batches(tokens, LENGTH, seed=0).rows(40, 8), one.rows(40, 8))


def test_the_order_does_not_change_between_versions():
    """Resuming a run depends on these numbers; should a new grain give others, a resumed run would see other data."""
    order = Batches(np.arange(10 * LENGTH + 1), LENGTH, seed=0).rows(0, 12)[:, 0] // LENGTH
    assert order.tolist() == [1, 2, 4, 5, 9, 7, 8, 6, 0, 3, 9, 6]


def test_bad_settings():
    with pytest.raises(ValueError, match=r"^8 tokens are fewer than one window of 9$"):
        Batches(np.arange(8), 8, seed=0)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"^train\.seed = {seed}: must be between 0 and 4294967295$"):
            Batches(np.arange(9), 8, seed=seed)
    assert len(Batches(np.arange(9), 8, seed=2**32 - 1).rows(0, 3)) == 3
