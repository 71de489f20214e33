"""A trained model from disk, ready to generate: a run, or released weights in any form that `checkpoint/` reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from dsjax.checkpoint.arrays import Arrays
from dsjax.checkpoint.forms import open_checkpoint
from dsjax.checkpoint.native import NoUsableCheckpoint, differing_fields
from dsjax.checkpoint.sources import RUN_FOLDER, CheckpointProblems, Source, is_run
from dsjax.config import ModelConfig
from dsjax.config import Precision as TrainingPrecision
from dsjax.data.tokenizer import Tokenizer
from dsjax.inference.layout import Layout, mesh_of, placed, weight_specs
from dsjax.inference.reading import fp8_weights_kept, read_weights
from dsjax.inference.settings import Precision
from dsjax.inference.weights import arranged, check_blocks, first_placement, moe_layers
from dsjax.pallas.choice import resolve
from dsjax.parallel.placement import Placement
from dsjax.runtime import Runtime, compute_dtype
from dsjax.settings import load_config, to_dict


@dataclass(frozen=True)
class Model:
    """All that generating needs."""

    config: ModelConfig
    runtime: Runtime
    params: PyTree
    """Stacked, weights in the compute format."""
    biases: PyTree
    """Router biases, stacked."""
    tokenizer: Tokenizer
    opening: int
    """Id of the token in front of a document."""
    context: int
    """Tokens of the sequences that the model was made for; RoPE itself has no limit."""
    origin: str
    """Where the weights are from, for people."""
    layout: Layout = field(default_factory=Layout)
    """How the devices of a unit share it."""
    mesh: Mesh | None = None
    """Of the unit; None where weights are on a single device."""
    placement: Placement | None = None
    """Of its experts, where they have several slots: in MoE layers and then in MTP modules."""

    @property
    def processes(self) -> int:
        """Processes that the unit's devices are of."""
        return 1 if self.mesh is None else len({device.process_index for device in self.mesh.devices.flat})

    def shardings(self, specs: PyTree) -> PyTree:
        """Return how arrays are divided: as `specs` say, or on the device of the weights."""
        if self.mesh is None:
            (device,) = jax.tree.leaves(self.params)[0].devices()
            return jax.tree.map(lambda _: SingleDeviceSharding(device), specs)
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def on_unit(self, layout: Layout, devices: Sequence[jax.Device] | None = None, *, fp8: bool = False) -> "Model":
        """Return this model on the devices of a unit.

        Args:
            devices: by default the first of all that there are.
            fp8: whether products of weights are in FP8.

        Raises:
            ValueError: the layout is none for the model, or cuts weights in FP8 through their blocks, or there are too
                few devices.
        """
        layout.check(self.config)
        mesh, placement = mesh_of(layout, devices), first_placement(self.config, layout)
        weights = arranged(
            self.params, self.config, layout, placement.expert_of_slot, self.runtime.compute_dtype, fp8=fp8
        )
        check_blocks(weights, layout)
        return replace(
            self,
            params=placed(weights, weight_specs(weights), mesh),
            biases=placed(self.biases, jax.tree.map(lambda _: PartitionSpec(), self.biases), mesh),
            layout=layout,
            mesh=mesh,
            placement=None if layout.is_plain(self.config) else placement,
        )

    def with_modules(self, count: int) -> "Model":
        """Return this model with the first `count` of its MTP modules alone."""
        if count == self.config.num_nextn_predict_layers:
            return self

        def first(tree: PyTree) -> PyTree:
            rest = {name: part for name, part in tree.items() if name != "mtp"}
            if "mtp" not in tree or not count:
                return rest
            return rest | {"mtp": jax.tree.map(lambda leaf: leaf[:count], tree["mtp"])}

        config, placement = replace(self.config, num_nextn_predict_layers=count), self.placement
        if placement is not None:
            placement = replace(placement, expert_of_slot=placement.expert_of_slot[: moe_layers(config) + count])
        return replace(self, config=config, params=first(self.params), biases=first(self.biases), placement=placement)


def load_model(
    path: str | Path,
    *,
    ema: bool = False,
    mtp: bool = False,
    layout: Layout | None = None,
    devices: Sequence[jax.Device] | None = None,
    precision: Precision = "auto",
) -> Model:
    """Load the newest undamaged checkpoint of a run, or released weights; each process what its own devices hold.

    Args:
        path: folder of a run, or of weights with their config and `tokenizer.json`.
        ema: whether to take the moving average of a run's weights.
        mtp: whether to load the model's MTP modules too, which draft tokens: see `EngineSettings.speculate`.
        layout: of a unit of devices; by default a single one.
        devices: by default the first of all that there are, and a single one of this process.
        precision: of weights and their products. `fp8` takes codes and scales as they are where weights are stored in
            FP8, and quantizes others; what is not multiplied in FP8 is in BF16. `auto` is `fp8` for weights stored so
            on GPUs that have kernels for it. Otherwise it is what a run was trained in, and for released weights
            `bf16`, or `fp32` on a CPU.

    Raises:
        ValueError: no such folder; neither a run nor weights; no checkpoint yet, or none that is whole; no average;
            no tokenizer, or one with more tokens than the model; a layout that the model cannot have, or that cuts
            weights in FP8 through their blocks; too few devices; no such precision.
    """
    path, layout = Path(path), layout or Layout()
    if precision not in get_args(Precision):
        raise ValueError(f"precision = {precision!r}: must be one of {', '.join(get_args(Precision))}")
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    open_folder = _open_run if (path / "config.toml").is_file() else _open_weights
    opened = open_folder(path, ema, mtp, partial(_place, layout, devices))
    try:
        return _load(opened, precision)
    finally:
        opened.source.close()


