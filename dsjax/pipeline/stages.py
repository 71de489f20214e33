"""The model cut into the stages of a pipeline: which layers are where, and what the first and last stage do besides.

A stage is some of the MoE layers. All stages have arrays of one shape, because one program runs on all ranks, so each
has as many places for layers as the largest needs; the largest are in the middle, because the first stage also embeds
and has the dense layers, and the last also has the MTP modules, the head and the losses. DeepSeek-V3's 58 MoE layers on
16 stages are 3 at either end and 4 in the middle: stages 3 to 12. A place without a layer computes with the weights of
the place before it, so that its routing is like any other's, and its result is not used: no rank could go on earlier,
since the ranks keep step.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from dsjax.config import Config, ModelConfig
from dsjax.model.block import block_function
from dsjax.model.context import Context
from dsjax.model.layout import Rows
from dsjax.model.moe import MoEAux
from dsjax.model.transformer import bias_of, moe_layers
from dsjax.numerics.weights import together
from dsjax.pipeline.schedule import SCHEDULES, Route, Schedule
from dsjax.runtime import Runtime

FIRST = ("embed", "dense")
"""Parameters that the first stage uses besides its layers."""
LAST = ("embed", "norm", "head", "mtp")
"""The same of the last stage; MTP modules embed tokens too."""


def schedule_of(config: Config, micro_batches: int) -> Schedule:
    """Return the schedule of a step of so many micro-batches. Without a pipeline, one follows the other.

    Steps of a batch ramp that are too small for DualPipe run under ZB1P, which has the same stages on the same ranks.

    Raises:
        ValueError: the schedule cannot be; the message has the nearest legal numbers.
    """
    if config.mesh.pipe == 1:
        return SCHEDULES["1f1b"](1, micro_batches)
    build, ranks, train = SCHEDULES[config.pipeline.schedule], config.mesh.pipe, config.train
    max_deferred = config.pipeline.max_deferred or None
    try:
        return build(ranks, micro_batches, max_deferred=max_deferred)
    except ValueError as error:
        in_ramp = micro_batches < train.batch_size // (train.micro_batch_size or train.batch_size)
        if config.pipeline.schedule == "dualpipe" and in_ramp and ranks % 2 == 0:
            return SCHEDULES["zb1p"](ranks, micro_batches, max_deferred=max_deferred)
        raise ValueError(
            f"mesh.pipe = {ranks} ranks with {micro_batches} micro-batches of train.micro_batch_size: {error}"
        ) from None


@dataclass(frozen=True)
class StageLayout:
    """Which MoE layers each stage has, counted from 0."""

    counts: tuple[int, ...]
    """Layers of each stage, in order."""

    @property
    def places(self) -> int:
        """Places for layers in every stage."""
        return max(self.counts)

    def layers(self, stage: int) -> range:
        """Return the layers of a stage."""
        first = sum(self.counts[:stage])
        return range(first, first + self.counts[stage])

    def present(self, stage: int) -> list[bool]:
        """Return which places of a stage have a layer."""
        return [place < self.counts[stage] for place in range(self.places)]


def stage_layout(model: ModelConfig, stages: int) -> StageLayout:
    """Divide a model's MoE layers into stages as evenly as can be, the larger ones in the middle.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    layers = model.num_hidden_layers - model.first_k_dense_replace
    if layers < stages and stages > 1:
        raise ValueError(
            f"mesh.pipe: {stages} stages of a model with {layers} MoE layers: every stage needs one, so at most "
            f"{layers} stages; DualPipeV has two for each rank"
        )
    least, more = divmod(layers, stages)
    from_middle = sorted(range(stages), key=lambda stage: (-min(stage, stages - 1 - stage), stage))
    larger = set(from_middle[:more])
    return StageLayout(tuple(least + (stage in larger) for stage in range(stages)))


def route_of(config: Config) -> Route:
    """Return where a run's stages are."""
    # Of steps of a ramp under ZB1P, too: a rank's rows are the same.
    kinds = {"dualpipe": "bidirectional", "dualpipev": "vee"}
    return Route(kinds.get(config.pipeline.schedule, "single") if config.mesh.pipe > 1 else "single", config.mesh.pipe)


def rows_of(config: Config) -> Rows | None:
    """Return which MoE layer each row of the stacked arrays holds, rank after rank; None without a pipeline.

    Rank r holds stage r, and in a vee stage 2P - 1 - r behind it. A bidirectional pipeline's second copy is made inside
    the step, from that of its mirror.
    """
    if config.mesh.pipe == 1:
        return None
    route = route_of(config)
    layout = stage_layout(config.model, route.stages)
    stages = [route.stage(rank, slot) for rank in range(route.ranks) for slot in range(2 if route.kind == "vee" else 1)]
    return tuple(layer for s in stages for layer in (*layout.layers(s), *[None] * (layout.places - layout.counts[s])))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageContext:
    """What the layers of a stage read and no gradient flows into."""

    context: Context
    biases: PyTree
    """Router biases of the places, [places, E]; empty where the model has none."""
    present: Bool[Array, " places"]
    """Which places have a layer."""
    quantized: PyTree
    """Of the weights, see `numerics.weights.apart`."""


def run_stage(
    places: tuple[PyTree, ...],
    x: Float[Array, "B S D"],
    ctx: StageContext,
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Float[Array, "B S D"], MoEAux]:
    """Run the layers of a stage one by one: a chunk, see `pipeline.chunk`.

    Args:
        places: parameters of each place, in the compute format; masters of those that are quantized.
    """
    places = together(places, ctx.quantized)
    block = block_function(config, runtime)
    all_aux = []
    for place, params in enumerate(places):
        bias = bias_of(jax.tree.map(lambda leaf, place=place: leaf[place], ctx.biases))
        balance_weight = jnp.where(ctx.present[place], ctx.context.balance_weight, 0.0)
        y, aux = block(params, x, replace(ctx.context, balance_weight=balance_weight).for_layer(bias))
        x = jnp.where(ctx.present[place], y, x)
        all_aux.append(jax.tree.map(lambda leaf, place=place: jnp.where(ctx.present[place], leaf, 0), aux))
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_aux)


def run_layers(
    layers: PyTree,
    x: Float[Array, "B S D"],
    ctx: StageContext,
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Float[Array, "B S D"], MoEAux | None]:
    """Run stacked layers in a loop: the chunk of a single stage, whose backward pass is never cut."""
    params = {"moe": together(layers, ctx.quantized)} if layers else {}  # a model may have dense layers only
    return moe_layers(params, {"moe": ctx.biases}, x, ctx.context, config=config, runtime=runtime)


def places_of(stage: PyTree, count: int) -> tuple[PyTree, ...]:
    """Return the parameters of each place from stacked ones."""
    return tuple(jax.tree.map(lambda leaf, place=place: leaf[place], stage) for place in range(count))


def with_stand_ins(places: tuple[PyTree, ...], present: Bool[Array, " places"]) -> tuple[PyTree, ...]:
    """Give places without a layer the weights of the place before them."""
    filled = [places[0]]
    for place in range(1, len(places)):
        filled.append(
            jax.tree.map(
                lambda own, before, place=place: jnp.where(present[place], own, before), places[place], filled[-1]
            )
        )
    return tuple(filled)
