"""What a layer may ask of the machine, as one frozen argument.

The model's files say what is computed; a `Runtime` says in which format, by which kernel, and over which devices. The
same model file therefore reads the same on one device and on 2,048.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

from dsjax.config import AttentionKernel, Config, Fp8Kernel, GroupedMatmulKernel, Precision, Remat


@runtime_checkable
class Plan(Protocol):
    """The way of tokens to the rows of their experts, and back: linear maps, `back` the transpose of the way there.

    Dimensions: T tokens, K experts of each, S slots in which they arrive where the experts are, R rows by expert.
    """

    groups: Any
    """Of the rows, see `model.grouped_matmul`."""

    def again(self, tokens: PyTree[Shaped[Array, "T ..."]]) -> PyTree[Shaped[Array, "S ..."]]:
        """Send what tokens bring to the slots of `Courier.send`."""
        ...

    def expand(self, arrived: PyTree[Shaped[Array, "S ..."]]) -> PyTree[Shaped[Array, "R ..."]]:
        """Copy what has arrived to the rows that it is for; padding rows are zero."""
        ...

    def expand_weights(self, arrived: Float[Array, "*S"]) -> Float[Array, " R"]:
        """Bring weights that have arrived to their rows; padding rows get zero."""
        ...

    def row_sources(self) -> Int[Array, " R"]:
        """Return the slot of each row; S or more for padding."""
        ...

    def back(self, rows: PyTree[Float[Array, "R ..."]]) -> PyTree[Float[Array, "T ..."]]:
        """Return the sum of each token's rows."""
        ...

    def back_with_weights(
        self, rows: Float[Array, "R ..."], of_rows: Float[Array, " R"]
    ) -> tuple[Float[Array, "T ..."], Float[Array, "T K"]]:
        """Return also the number of the row of each choice; zero for one that did not travel."""
        ...


@runtime_checkable
class Courier(Protocol):
    """Takes tokens to their experts."""

    def send(
        self, tokens: PyTree[Shaped[Array, "T ..."]], weights: Float[Array, "T K"]
    ) -> tuple[Plan, PyTree[Shaped[Array, "S ..."]], Float[Array, "*S"]]:
        """Return the plan, and what has arrived: tokens, and weights of choices."""
        ...


class ExpertFunction(Protocol):
    """The routed experts: they have the tokens brought, and each result scaled by its weight."""

    @property
    def alignment(self) -> int:
        """Of the rows that they work on, see `model.grouped_matmul`."""
        ...

    def __call__(
        self, courier: Courier, x: Float[Array, "T D"], weights: Float[Array, "T K"], *, named: bool = True
    ) -> tuple[Float[Array, "T D"], Plan]:
        """Return, of each token, the sum over the experts that it was taken to.

        Args:
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
        it took, int32.

        Args:
            indices: in [0, num_experts); `num_experts` for nobody, of which nothing comes.
        """
        ...


@dataclass(frozen=True)
class Recipe:
    """How weights are multiplied in FP8 (E4M3): formats by class of tensor, see docs/fp8.md."""

    tile: int = 128
    """Columns that share a scale."""
    weight_rows: int = 128
    """Rows of a weight that share a scale."""
    power_of_two: bool = False
    """Whether all scales are powers of two. Those of what is sent, or quantized again, are in any case."""
    gradient_blocks: bool = False
    """Whether gradients of activations have blocks of 128 x 128, which diverges: an ablation (report, appendix B.2)."""
    impl: Fp8Kernel = "auto"
    """Implementation of quantizers and products."""
    num_sms: int = 132
    """Multiprocessors that persistent kernels take; the others are left to communication."""

    @property
    def kernels(self) -> dict[str, Any]:
        """The arguments of quantizers and products that say so."""
        return {"impl": self.impl, "num_sms": self.num_sms}


DEEPSEEK = Recipe()
"""1 x 128 tiles and 128 x 128 blocks (report section 3.3)."""
MXFP8 = Recipe(tile=32, weight_rows=1, power_of_two=True)
"""Groups of 32 with scales of E8M0, Blackwell's format (OCP microscaling)."""


@dataclass(frozen=True)
class Runtime:
    """How the model runs; the defaults are those of a single device."""

    compute_dtype: DTypeLike = jnp.float32
    """Format of activations and of the weights in matrix products."""
    recipe: Recipe | None = None
    """How the products of layers are done in FP8; None does them in the compute format."""
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
    num_sms: int = 132
    """Multiprocessors that persistent kernels in 16 bits take; those in FP8 as `recipe` has it."""

    def leaving(self, sms: int) -> "Runtime":
        """Return the runtime whose persistent kernels leave so many multiprocessors to communication."""
        recipe = self.recipe and replace(self.recipe, num_sms=self.recipe.num_sms - sms)
        return replace(self, recipe=recipe, num_sms=self.num_sms - sms)


def runtime_of(config: Config) -> Runtime:
    """Return the `Runtime` that a run's settings ask for on this process' default backend."""
    return Runtime(
        compute_dtype=compute_dtype(config.precision),
        recipe=recipe_of(config),
        attention=config.kernels.attention,
        grouped_matmul=config.kernels.grouped_matmul,
        remat=config.train.remat,
        unroll_layers=config.train.unroll_layers,
        loss_chunk=config.train.loss_chunk,
    )


def recipe_of(config: Config) -> Recipe | None:
    """Return the recipe of a run's precision; None where it is not in FP8."""
    recipes = {"fp8": DEEPSEEK, "mxfp8": MXFP8}
    if config.precision not in recipes:
        return None
    kernels = config.kernels
    return replace(recipes[config.precision], gradient_blocks=kernels.fp8_gradient_blocks, impl=kernels.fp8)


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
