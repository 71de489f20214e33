"""A trained model from disk, ready to generate: a run, or released weights in any form that `checkpoint/` reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import PyTree

from dsjax.checkpoint.forms import open_checkpoint
from dsjax.checkpoint.huggingface import load
from dsjax.checkpoint.native import Checkpoints, NoUsableCheckpoint
from dsjax.checkpoint.sources import RUN_FOLDER
from dsjax.config import ModelConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.inference.layout import Layout, mesh_of, placed, weight_specs
from dsjax.inference.weights import arranged, first_placement
from dsjax.model.layers import cast_weights
from dsjax.model.layout import stack
from dsjax.model.transformer import abstract_parameters
from dsjax.parallel.placement import Placement
from dsjax.runtime import Runtime, compute_dtype
from dsjax.settings import load_config


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
            ValueError: the layout is none for the model, or there are too few devices.
        """
        layout.check(self.config)
        mesh, placement = mesh_of(layout, devices), first_placement(self.config, layout)
        weights = arranged(
            self.params, self.config, layout, placement.expert_of_slot, self.runtime.compute_dtype, fp8=fp8
        )
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

        config = replace(self.config, num_nextn_predict_layers=count)
        return replace(self, config=config, params=first(self.params), biases=first(self.biases))


def load_model(path: str | Path, *, ema: bool = False, mtp: bool = False) -> Model:
    """Load the newest undamaged checkpoint of a run, or released weights.

    Args:
        path: folder of a run, or of weights with their config and `tokenizer.json`.
        ema: whether to take the moving average of a run's weights.
        mtp: whether to load the model's MTP modules too, which draft tokens: see `EngineSettings.speculate`.

    Raises:
        ValueError: no such folder; neither a run nor weights; no checkpoint yet, or none that is whole; no average;
            no tokenizer, or one with more tokens than the model.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    model = (_load_run if (path / "config.toml").is_file() else _load_weights)(path, ema, mtp)
    if model.tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{path / 'tokenizer.json'} has {model.tokenizer.vocab_size} tokens: must be at most the model's "
            f"vocab_size = {model.config.vocab_size}"
        )
    return model


def _load_run(path: Path, ema: bool, mtp: bool) -> Model:
    run = load_config([str(path / "config.toml")])
    if ema and not run.train.ema_decay:
        raise ValueError(f"{path}: the run keeps no average of its weights (train.ema_decay = 0); leave --ema out")
    if not (path / RUN_FOLDER).is_dir():
        raise ValueError(f"{path}: the run has no checkpoint yet")
    config = run.model if mtp else replace(run.model, num_nextn_predict_layers=0)
    params, biases = abstract_parameters(config)
    tree = "ema" if ema else "params"
    try:
        with Checkpoints(path / RUN_FOLDER) as checkpoints:
            step, found, _ = checkpoints.restore({tree: params, "biases": biases}, partial=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: the run has no checkpoint yet") from None
    except NoUsableCheckpoint as error:
        raise ValueError(str(error)) from error
    tokenizer = _load_tokenizer(path)
    runtime = Runtime(compute_dtype=compute_dtype(run.precision))
    return Model(
        config,
        runtime,
        *_ready(found[tree], found["biases"], config, runtime),
        tokenizer,
        # In the packed sequences that a run learns from, a document follows the end of another.
        opening=tokenizer.eos,
        context=run.data.sequence_length,
        origin=f"step {step} of {path}" + (", averaged weights" if ema else ""),
    )


def _load_weights(path: Path, ema: bool, mtp: bool) -> Model:
    if ema:
        raise ValueError(f"{path}: only a run has averaged weights, and this is none; leave --ema out")
    source = open_checkpoint(path, mtp=mtp)
    try:
        tokenizer, config, released = _load_tokenizer(path), source.config, source.huggingface or {}
        runtime = Runtime(compute_dtype=compute_dtype("auto"))
        weights = load(source, dtype=runtime.compute_dtype)
    finally:
        source.close()
    yarn = config.rope_scaling
    made_for = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else 4096
    return Model(
        config,
        runtime,
        *_ready(weights.params, weights.biases, config, runtime),
        tokenizer,
        opening=tokenizer.eos if tokenizer.bos is None else tokenizer.bos,
        context=released.get("max_position_embeddings", made_for),
        origin=str(path),
    )


def _load_tokenizer(path: Path) -> Tokenizer:
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path}: no tokenizer.json, without which a prompt cannot be read")
    return Tokenizer.load(path)


def _ready(params: PyTree, biases: PyTree, config: ModelConfig, runtime: Runtime) -> tuple[PyTree, PyTree]:
    arrange = jax.jit(lambda params: cast_weights(stack(params, config), runtime.compute_dtype))
    return arrange(params), stack(biases, config)
