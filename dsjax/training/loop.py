"""A training run from its settings to its pictures: resume, steps, validation, checkpoints."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int32
from rich.console import Console

from dsjax.config import Config
from dsjax.data.batches import Batches
from dsjax.data.tokens import Progress, TokenCache, load_tokens
from dsjax.model.flops import training_flops_per_token
from dsjax.parallel.agreement import Vote, on_first, require_same
from dsjax.parallel.exchange import bytes_of_round, route_of
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import place
from dsjax.runtime import Runtime, runtime_of
from dsjax.settings import to_dict
from dsjax.training.announcement import announce, peak_of_all, tokens_of_device
from dsjax.training.ema import HostEma
from dsjax.training.folder import RunFolder
from dsjax.training.interrupts import Interrupts
from dsjax.training.metrics import MetricsFile, Recorder, Sink, StepFacts, TensorBoard, moe_layer_names, read_metrics
from dsjax.training.phases import Phase, Phases
from dsjax.training.pictures import draw_pictures
from dsjax.training.profile import Profile, parse_range
from dsjax.training.progress import ProgressDisplay, quantity, shares_of_time
from dsjax.training.quantization import make_observe, summary
from dsjax.training.schedule import Schedule
from dsjax.training.start import first_state
from dsjax.training.step import Knobs, LossAndGrads, make_evaluate, make_train_step
from dsjax.training.validation import Validation
from dsjax.training.watchdog import Watchdog
from dsjax.training.weights_and_biases import WeightsAndBiases, package


class TrainingFailed(RuntimeError):
    """The run cannot go on, because its losses or gradients are not finite."""


OBSERVED_SEQUENCES = 2
"""Held-out sequences on which `train.fp8_statistics` measures."""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    steps: int
    """Steps done."""
    finished: bool
    """False for a run that was asked to stop; the same command resumes it."""
    val_loss: float | None
    """Of the last validation, nats per token."""
    baselines: dict[str, float]
    """What n-gram models reach on the same predictions."""
    folder: Path
    seconds: dict[Phase, float]
    """Where this process spent its time, from its first step to its last checkpoint."""


def train(
    config: Config,
    *,
    fresh: bool = False,
    overwrite: bool = False,
    profile: str = "",
    console: Console | None = None,
    loss_and_grads: LossAndGrads | None = None,
) -> Summary:
    """Run `config` to its last step, or until it is interrupted, from the newest checkpoint in its folder.

    Args:
        fresh, overwrite: see `RunFolder`.
        profile: first and last step of a trace, such as `10:13`, see `training.profile`.
        console: where progress is shown.
        loss_and_grads: how gradients are made, see `make_train_step`.

    Raises:
        ValueError: settings, data or folder do not fit; one line.
        TrainingFailed: `train.max_bad_steps` steps in a row were not finite.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    traced = parse_range(profile, config.train.steps) if profile else None
    if config.train.wandb:
        package()
    mesh = make_mesh(config.mesh)
    folder = RunFolder(config, fresh=fresh, overwrite=overwrite)
    data = _load_tokens(config, console)
    runtime = runtime_of(config)
    announce(console, config, runtime, mesh, data)
    with folder:
        return Run(config, runtime, mesh, data, folder, console, loss_and_grads, traced).to_the_end()


