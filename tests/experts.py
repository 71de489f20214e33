"""Routed experts of a small network, for tests of the exchange alone."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from dsjax.model.dispatch import combine, dispatch
from dsjax.model.grouped_matmul import grouped_matmul


@dataclass(frozen=True)
class TanhExperts:
    """An `ExpertFunction`: down(tanh(up(x)) * weight)."""

    up: Array
    down: Array
    alignment: int = 32

    def __call__(self, courier, x, weights, *, named=True):
        plan, rows, row_weights = dispatch(courier, x, weights, named=named)
        activated = jnp.tanh(grouped_matmul(rows, self.up, plan.groups)) * row_weights[:, None]
        return combine(plan, grouped_matmul(activated, self.down, plan.groups)), plan
