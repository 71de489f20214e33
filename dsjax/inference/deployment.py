"""A deployment: a model, the units of devices that serve it, and how much each does at once; a file in
`configs/serving`."""

from dataclasses import dataclass, field, fields, replace
from typing import Literal

import jax

from dsjax.config import ModelConfig
from dsjax.inference.layout import Layout, check_engine
from dsjax.inference.settings import EngineSettings, Precision
from dsjax.parallel.hosts import processes, simulate_devices
from dsjax.settings import NoOptions, load_run

Work = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What `python -m dsjax.plan configs/serving/...` plans and `--deployment` of the other commands serves."""

    model: ModelConfig
    """The model."""
    precision: Literal["auto", "bf16", "fp8"] = "auto"
    """Format of weights and their products: `fp8` has those of attention, feed-forward layers and experts in FP8;
    `auto` is as `load_model` has it, and in plans 16 bits."""
    work: Work = "decode"
    """What a unit is for, where prompts are read and answers written by different ones; a unit can do both."""
    layout: Layout = field(default_factory=Layout)
    """Devices."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """Requests and memory of the whole unit."""

    @property
    def served(self) -> ModelConfig:
        """The model with as many MTP modules as the engine uses."""
        modules = min(self.engine.speculate, self.model.num_nextn_predict_layers)
        return replace(self.model, num_nextn_predict_layers=modules)

    def __post_init__(self) -> None:
        """Raises ValueError for a layout that the model, or settings that the layout cannot have."""
        self.layout.check(self.model)
        check_engine(self.engine, self.layout)


def chosen(name: str, engine: EngineSettings, precision: Precision) -> tuple[Layout, EngineSettings, Precision]:
    """Return layout, engine's settings and precision of a deployment; or of a single device, if none is named.

    Args:
        name: a file, or one of `configs/serving`; its model is only for plans.
        engine: what is set here, other than the defaults, wins; slots are rounded up to a multiple of the groups.
        precision: wins, too.

    Raises:
        ValueError: no such file, something wrong in it, or settings that its layout cannot have.
    """
    if not name:
        return Layout(), engine, precision
    deployment, _ = load_run([name], NoOptions, "serve", Deployment)
    given = {f.name: value for f in fields(EngineSettings) if (value := getattr(engine, f.name)) != f.default}
    settings, groups = replace(deployment.engine, **given), deployment.layout.groups
    settings = replace(settings, slots=-(-settings.slots // groups) * groups)
    check_engine(settings, deployment.layout)
    return deployment.layout, settings, deployment.precision if precision == "auto" else precision


def take_devices(layout: Layout) -> None:
    """Let this process have its part of a unit's devices, which a CPU simulates; all processes of the run share them.

    Raises:
        ValueError: the processes cannot share them, or have others.
    """
    count = processes()
    if layout.devices % count:
        hint = "" if layout.devices > 1 else "; name a --deployment that has several"
        raise ValueError(
            f"layout: {layout.devices} device{'s' if layout.devices > 1 else ''} cannot be divided among {count} "
            f"processes{hint}"
        )
    simulate_devices(layout.devices // count)
    if count > 1 and jax.device_count() != layout.devices:
        raise ValueError(
            f"layout: {layout.devices} devices, and the {count} processes have {jax.device_count()}: must be as many"
        )