class Run:
    """The parts of a run, put together; `to_the_end` runs it."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        mesh: Mesh,
        data: TokenCache,
        folder: RunFolder,
        console: Console,
        loss_and_grads: LossAndGrads | None = None,
        traced: tuple[int, int] | None = None,
    ):
        self.config, self.mesh, self.data, self.folder, self.console = config, mesh, data, folder, console
        self.runtime, self.is_first = runtime, jax.process_index() == 0
        train, end = config.train, data.tokenizer.eos if data.tokenizer else None
        self.schedule = Schedule(config)
        self.profile = Profile(traced, folder.path / "profile", console)
        self.compiled: set[tuple[int, ...]] = set()
        self.batches = Batches(data.train, config.data.sequence_length, train.seed)
        self.train_step = make_train_step(config, runtime, mesh, loss_and_grads, end)
        self.validation = Validation(
            data,
            make_evaluate(config, runtime, mesh, end),
            mesh,
            sequence_length=config.data.sequence_length,
            batch=train.micro_batch_size or train.batch_size,
            sequences=train.validation_sequences,
        )
        self.observe = make_observe(config, runtime) if train.fp8_statistics else None
        resumed = folder.resume(data.fingerprint, mesh)
        if self.is_first:
            folder.describe(data)
        self.state = resumed.state if resumed else first_state(config, mesh)
        self.first = int(self.state.step)
        self.seconds_before = resumed.seconds if resumed else 0.0
        if resumed:
            console.print(f"resumed   from step {self.first} of {train.steps}")
        average = resumed.average if resumed else self.state.params
        self.ema = HostEma(average, train.ema_decay) if train.ema_decay else None
        self.baselines: dict[str, float] = {}
        if self.is_first:
            self.baselines = self.validation.baselines(config.model.vocab_size, folder.path / "baselines.json")
        console.print("to beat   " + ", ".join(f"{name} {loss:.3f}" for name, loss in self.baselines.items()))
        self.phases, self.coming = Phases(), self.first + 1

    def to_the_end(self) -> Summary:
        """Train until the last step or an interruption; save, draw, and say how it went."""
        steps, path = self.config.train.steps, self.folder.path
        with ExitStack() as stack:
            names = moe_layer_names(self.config.model)
            sinks: list[Sink] = []
            val_loss = None
            if self.is_first:
                metrics_file = MetricsFile(path / "metrics.jsonl", self.first)
                sinks = [metrics_file, TensorBoard(path / "tensorboard", self.first, names)]
                if project := self.config.train.wandb:
                    sinks.append(WeightsAndBiases(project, path, to_dict(self.config)))
                for sink in sinks:
                    stack.enter_context(closing(sink))
                val_loss = next((r["val_loss"] for r in reversed(metrics_file.kept) if "val_loss" in r), None)
            interrupts = stack.enter_context(Interrupts(self._acknowledge))
            stop = Vote(self.mesh)
            display = stack.enter_context(
                ProgressDisplay(self.console, first_step=self.first, last_step=steps, val_loss=val_loss)
            )
            recorder = self._recorder(sinks, display)
            stack.enter_context(self._watchdog(recorder))
            stack.enter_context(self.profile)
            done = self.first
            for step, tokens in self._prefetched():
                self._step(step, tokens, recorder)
                self.folder.checkpoints.check()
                done = step + 1
                last = stop(interrupts.requested) or done == steps
                if done == steps or done % self.config.train.validate_every == 0:
                    display.doing("validating")
                    self._validate(recorder)
                if last or done % self.config.checkpoint.every == 0:
                    display.doing("saving")
                    self._save(recorder)
                self.phases.end_step()
                if last:
                    break
            with self.phases("save"):
                self.folder.checkpoints.wait()
        return self._conclude(done, names)

    def _step(self, step: int, tokens: Int32[Array, "A B S1"], recorder: Recorder) -> None:
        knobs = Knobs(self.schedule.learning_rate(step), self.schedule.mtp_weight(step), self.schedule.bias_speed(step))
        with self.phases("step" if tokens.shape in self.compiled else "compilation"):
            with self.profile.before(step + 1, self.state):
                self.state, metrics = self.train_step(self.state, tokens, knobs)
            self.compiled.add(tokens.shape)
        if self.ema:
            self.ema.update(self.state.params, metrics["finite"])
        batch, length = tokens.shape[0] * tokens.shape[1], self.config.data.sequence_length
        read = self.schedule.first_sequence(step) + batch
        recorder.step(
            StepFacts(
                step=step + 1,
                tokens=read * length,
                step_tokens=batch * length,
                epoch=read / len(self.batches),
                batch_size=batch,
                micro_batches=tokens.shape[0],
                **knobs._asdict(),
            ),
            metrics,
        )
        self.profile.after(step + 1, self.state)
        self._require_numbers(recorder)

    def _require_numbers(self, recorder: Recorder) -> None:
        """Raise TrainingFailed if too many steps in a row were skipped, the last one recorded among them."""
        bad = recorder.skipped_in_a_row
        if recorder.latest and bad >= self.config.train.max_bad_steps:
            raise TrainingFailed(
                f"losses or gradients of {bad} steps in a row, up to step {recorder.latest['step']}, were not finite, "
                "so they changed no weights; begin anew, in another folder, with a lower optimizer.learning_rate or a "
                f"longer optimizer.warmup; steps saved in {self.folder.path}: "
                f"{', '.join(map(str, self.folder.checkpoints.steps())) or 'none'}"
            )

    def _prefetched(self) -> Iterator[tuple[int, Int32[Array, "A B S1"]]]:
        """Yield every step that is left with its tokens, which a thread reads while the step before is computed."""
        steps = range(self.first, self.config.train.steps)
        with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
            coming = thread.submit(self._tokens, steps[0]) if steps else None
            for step in steps:
                self.coming = step + 1
                with self.phases("data"):
                    tokens = coming.result()
                if step + 1 in steps:
                    coming = thread.submit(self._tokens, step + 1)
                yield step, tokens

    def _tokens(self, step: int) -> Int32[Array, "A B S1"]:
        """Return a step's sequences on the devices; this process reads those of its own devices."""
        batch, first_of_step = self.schedule.batch_size(step), self.schedule.first_sequence(step)
        micro_batch = self.config.train.micro_batch_size or batch
        shape = batch // micro_batch, micro_batch, self.config.data.sequence_length + 1

        def rows(first: int, count: int) -> Int32[np.ndarray, "A b S1"]:
            starts = range(first_of_step + first, first_of_step + batch, micro_batch)
            return np.stack([self.batches.rows(start, count) for start in starts])

        return place(rows, shape, 1, self.mesh)

    def _validate(self, recorder: Recorder) -> None:
        with recorder.pause(), self.phases("validation"):
            live = self.validation(self.state.params, self.state.biases)
            values = {"val_loss": live["loss"], "val_loss_mtp": live["loss_mtp"]}
            if self.ema:
                values["val_loss_ema"] = self.validation(self.ema.value(), self.state.biases)["loss"]
            if self.observe:
                rows = self.validation.rows[:OBSERVED_SEQUENCES]
                values |= summary(self.observe(self.state.params, self.state.biases, rows))
            recorder.validation(values)

    def _save(self, recorder: Recorder) -> None:
        recorder.flush()
        self._require_numbers(recorder)
        with recorder.pause(), self.phases("save"):
            recorder.sync()
            average = self.ema.value() if self.ema else None
            self.folder.save(self.state, average, self.data.fingerprint, recorder.latest["seconds"])

    def _recorder(self, sinks: list, display: ProgressDisplay) -> Recorder:
        model, mesh = self.config.model, self.config.mesh
        return Recorder(
            sinks,
            every=self.config.train.log_every,
            last_step=self.config.train.steps,
            main_layers=model.num_hidden_layers - model.first_k_dense_replace,
            flops_per_token=training_flops_per_token(model, self.config.data.sequence_length),
            peak_flops=peak_of_all(self.mesh),
            expert_shards=mesh.expert_shards,
            # CPUs of several processes start a step when the one before is done, which would hide what it took.
            at_once=jax.process_count() > 1 and jax.default_backend() == "cpu",
            # A device has the layers of its own stages.
            round_bytes=tuple(
                size // mesh.pipe
                for size in bytes_of_round(
                    route_of(self.config, tokens_of_device(self.config)),
                    model,
                    jnp.dtype(self.runtime.compute_dtype).itemsize,
                    self.runtime.recipe,
                )
            ),
            phases=self.phases,
            on_record=display.update,
            seconds=self.seconds_before,
            skipped=int(self.state.skipped),
            skipped_in_a_row=int(self.state.skipped_in_a_row),
        )

    def _watchdog(self, recorder: Recorder) -> Watchdog:
        train, mesh = self.config.train, self.config.mesh
        return Watchdog(
            self.phases,
            lambda: self.coming if self.phases.current == "data" else (recorder.fetched or self.first) + 1,
            file=self.folder.path / "stalls" / f"process-{jax.process_index()}.txt",
            program=f"training step ({self.config.pipeline.schedule})" if mesh.pipe > 1 else "training step",
            factor=train.stall_factor,
            seconds=train.stall_seconds,
            patience=train.stall_patience,
        )

    def _acknowledge(self, signal_name: str) -> None:
        self.console.print(f"\n{signal_name}: saving and stopping after this step; Ctrl-C again stops at once")

    def _conclude(self, done: int, names: list[str]) -> Summary:
        path, steps = self.folder.path, self.config.train.steps
        records = read_metrics(path / "metrics.jsonl")
        if records and self.is_first:
            draw_pictures(path / "pictures", records, self.baselines, names)
        val_loss = next((record["val_loss"] for record in reversed(records) if "val_loss" in record), None)
        if done < steps:
            self.console.print(f"stopped at step {done} of {steps}, saved; to resume, run the command without --fresh")
        elif val_loss is not None:
            gaps = ", ".join(
                f"{abs(val_loss - loss):.3f} {'below' if val_loss < loss else 'above'} the {name}'s"
                for name, loss in self.baselines.items()
            )
            self.console.print(f"validation loss {val_loss:.3f} nats per token: {gaps}")
            self.console.print(f"pictures  {path / 'pictures'}")
        seconds = self.phases.total()
        self.console.print(f"time      {shares_of_time(seconds)}")
        return Summary(done, done == steps, val_loss, self.baselines, path, seconds)


def _load_tokens(config: Config, console: Console) -> TokenCache:
    """Return the tokens; where several processes share a cache, the first has made them when the others look."""

    def load() -> TokenCache:
        return load_tokens(config.data, config.model.vocab_size, _data_progress(console))

    if jax.process_count() > 1:
        on_first(load)
    data = load()
    require_same(data.fingerprint, "tokens of the training data")
    return data


def _data_progress(console: Console) -> Progress:
    """Say once that a stage of making the tokens has begun; nothing where they come from the cache."""
    begun = set()

    def show(stage: str, done: int, total: int) -> None:
        if stage not in begun:
            begun.add(stage)
            console.print(f"{stage}, {quantity(total)} bytes")

    return show
