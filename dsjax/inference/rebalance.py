"""Placing experts anew while the model answers: live loads, a schedule, a plan made aside, and the moves, one by one.

DeepSeek's service does so about every ten minutes (report section 3.4.1). Here a plan weighs balance against moves, is
made by a thread of its own, and is carried out between passes, in pieces of bounded size, layer after layer. What the
model says is the same at every moment, because a layer's tables change together with its weights.

Everything happens at counted steps: processes that count the same steps and see the same loads do the same, without
talking about it.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, Real, Shaped

from dsjax.inference.migrate import Migrator, Piece, pieces_of
from dsjax.inference.replicas import Tables, tables_of
from dsjax.parallel.mesh import Axes
from dsjax.parallel.placement import Placement, Policy, migration, plan_placement


@dataclass(frozen=True)
class RebalanceSettings:
    """When experts are placed anew, and how.

    Raises:
        ValueError: a number that is too small.
    """

    steps: int = 10_000
    """Steps from the end of a migration to the next plan, at least."""
    seconds: float = 0.0
    """The same in seconds, by this process' clock: for a single process."""
    planning_steps: int = 20
    """Steps after which a plan is taken over, and waited for if it is not ready: so that all processes take it at the
    same one."""
    pieces_per_step: int = 1
    """Pieces, of one expert per device, that are moved between two passes."""
    half_life: float = 1_000.0
    """Steps after which a load counts half."""
    cost: float = 0.001
    """Of one moved expert, see `plan_placement`."""
    policy: Policy = "auto"
    """See `plan_placement`."""
    groups: int = 1
    """Routing groups of experts, see `plan_placement`."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seconds", 0), ("planning_steps", 1), ("pieces_per_step", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: should be at least {least}")
        if not self.half_life > 0:
            raise ValueError(f"half_life = {self.half_life}: should be above 0 steps")


class LiveLoads:
    """A moving average of the tokens that chose each expert.

    Attributes:
        average: float64 [L, E]; zero before anything was seen.
    """

    def __init__(self, layers: int, experts: int, half_life: float):
        self.average = np.zeros((layers, experts))
        self._decay = 0.5 ** (1 / half_life)

    def add(self, loads: Real[np.ndarray, "L E"]) -> None:
        """Add the loads of a step; those of padding should not be in them.

        Raises:
            ValueError: loads of another shape.
        """
        if loads.shape != self.average.shape:
            raise ValueError(f"loads have shape {loads.shape}, should be {self.average.shape} as the placement's")
        self.average = self._decay * self.average + (1 - self._decay) * loads


class Rebalancer:
    """Follows the loads with the placement.

    Between two passes, call `advance` with the weights that it gave last, and give the next pass these and `tables`.

    Attributes:
        tables: of all layers, on all devices: which slots hold which expert now.
        loads: what has been observed.
        moved: experts that devices have got from others so far.
    """

    def __init__(
        self,
        placement: Placement,
        experts: PyTree[Shaped[Array, "L R ..."]],
        mesh: Mesh,
        axes: Axes,
        settings: RebalanceSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Takes over a placement, which is that of `experts`.

        Raises:
            ValueError: the mesh has other devices than the placement; `seconds` in a run of several processes.
        """
        self._migrator = Migrator(experts, mesh, axes)
        if self._migrator.devices != placement.devices:
            raise ValueError(
                f"the mesh has {self._migrator.devices} devices along {axes}, the placement {placement.devices}: should"
                " be the same"
            )
        if settings.seconds and jax.process_count() > 1:
            raise ValueError(
                f"seconds = {settings.seconds} in a run of {jax.process_count()} processes, whose clocks differ: should"
                " be 0, use steps"
            )
        self._placement, self._held = placement, placement.expert_of_slot.copy()
        self._settings, self._clock = settings, clock
        self._most = tables_of(placement).slots.shape[-1]
        self.tables = self._migrator.on_devices(tables_of(placement))
        self.loads = LiveLoads(placement.layers, placement.experts, settings.half_life)
        self.moved = 0
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="placement")
        self._plan: Future[Placement] | None = None
        self._work: deque[_Layer] = deque()
        self._rest()

    @property
    def placement(self) -> Placement:
        """The placement now; in the midst of a migration some layers have their new one."""
        return self._like(self._held)

    @property
    def is_migrating(self) -> bool:
        """Whether experts are still to be moved."""
        return bool(self._work)

    def imbalance(self) -> Float[np.ndarray, " L"]:
        """Return, of each layer, the fullest device's load over the mean, for the average of the observed loads."""
        return self.placement.imbalance(self.loads.average)

    def observe(self, loads: Real[np.ndarray, "L E"]) -> None:
        """Take note of the tokens that chose each expert in a step."""
        self.loads.add(np.asarray(loads))

    def advance(self, experts: PyTree[Shaped[Array, "L R ..."]]) -> PyTree[Shaped[Array, "L R ..."]]:
        """Do what is due between two passes, and return the weights.

        Args:
            experts: of all slots; given away when a layer gets its new placement.
        """
        self._steps += 1
        if self._work:
            return self._carry_on(experts)
        if self._plan is not None:
            if self._steps >= self._settings.planning_steps:
                self._take(self._plan.result())
        elif self._is_due():
            self._plan = self._planner.submit(self._planned, self.loads.average)
            self._steps = 0
        return experts

    def warm_up(self, experts: PyTree[Shaped[Array, "L R ..."]]) -> PyTree[Shaped[Array, "L R ..."]]:
        """Compile what moves experts, by a move of none, and return the weights.

        Args:
            experts: of all slots; given away.
        """
        devices, held = self._placement.devices, self._held[0]
        nothing = np.zeros(devices, np.int32)
        self._migrator.bring(experts, 0, Piece(nothing, nothing + devices, nothing))
        tables = Tables(*(table[0] for table in tables_of(self.placement, self._most)))
        experts, self.tables = self._migrator.settle(experts, self.tables, 0, np.arange(len(held)), tables)
        return experts

    def close(self) -> None:
        """Stop the planning thread."""
        self._planner.shutdown(cancel_futures=True)

    def _is_due(self) -> bool:
        settings = self._settings
        waited = self._steps >= settings.steps and self._clock() - self._since >= settings.seconds
        return waited and bool(self.loads.average.any())

    def _planned(self, loads: Float[np.ndarray, "L E"]) -> Placement:
        now, settings = self._placement, self._settings
        return plan_placement(
            loads,
            now.slots,
            now.devices,
            now.nodes,
            settings.groups,
            policy=settings.policy,
            current=now,
            cost=settings.cost,
        )

    def _take(self, planned: Placement) -> None:
        source, tables = migration(self._placement, planned).source, tables_of(planned, self._most)
        for layer in np.flatnonzero((self._held != planned.expert_of_slot).any(axis=1)):
            pieces = deque(pieces_of(source[layer], planned.devices))
            self._work.append(_Layer(int(layer), source[layer], pieces, Tables(*(table[layer] for table in tables))))
        self._plan = None
        if not self._work:
            self._rest()

    def _carry_on(self, experts: PyTree[Shaped[Array, "L R ..."]]) -> PyTree[Shaped[Array, "L R ..."]]:
        work = self._work[0]
        for _ in range(min(self._settings.pieces_per_step, len(work.pieces))):
            piece = work.pieces.popleft()
            self._migrator.bring(experts, work.layer, piece)
            self.moved += int((piece.giver < self._placement.devices).sum())
        if not work.pieces:
            experts, self.tables = self._migrator.settle(experts, self.tables, work.layer, work.source, work.tables)
            self._held[work.layer] = work.tables.experts
            self._work.popleft()
            if not self._work:
                self._placement = self.placement
                self._rest()
        return experts

    def _rest(self) -> None:
        self._steps, self._since = 0, self._clock()

    def _like(self, held: np.ndarray) -> Placement:
        now = self._placement
        return Placement(held, now.experts, now.devices, now.nodes)


@dataclass
class _Layer:
    """What is still to be done for a layer."""

    layer: int
    source: np.ndarray
    pieces: deque[Piece]
    tables: Tables
