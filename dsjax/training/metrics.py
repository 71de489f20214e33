"""What a run writes down: one record per logged step, as a line of `metrics.jsonl` and in TensorBoard's event files.

`Recorder` stays one step behind the device: the numbers of a step are fetched when the next one has been started, so
writing them down never makes the device wait. A record says only what its own step did (nothing but the rates is
averaged), so a resumed run writes the same numbers as an undisturbed one.

Keys of a record (`RECORD_KEYS` says which are always there):
`step` (steps done, from 1), `loss`, `loss_mtp`, `loss_balance` (nats per token; unweighted), `grad_norm` (before
clipping), `learning_rate`, `mtp_weight`, `bias_speed`, `batch_size` (sequences), `tokens` (seen since the beginning of
the run), `epoch`, `tokens_per_s` and `mfu` (since the line before, without validation, saving and the first
compilation; null if that leaves nothing), `step_seconds`, `data_seconds`, `compilation_seconds`, `validation_seconds`,
`save_seconds` (where the first process was since the line before, see `training.phases`; what
follows a line, such as a save, is in the next), `process_memory_peak_bytes` (resident, of the first process, on its
host), `device_memory_peak_bytes` (in use, on its fullest device; null on a CPU, whose arrays are the process'),
`expert_load_max_over_mean` (of the worst layer: 1 is perfect balance),
`expert_load_max_over_mean_per_layer`, `expert_load_over_mean_last_layer` (one number per expert of the last main
layer), `device_load_max_over_mean` (the same of the experts of a device together), `exchange_rounds` (of the expert
exchange, in the layer with most, mean over micro-batches: 1 where the buffers held every token), `node_bytes` and
`local_bytes` (sent by a device in the step's exchanges, to other nodes and to other devices of its node, as padded
transport does), `skipped_steps` (since the beginning of the run), `seconds` (spent in the run so far); on validated
steps `val_loss`, `val_loss_mtp`, with a moving average `val_loss_ema`, and with `train.fp8_statistics` what FP8 does to
weights, inputs and gradients (`fp8_weight_error`, ...; see `training.quantization.summary`). In FP8 there are
`fp8_weights_to_zero`, `fp8_weights_largest` and `fp8_weights_not_finite` of the step's own weights, see
`training.quantization.shares`. A number that is not finite is written as null.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

import jax
import numpy as np
from jaxtyping import Array, Int
from tensorboardX import SummaryWriter

from dsjax.config import ModelConfig
from dsjax.training.memory import peak_of_devices, peak_of_process
from dsjax.training.phases import Phase, Phases
from dsjax.training.quantization import shares

type Record = dict[str, int | float | list[float] | None]

RECORD_KEYS = (
    *("step", "loss", "loss_mtp", "loss_balance", "grad_norm", "learning_rate", "mtp_weight", "bias_speed"),
    *("batch_size", "tokens", "epoch", "tokens_per_s", "mfu", "expert_load_max_over_mean"),
    *("expert_load_max_over_mean_per_layer", "expert_load_over_mean_last_layer", "device_load_max_over_mean"),
    *("exchange_rounds", "node_bytes", "local_bytes", "skipped_steps", "seconds"),
    *(f"{phase}_seconds" for phase in get_args(Phase)),
    *("process_memory_peak_bytes", "device_memory_peak_bytes"),
)
OF_THE_MACHINE = frozenset(
    {"seconds", "tokens_per_s", "mfu", *(key for key in RECORD_KEYS if key.endswith(("_seconds", "_peak_bytes")))}
)
"""Keys of what a step cost; the others are the same whenever and wherever it is done again."""


class Sink(Protocol):
    """Somewhere records go."""

    def write(self, record: Record) -> None:
        """Takes one record, in the order of the steps."""

    def sync(self) -> None:
        """Returns when everything written is on the disk."""

    def close(self) -> None:
        """Makes sure that everything written is kept."""


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file, oldest first; without a last line that a crash cut short.

    Raises ValueError, naming file and line, for any other line that is not a JSON object with a `step`.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or cut short
        try:
            records.append({"step": None} | json.loads(line))
            records[-1]["step"] = int(records[-1]["step"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a line of metrics; delete it: {line[:80]!r}") from error
    return records


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, in the file as soon as it is written.

    Opening it drops the lines after `last_step`, which a resumed run writes again, and a line that a crash cut short.
    """

    def __init__(self, path: Path, last_step: int):
        self.kept = [record for record in read_metrics(path) if record["step"] <= last_step]
        """The records that were already there."""
        draft = path.with_suffix(".draft")
        with open(draft, "w", encoding="utf-8") as file:
            file.writelines(_line(record) for record in self.kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)  # at no time is there a file with fewer of the kept lines
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, record: Record) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Returns when the lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(record: Record) -> str:
    return json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """TensorBoard event files with every finite number of a record, and one curve per layer of the expert load."""

    def __init__(self, folder: Path, last_step: int, layers: Sequence[str]):
        # purge_step tells TensorBoard to forget what an earlier process wrote for the steps that are done again.
        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)
        self._layers = layers

    def write(self, record: Record) -> None:
        step = record["step"]
        for key, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value) and key != "step":
                self._writer.add_scalar(key, value, step)
        per_layer = record["expert_load_max_over_mean_per_layer"]
        for layer, value in zip(self._layers, per_layer, strict=True):
            self._writer.add_scalar(f"expert_load/{layer}", value, step)
        self._writer.flush()

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def moe_layer_names(model: ModelConfig) -> list[str]:
    """Names of the layers with routed experts, in the order of the step's `loads`: main layers, then MTP modules."""
    main = range(model.first_k_dense_replace, model.num_hidden_layers)
    return [f"layer {i}" for i in main] + [f"MTP {k}" for k in range(model.num_nextn_predict_layers)]


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What the host knows about a step before the device has done it."""

    step: int
    """Steps done when this one is, from 1."""
    tokens: int
    """Tokens the model has read since the beginning of the run, with this step's."""
    step_tokens: int
    """Tokens the model reads in this step."""
    epoch: float
    """Passes over the training tokens, with this step."""
    batch_size: int
    """Sequences in this step."""
    micro_batches: int
    """Parts in which they are computed, one after another."""
    learning_rate: float
    mtp_weight: float
    bias_speed: float


