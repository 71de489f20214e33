"""The model cut into the stages of a pipeline: which layers are where, and what the first and last stage do besides.

A stage is some of the MoE layers. All stages have arrays of one shape, because one program runs on all ranks, so each
has as many places for layers as the largest needs; a rank runs those that hold a layer. Few are in the first stage,
which also embeds and has the dense layers, and in the last, which also has the MTP modules, the head and the losses.
DeepSeek-V3's 58 MoE layers on 16 stages are one at either end and 4 in each of the others.
"""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, PyTree

from dsjax.config import Config, ModelConfig
from dsjax.model.block import block_function
from dsjax.model.context import Context
from dsjax.model.flops import work_of_parts
from dsjax.model.layout import Rows, layers_of
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


def stage_layout(model: ModelConfig, stages: int) -> StageLayout:
    """Divide a model's MoE layers into stages of no more places than need be, so that their work is even.

    The places that stay empty are those of the stages with most work, counted by the weights that a token multiplies.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    layers = model.num_hidden_layers - model.first_k_dense_replace
    if layers < stages and stages > 1:
        raise ValueError(
            f"mesh.pipe: {stages} stages of a model with {layers} MoE layers: every stage needs one, so at most "
            f"{layers} stages; DualPipeV has two for each rank"
        )
    dense, layer, mtp, head = work_of_parts(model)
    ends = [0.0] * stages
    ends[0] += model.first_k_dense_replace * dense
    ends[-1] += model.num_nextn_predict_layers * mtp + head
    counts = [-(-layers // stages)] * stages
    for _ in range(sum(counts) - layers):
        # Among equals the outermost.
        busiest = max(
            (stage for stage in range(stages) if counts[stage] > 1),
            key=lambda stage: (ends[stage] + counts[stage] * layer, abs(2 * stage - stages + 1)),
        )
        counts[busiest] -= 1
    return StageLayout(tuple(counts))


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
class PlaceContext:
    """What a place reads and no gradient flows into; for `run_layers`, of all layers, stacked."""

    context: Context
    biases: PyTree
    """Router biases, [E]; empty where the model has none."""
    quantized: PyTree
    """Of the weights, see `numerics.weights.apart`."""


def run_place(
    params: PyTree, x: Float[Array, "B S D"], ctx: PlaceContext, *, config: ModelConfig, runtime: Runtime
) -> tuple[Float[Array, "B S D"], MoEAux]:
    """Run the layer of a place: a chunk, see `pipeline.chunk`.

    Args:
        params: in the compute format; masters of those that are quantized.
    """
    block = block_function(config, runtime)
    return block(together(params, ctx.quantized), x, ctx.context.for_layer(bias_of(ctx.biases)))


def run_layers(
    layers: PyTree, x: Float[Array, "B S D"], ctx: PlaceContext, *, config: ModelConfig, runtime: Runtime
) -> tuple[Float[Array, "B S D"], MoEAux | None]:
    """Run stacked layers in a loop: the chunk of a single stage, whose backward pass is never cut."""
    params = {"moe": together(layers, ctx.quantized)} if layers else {}  # a model may have dense layers only
    return moe_layers(params, {"moe": ctx.biases}, x, ctx.context, config=config, runtime=runtime)


def places_of(stage: PyTree, count: int) -> tuple[PyTree, ...]:
    """Return the parameters, or biases, of each place from stacked ones."""
    return tuple(layers_of(stage, count))
