"""How long a step will take: times of the parts of layers, put together by the schedule of the run.

Two estimates, by one set of rates (`planning.rates`). `report` is of the report's system: tokens cross the network once
per node, ranks wait only for what they need, the ends' weights are where they are used. `program` is of the program
that dsjax compiles: buffers are sent whole, the two hops follow each other, ranks keep step, and the ends gather their
weights for every micro-batch.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from dsjax.config import Config
from dsjax.model.flops import training_flops_per_token, work_of_parts
from dsjax.parallel.exchange import route_of
from dsjax.pipeline.program import compile_program
from dsjax.pipeline.schedule import Action, Kind, Schedule
from dsjax.pipeline.simulate import Timeline, simulate, simulate_ticks
from dsjax.pipeline.stages import schedule_of, stage_layout
from dsjax.planning.chips import Chip
from dsjax.planning.memory import Memory
from dsjax.planning.rates import Rates, attention_weights, core_flops, nodes_of_token, row_bytes

System = Literal["report", "program"]
KINDS = {"dispatch": 0, "combine_backward": 0, "combine": 1, "dispatch_backward": 1}
"""Whether a part of the exchange is published as a dispatch or as a combine."""


@dataclass(frozen=True)
class Layer:
    """Seconds of one MoE layer of a device's micro-batch."""

    forward: float
    backward_input: float
    backward_weight: float
    """Computing, on the multiprocessors that compute in a pair."""
    exchange: dict[str, float]
    """Communicating in a pair."""
    exchange_alone: dict[str, float]


class Hop(NamedTuple):
    """One all-to-all."""

    where: str
    nbytes: float
    """That leave a device."""
    seconds: float


@dataclass(frozen=True)
class Ends:
    """Seconds of what the first and the last stage do besides, per micro-batch, with nothing beside it."""

    first_forward: float
    first_backward: float
    last: float
    """Forward and backward pass: both in F."""


@dataclass(frozen=True)
class StepTime:
    """A step in time."""

    pipeline: float
    """Seconds of all micro-batches."""
    bubble: float
    """Of them, those that the rank that waits longest waits."""
    update: float
    """Seconds of gathering weights, reducing gradients, and the optimizer."""
    tokens_per_s_per_gpu: float
    mfu: float

    @property
    def total(self) -> float:
        return self.pipeline + self.update


