"""What changes over a run: batch size, learning rate, MTP weight, bias speed; all pure functions of the step."""

import math

from dsjax.config import Config

RAMP_SIZES = 4
"""How many batch sizes a ramp passes through before the last one; each is compiled once."""


class Schedule:
    """The values of step 0 to `train.steps - 1` (report section 4.2); shares of the run count steps."""

    def __init__(self, config: Config):
        self.config = config

    def _first_step(self, share: float) -> int:
        """Return the first step at which a share of the run is done; a share that is whole steps is not rounded up."""
        return math.ceil(round(share * self.config.train.steps, 6))

    def batch_size(self, step: int) -> int:
        """Return the sequences of a step: whole micro-batches, growing in a few equal stages over the ramp."""
        train = self.config.train
        start, ramp = train.batch_ramp_start, self._first_step(train.batch_ramp_fraction)
        if not start or step >= ramp:
            return train.batch_size
        stage = step * RAMP_SIZES // ramp / RAMP_SIZES
        micro_batch = train.micro_batch_size or start
        return round((start + stage * (train.batch_size - start)) / micro_batch) * micro_batch

    def batch_sizes(self) -> list[int]:
        """Return how many sequences steps have, ascending, each number once; the last is that after the ramp."""
        ramp = self._first_step(self.config.train.batch_ramp_fraction)
        return sorted({self.batch_size(step) for step in range(ramp)} | {self.config.train.batch_size})

    def first_sequence(self, step: int) -> int:
        """Return how many sequences the steps before this one have read."""
        train = self.config.train
        ramp = self._first_step(train.batch_ramp_fraction)
        in_ramp = sum(self.batch_size(s) for s in range(min(step, ramp)))
        return in_ramp + max(step - ramp, 0) * train.batch_size

    def learning_rate(self, step: int) -> float:
        """Return the rate: linear warm-up, constant, cosine, and two constant tails."""
        optimizer = self.config.optimizer
        peak, warm = optimizer.learning_rate, self._first_step(optimizer.warmup)
        fall, low = self._first_step(optimizer.constant), self._first_step(optimizer.decay)
        if step < warm:
            # The first step moves too, and the last step of the warm-up reaches the peak.
            return peak * ((step + 1) / warm)
        if step < fall:
            return peak
        if step < low:
            height = 0.5 * (1 + math.cos(math.pi * (step - fall) / (low - fall)))
            return peak * (optimizer.first_tail + (1 - optimizer.first_tail) * height)
        in_first_tail = step < self._first_step(optimizer.second_tail_start)
        return peak * (optimizer.first_tail if in_first_tail else optimizer.second_tail)

    def mtp_weight(self, step: int) -> float:
        """Return the weight of the MTP loss."""
        before, after = self.config.train.mtp_weights
        return before if step < self._first_step(self.config.train.mtp_change) else after

    def bias_speed(self, step: int) -> float:
        """Return the step of the router biases."""
        train = self.config.train
        return train.bias_speed if step < self._first_step(train.bias_stop) else 0.0
