"""What a layer may ask of the machine, as one frozen argument.

The model's files say what is computed; a `Runtime` says in which format, by which kernel, and over which devices. The
same model file therefore reads the same on one device and on 2,048.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsjax.config import AttentionKernel, Config, GroupedMatmulKernel, Precision, Remat


class ExpertFunction(Protocol):
    """The expert FFNs on rows grouped by expert, each result scaled by its weight."""

    def __call__(
        self, rows: Float[Array, "R D"], weights: Float[Array, " R"], groups: Any, *, named: bool = True
    ) -> Float[Array, "R D"]:
        """Return the experts' outputs.

        Args:
            groups: of the rows, see `model.grouped_matmul`.
            named: whether intermediate results bear the names under which a rematerialization keeps them.
        """
        ...


class Exchange(Protocol):
    """Carries tokens to their experts and sums the results.

    It is a function around the experts, not a pair of arrays in and out, because an exchange of bounded memory runs
    them several times when a routing is so uneven that one round does not hold it.
    """

    def __call__(
        self,
        experts: ExpertFunction,
        x: Float[Array, "T D"],
        indices: Int[Array, "T K"],
        weights: Float[Array, "T K"],
        num_experts: int,
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        """Return, for each token, the sum over its K experts of their outputs times its weights; and the rounds that
        it took, int32."""
        ...


@dataclass(frozen=True)
class Runtime:
    """How the model runs; the defaults are those of a single device."""

    compute_dtype: DTypeLike = jnp.float32
    """Format of activations and of the weights in matrix products."""
    attention: AttentionKernel = "auto"
    """Implementation of causal attention."""
    grouped_matmul: GroupedMatmulKernel = "auto"
    """Implementation of the experts' matrix products."""
    exchange: Exchange | None = None
    """How tokens reach their experts; None keeps them on the device."""
    remat: Remat = "report"
    """What the backward pass recomputes."""
    unroll_layers: bool = False
    """Whether the MoE layers are compiled one by one, in place of one loop."""
    loss_chunk: int = 1024
    """Tokens whose float32 logits exist at once."""


def runtime_of(config: Config) -> Runtime:
    """Return the `Runtime` that a run's settings ask for on this process' default backend."""
    return Runtime(
        compute_dtype=compute_dtype(config.precision),
        attention=config.kernels.attention,
        grouped_matmul=config.kernels.grouped_matmul,
        remat=config.train.remat,
        unroll_layers=config.train.unroll_layers,
        loss_chunk=config.train.loss_chunk,
    )


_target: ContextVar[str | None] = ContextVar("target", default=None)


def target_platform() -> str:
    """Return what programs are made for: "cpu", "gpu" or "tpu"; by default this process' own backend."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def made_for(platform: str) -> Iterator[None]:
    """Inside, programs are traced for another platform than this process runs on."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def full_precision() -> contextlib.AbstractContextManager:
    """Inside, products of float32 are made of float32: by default NVIDIA's and Google's chips round their inputs.

    Products of 16-bit inputs, which are all but the router's in a BF16 run, are not concerned.
    """
    return jax.default_matmul_precision("highest")


def compute_dtype(precision: Precision) -> DTypeLike:
    """Return the format of matrix products; `auto` is float32 on a CPU and bfloat16 elsewhere."""
    if precision == "auto":
        precision = "fp32" if target_platform() == "cpu" else "bf16"
    return jnp.float32 if precision == "fp32" else jnp.bfloat16