class CostModel:
    """Times of a run on a chip, and of the ops of its schedule; a `pipeline.simulate.Cost`."""

    def __init__(self, config: Config, chip: Chip, rates: Rates, memory: Memory, system: System):
        self.config, self.chip, self.rates, self.memory, self.system = config, chip, rates, memory, system
        train, mesh = config.train, config.mesh
        self.micro_batch = train.micro_batch_size or train.batch_size
        self.tokens = self.micro_batch * config.data.sequence_length // mesh.batch_shards
        self.schedule: Schedule = schedule_of(config, train.batch_size // self.micro_batch)
        self.layout = stage_layout(config.model, self.schedule.route.stages)
        self.in_fp8 = config.precision in ("fp8", "mxfp8") and chip.fp8_flops is not None

    @cached_property
    def layer(self) -> Layer:
        """An MoE layer."""
        moe = work_of_parts(self.config.model)[1]
        computing = [self._computing(phase, moe) for phase in ("forward", "input", "weight")]
        return Layer(*computing, self._exchange(alone=False), self._exchange(alone=True))

    def _computing(self, phase: str, weights: int) -> float:
        model, rates = self.config.model, self.rates
        attention = attention_weights(model)
        passes = {"forward": 1.0, "input": 2.5, "weight": 0.0}[phase]
        seconds = 2 * attention / rates.linear[f"attention_{phase}"]
        seconds += 2 * (weights - attention) / rates.linear[f"mlp_{phase}"]
        if passes:
            core = core_flops(model, self.config.data.sequence_length)
            seconds += passes * core / rates.core[f"attention_{phase}"]
        return seconds * self.tokens

    def _exchange(self, *, alone: bool) -> dict[str, float]:
        """Return the seconds of each part of the expert exchange."""
        hops = {part: [hop.seconds for hop in self.hops(part, alone=alone)] for part in self.rates.exchange}
        # One kernel forwards tokens inside a node while others still cross; our hops are two all-to-alls.
        together = max if self.system == "report" else sum
        return {part: together(seconds) if seconds else 0.0 for part, seconds in hops.items()}

    def hops(self, part: str, *, alone: bool = False) -> list[Hop]:
        """Return the hops of a part of the expert exchange, of a layer and micro-batch."""
        model, mesh, rates = self.config.model, self.config.mesh, self.rates
        rows = [self.tokens * nodes_of_token(model, mesh.node), self.tokens * model.num_experts_per_tok]
        if self.system == "program":
            route = route_of(self.config, self.tokens)
            rows = [mesh.node * route.node_capacity, mesh.local * route.device_capacity]
        row = row_bytes(model, part, fp8=self.in_fp8)
        kind = KINDS[part]
        found = []
        if mesh.node > 1:
            rate = rates.alone[kind] if alone else rates.exchange[part]
            # Rates count rows that stay, too.
            found.append(Hop("to nodes", rows[0] * row * (1 - 1 / mesh.node), rows[0] * row / rate))
        if mesh.local > 1:
            found.append(Hop("in the node", rows[1] * row * (1 - 1 / mesh.local), rows[1] * row / rates.in_node[kind]))
        return found

    @cached_property
    def ends(self) -> Ends:
        """What is no MoE layer of a stage."""
        model, share = self.config.model, self.rates.computing_share
        dense, _, _, head = work_of_parts(model)
        of_dense = [
            model.first_k_dense_replace * share * self._computing(p, dense) for p in ("forward", "input", "weight")
        ]
        depth = model.num_nextn_predict_layers
        heads = 3 * 2 * ((1 + depth) * head + depth * 2 * model.hidden_size**2) * self.tokens / self.rates.head
        modules = depth * (self._alone("forward") + self._alone("backward"))
        first, last = self._end_bytes
        again = of_dense[0] if self.system == "program" and self.config.mesh.pipe > 1 else 0.0
        return Ends(
            first_forward=of_dense[0] + self._collective(first),
            first_backward=again + of_dense[1] + of_dense[2] + 3 * self._collective(first),
            last=heads + modules + 3 * self._collective(last),
        )

    @property
    def _end_bytes(self) -> tuple[float, float]:
        """Return the 16-bit bytes that the first and the last stage gather per micro-batch; float32 is twice that."""
        if self.system == "report" or self.config.mesh.pipe == 1:
            return 0.0, 0.0
        model, shards = self.config.model, self.config.mesh.expert_shards
        vocabulary = 2 * model.vocab_size * model.hidden_size
        routed = 3 * model.hidden_size * model.moe_intermediate_size * (model.n_routed_experts // shards)
        shared = 3 * model.hidden_size * model.moe_intermediate_size * model.n_shared_experts
        attention = attention_weights(model)
        dense = attention + 3 * model.hidden_size * model.intermediate_size
        depth = model.num_nextn_predict_layers
        module = depth * (attention + shared + routed + 2 * model.hidden_size**2)
        return vocabulary + 2 * model.first_k_dense_replace * dense, (1 + bool(depth)) * vocabulary + 2 * module

    def _collective(self, nbytes: float) -> float:
        """Return the seconds in which devices of all batch shards gather so many bytes, or reduce them."""
        mesh, chip = self.config.mesh, self.chip
        if mesh.batch_shards == 1:
            return 0.0
        in_node = nbytes / self.rates.node
        if mesh.batch_shards <= chip.devices_per_node:
            return in_node
        return max(in_node, nbytes / (self.rates.network * chip.devices_per_node))

    def _alone(self, phase: Literal["forward", "input", "weight", "backward"]) -> float:
        """Return the seconds of a pass of a layer with nothing beside it."""
        layer, share = self.layer, self.rates.computing_share
        sent = layer.exchange_alone
        match phase:
            case "forward":
                return layer.forward * share + sent["dispatch"] + sent["combine"]
            case "input":
                return layer.backward_input * share + sent["combine_backward"] + sent["dispatch_backward"]
            case "weight":
                return layer.backward_weight * share
        return self._alone("input") + self._alone("weight")

    @cached_property
    def pair(self) -> float:
        """Seconds of a layer's forward pass beside one's backward pass."""
        layer = self.layer
        computing = layer.forward + layer.backward_input + layer.backward_weight
        sent = sum(layer.exchange.values())
        if not sent:
            return computing * self.rates.computing_share
        return max(computing * self.rates.pair_slowdown, sent)

    @property
    def transfer(self) -> float:
        """Seconds from the end of an op until its result is at the next rank."""
        mesh, chip = self.config.mesh, self.chip
        link = self.rates.node if mesh.devices <= chip.devices_per_node else self.rates.network
        return self.memory.activation_bytes / link if mesh.pipe > 1 else 0.0

    def of(self, action: Action, rank: int = 0) -> float:
        """Return the seconds of an action of a rank."""
        route = self.schedule.route
        layers = {op.kind.role: self.layout.counts[route.stage(rank, op.slot)] for op in action}
        paired = min(layers[Kind.F], layers[Kind.B]) if {Kind.F, Kind.B} <= layers.keys() and len(action) == 2 else 0
        seconds = paired * self.pair
        for op in action:
            stage = route.stage(rank, op.slot)
            phase = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input", Kind.W: "weight"}[op.kind]
            seconds += (self.layout.counts[stage] - paired) * self._alone(phase)
            if stage == 0 and op.kind is not Kind.W:
                seconds += self.ends.first_forward if op.kind is Kind.F else self.ends.first_backward
            if stage == route.stages - 1 and op.kind is Kind.F:
                seconds += self.ends.last
        return seconds

    @cached_property
    def timeline(self) -> Timeline:
        """The step's micro-batches in time."""
        if self.system == "report":
            return simulate(self.schedule, self)
        # Ticks are those of the program, which is compiled without knowing any times.
        return simulate_ticks(self.schedule, compile_program(self.schedule).ticks, self)

    @cached_property
    def update(self) -> float:
        """Seconds of the rest of a step: weights are gathered and exchanged, gradients reduced, weights moved."""
        mesh, held = self.config.mesh, self.memory.device
        copies = 2 if self.schedule.name == "DualPipe" else 1
        gradients = held["gradients"] * copies
        experts = gradients * self.expert_share
        seconds = self._collective(1.5 * (gradients - experts))
        seconds += 1.5 * experts * (1 - 1 / mesh.data) / self.rates.network
        if copies == 2:
            seconds += 1.5 * gradients / copies / self.rates.network  # to the mirror rank, and 16-bit weights from it
        moved = 2 * (held["master_weights"] + held["moments"]) + gradients
        return seconds + moved / self.rates.memory

    @property
    def expert_share(self) -> float:
        """Return the share of a device's weights of MoE layers that are routed experts."""
        model = self.config.model
        expert = 3 * model.hidden_size * model.moe_intermediate_size
        own = expert * model.n_routed_experts // self.config.mesh.expert_shards
        return own / (own + expert * model.n_shared_experts + attention_weights(model))

    def step(self) -> StepTime:
        """Return the estimate for a step of the full batch."""
        config, timeline = self.config, self.timeline
        seconds = timeline.makespan + self.update
        length = config.data.sequence_length
        tokens = config.train.batch_size * length / config.mesh.devices / seconds
        flops = training_flops_per_token(config.model, length)
        return StepTime(
            pipeline=timeline.makespan,
            bubble=max(timeline.bubble),
            update=self.update,
            tokens_per_s_per_gpu=tokens,
            mfu=tokens * flops / self.chip.bf16_flops,
        )