class _Place(NamedTuple):
    """Where a model goes."""

    layout: Layout
    mesh: Mesh | None
    shardings: Callable[[PartitionSpec], Sharding]


class _Opened(NamedTuple):
    """A checkpoint, with what is known of its model."""

    source: Source
    place: _Place
    tokenizer: Tokenizer
    trained_in: TrainingPrecision
    opening: int
    context: int
    origin: str


def _place(layout: Layout, devices: Sequence[jax.Device] | None, config: ModelConfig) -> _Place:
    layout.check(config)
    if layout.devices > 1:
        mesh = mesh_of(layout, devices)
        return _Place(layout, mesh, partial(NamedSharding, mesh))
    device = (devices or jax.local_devices())[0]
    return _Place(layout, None, lambda _: SingleDeviceSharding(device))


def _open_run(path: Path, ema: bool, mtp: bool, place: Callable[[ModelConfig], _Place]) -> _Opened:
    run = load_config([str(path / "config.toml")])
    if ema and not run.train.ema_decay:
        raise ValueError(f"{path}: the run keeps no average of its weights (train.ema_decay = 0); leave --ema out")
    if not (path / RUN_FOLDER).is_dir() or not is_run(path):
        raise ValueError(f"{path}: the run has no checkpoint yet")
    tokenizer = _load_tokenizer(path, run.model)
    config = run.model if mtp else replace(run.model, num_nextn_predict_layers=0)
    where = place(config)
    try:
        source = open_checkpoint(path, mtp=mtp, weights="ema" if ema else "live")
    except CheckpointProblems as error:
        if isinstance(error.__cause__, NoUsableCheckpoint):  # which says better what was tried
            raise ValueError(str(error.__cause__)) from error
        raise
    if differing := differing_fields(to_dict(source.config), to_dict(config), "model."):
        source.close()
        raise ValueError(f"{path / 'config.toml'} is not of this checkpoint: {'; '.join(differing)}")
    return _Opened(
        source,
        where,
        tokenizer,
        run.precision,
        # In the packed sequences that a run learns from, a document follows the end of another.
        opening=tokenizer.eos,
        context=run.data.sequence_length,
        origin=f"step {source.step} of {path}" + (", averaged weights" if ema else ""),
    )


def _open_weights(path: Path, ema: bool, mtp: bool, place: Callable[[ModelConfig], _Place]) -> _Opened:
    if ema:
        raise ValueError(f"{path}: only a run has averaged weights, and this is none; leave --ema out")
    source = open_checkpoint(path, mtp=mtp)
    try:
        config, released = source.config, source.huggingface or {}
        tokenizer = _load_tokenizer(path, config)
        yarn = config.rope_scaling
        made_for = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else 4096
        return _Opened(
            source,
            place(config),
            tokenizer,
            "auto",
            opening=tokenizer.eos if tokenizer.bos is None else tokenizer.bos,
            context=released.get("max_position_embeddings", made_for),
            origin=str(path),
        )
    except ValueError:
        source.close()
        raise


def _load_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path}: no tokenizer.json, without which a prompt cannot be read")
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path / 'tokenizer.json'} has {tokenizer.vocab_size} tokens: must be at most the model's "
            f"vocab_size = {config.vocab_size}"
        )
    return tokenizer


def _load(opened: _Opened, precision: Precision) -> Model:
    source, (layout, mesh, shardings) = opened.source, opened.place
    config, arrays = source.config, Arrays(source)
    stored_in_fp8 = any(arrays.is_fp8(name) for name in arrays.shapes)
    if precision == "auto" and stored_in_fp8 and resolve("auto") == "mosaic":
        precision = "fp8"
    runtime = Runtime(compute_dtype=compute_dtype(opened.trained_in if precision == "auto" else precision))
    placement = first_placement(config, layout)
    params, biases = read_weights(
        arrays,
        config,
        layout,
        placement.expert_of_slot,
        shardings,
        runtime.compute_dtype,
        fp8=precision == "fp8",
    )
    return Model(
        config,
        runtime,
        params,
        biases,
        opened.tokenizer,
        opening=opened.opening,
        context=opened.context,
        origin=opened.origin + _treatment(arrays, precision, stored_in_fp8, runtime),
        layout=layout,
        mesh=mesh,
        placement=None if layout.is_plain(config) else placement,
    )


def _treatment(arrays: Arrays, precision: Precision, stored_in_fp8: bool, runtime: Runtime) -> str:
    """Return what became of the weights' format, where it is not the stored one rounded."""
    if precision == "fp8":
        kept, all_of_them = fp8_weights_kept(arrays)
        if kept == all_of_them:
            return ", in FP8 as stored"
        how = f"; {kept} of {all_of_them} arrays as stored" if kept else ""
        return f", quantized to FP8{how}"
    return f", FP8 multiplied out to {np.dtype(runtime.compute_dtype).name}" if stored_in_fp8 else ""