@dataclass
class _Pending:
    """A step that the device may still be computing."""

    facts: StepFacts
    metrics: Mapping[str, Array] | None
    record: Record | None = None
    validated: bool = False


class Recorder:
    """Makes a record of every step, and writes some of them.

    sinks: where logged records go. every: steps between logged records; validated, skipped and last steps are logged
    too. on_record: called with every record (the progress bar). flops_per_token, peak_flops: of the model, and of all
    devices together, for MFU. main_layers: how many of the rows of `loads` are main layers. expert_shards: devices over
    which experts are divided. round_bytes: of an exchange round, see `parallel.exchange.bytes_of_round`. at_once: fetch
    a step's numbers before the next one is started, where starting it waits for this one anyway. phases: of the run.
    seconds, skipped, skipped_in_a_row: where the run stood when it was saved.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        every: int,
        last_step: int,
        main_layers: int,
        flops_per_token: float,
        peak_flops: float | None,
        expert_shards: int = 1,
        round_bytes: tuple[int, int] = (0, 0),
        at_once: bool = False,
        phases: Phases | None = None,
        on_record=lambda record: None,
        seconds: float = 0.0,
        skipped: int = 0,
        skipped_in_a_row: int = 0,
    ):
        self.skipped, self.skipped_in_a_row = skipped, skipped_in_a_row
        self.latest: Record = {}
        """The newest record, logged or not."""
        self.first_step_seconds: float | None = None
        """Time that the first step of this process took, compilation included."""
        self.fetched: int | None = None
        """The newest step whose numbers are here: the one behind it is in flight."""
        self._sinks, self._every, self._last_step, self._main_layers = sinks, every, last_step, main_layers
        self._flops_per_token, self._peak_flops, self._on_record = flops_per_token, peak_flops, on_record
        self._expert_shards, self._round_bytes, self._at_once = expert_shards, round_bytes, at_once
        self._phases = phases or Phases()
        self._pending: _Pending | None = None
        self._began = time.perf_counter() - seconds
        self._mark = time.perf_counter()
        self._tokens, self._seconds = 0, 0.0  # since the last logged record

    def step(self, facts: StepFacts, metrics: Mapping[str, Array]) -> None:
        """Takes a step that has been started, and finishes the record of the one before."""
        self.flush()
        self._pending = _Pending(facts, metrics)
        if self._at_once:
            self._settle()

    def sync(self) -> None:
        """Returns when everything written is kept."""
        for sink in self._sinks:
            sink.sync()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Waits for the step in flight; what is done inside does not count as training time."""
        self._settle()
        yield
        self._mark = time.perf_counter()

    def validation(self, values: Mapping[str, float]) -> None:
        """Adds what a validation found to the record of the step in flight."""
        self._settle()
        assert self._pending is not None and self._pending.record is not None, "validation follows a step"
        self._pending.record |= values
        self._pending.validated = True

    def flush(self) -> None:
        """Waits for the step in flight and writes its record."""
        self._settle()
        if self._pending is None:
            return
        record, self._pending = self._pending, None
        self.latest = record.record
        self._on_record(record.record)
        step = record.facts.step
        if record.validated or self.skipped_in_a_row or step % self._every == 0 or step == self._last_step:
            record.record |= self._costs()
            for sink in self._sinks:
                sink.write(record.record)
            self._tokens, self._seconds = 0, 0.0

    def _settle(self) -> None:
        """Fetches the numbers of the step in flight, once."""
        pending = self._pending
        if pending is None or pending.record is not None:
            return
        numbers = jax.device_get(pending.metrics)
        pending.metrics, self.fetched = None, pending.facts.step
        self._count(pending.facts, bool(numbers["finite"]))
        pending.record = self._record(pending.facts, numbers)

    def _costs(self) -> Record:
        """Returns the seconds since the line before, by phase, and the memory's high-water marks."""
        spent = self._phases.lap()
        return {
            **{f"{phase}_seconds": round(spent.get(phase, 0.0), 4) for phase in get_args(Phase)},
            "process_memory_peak_bytes": peak_of_process(),
            "device_memory_peak_bytes": peak_of_devices(),
        }

    def _count(self, facts: StepFacts, finite: bool) -> None:
        now = time.perf_counter()
        if self.first_step_seconds is None:  # it compiled, which would hide the true rate
            self.first_step_seconds = now - self._mark
        else:
            self._tokens += facts.step_tokens
            self._seconds += now - self._mark
        self._mark = now
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1

    def _record(self, facts: StepFacts, numbers: Mapping[str, np.ndarray]) -> Record:
        rate = self._tokens / self._seconds if self._seconds else None
        counts = numbers.get("loads", np.zeros((0, self._expert_shards), np.int32))  # dense layers route nothing
        loads = load_over_mean(counts)
        devices = load_over_mean(
            counts.reshape(*counts.shape[:1], self._expert_shards, counts.shape[1] // self._expert_shards).sum(2)
        )
        rounds = np.asarray(numbers.get("rounds", np.zeros(0)))
        return {
            "step": facts.step,
            **{key: float(numbers.get(key, 0.0)) for key in ("loss", "loss_mtp", "loss_balance", "grad_norm")},
            "learning_rate": float(facts.learning_rate),
            "mtp_weight": float(facts.mtp_weight),
            "bias_speed": float(facts.bias_speed),
            "batch_size": facts.batch_size,
            "tokens": facts.tokens,
            "epoch": round(facts.epoch, 4),
            "tokens_per_s": rate,
            "mfu": rate and self._peak_flops and rate * self._flops_per_token / self._peak_flops,
            "expert_load_max_over_mean": float(loads.max(initial=0.0)),
            "expert_load_max_over_mean_per_layer": _rounded(loads.max(axis=1, initial=0.0)),
            "expert_load_over_mean_last_layer": _rounded(loads[self._main_layers - 1]) if self._main_layers else [],
            "device_load_max_over_mean": float(devices.max(initial=0.0)),
            "exchange_rounds": float(rounds.max(initial=0.0)) / facts.micro_batches,
            **{
                name: int(rounds.sum()) * size
                for name, size in zip(("node_bytes", "local_bytes"), self._round_bytes, strict=True)
            },
            **shares(numbers.get("fp8", {})),
            "skipped_steps": self.skipped,
            "seconds": round(time.perf_counter() - self._began, 3),
        }


def load_over_mean(loads: Int[np.ndarray, "L E"]) -> np.ndarray:
    """Tokens that each expert got, as a multiple of its layer's mean: float64[L, E], 1 is perfect balance."""
    loads = np.asarray(loads, np.float64)
    return loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-9)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
