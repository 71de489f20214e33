"""Plan: `python -m dsjax.plan configs/v3_671b.toml` says what a run will take, memory and time, before it runs; and of
a file in `configs/serving` what a deployment will."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsjax.config import Config
from dsjax.planning.chips import ChipName
from dsjax.settings import SERVING, is_in, load_run, one_line_errors


@dataclass(frozen=True)
class Plan:
    """Say what a run needs of each device, how long its steps will take, and what its pipeline does; nothing runs."""

    chip: ChipName = "h800"
    """Device to plan for; the rates are measured on `h800` and scaled to others by their data sheets."""
    devices: int = 0
    """How many of them: with more or fewer copies of the experts, `mesh.data`, than the run says; 0 for as it says."""
    json: bool = False
    """Whether to print JSON."""
    picture: str = ""
    """PNG or SVG file to draw memory by rank and the step's timeline into."""
    draw: str = ""
    """SVG file to draw the pipeline's schedule into."""
    ticks: bool = False
    """Whether that is of the compiled program's ticks, rather than of every op as early as it can run."""
    compile: bool = False
    """Compile the step for that many GPUs that are not there, and show XLA's own figures; needs the extra cuda13."""

    def __post_init__(self) -> None:
        if self.ticks and not self.draw:
            raise ValueError("ticks = True: is about the picture of the schedule, whose file --draw names")
        if self.devices < 0:
            raise ValueError(f"devices = {self.devices}: must be at least 1, or 0 for as many as the run says")
        for name in ("picture", "draw"):
            if (file := getattr(self, name)) and not Path(file).parent.is_dir():
                raise ValueError(f"{name} = {file!r}: there is no folder {str(Path(file).parent)!r}")
        if self.picture and Path(self.picture).suffix not in (".png", ".svg"):
            raise ValueError(f"picture = {self.picture!r}: must end in .png or .svg")


def plan(config: Config, options: Plan) -> None:
    """Print the plan of a run, and draw its pictures."""
    if config.mesh.pipe == 1 and options.draw:
        raise ValueError(f"draw = {options.draw!r}: there is no pipeline, mesh.pipe = 1")
    import jax

    jax.config.update("jax_platforms", "cpu")  # plans are made where there is no accelerator, and beside its users
    from dsjax.planning.aot import HOPPER, can_compile_for_gpus
    from dsjax.planning.report import as_dict, lines, on_devices, report_of

    if options.compile and not can_compile_for_gpus():
        raise ValueError("compile = True: needs JAX's CUDA plugin, and no GPU: uv run --extra cuda13 ...")
    if options.compile and options.chip not in HOPPER:
        raise ValueError(f"compile = True with chip = {options.chip!r}: must be one of {', '.join(HOPPER)}")
    config = on_devices(config, options.devices) if options.devices else config
    report = report_of(config, options.chip)
    if options.draw:
        from dsjax.pipeline.draw import draw

        Path(options.draw).write_text(draw(report.models["program"].schedule, compiled=options.ticks), "utf-8")
    if options.picture:
        from dsjax.planning.pictures import draw_plan

        draw_plan(report, Path(options.picture))
    compiled = None
    if options.compile:
        from dsjax.planning.compiled import compile_step

        compiled = compile_step(config, options.chip)
    if options.json:
        print(json.dumps(as_dict(report) | ({"compiled": compiled.as_dict()} if compiled else {}), indent=2))
        return
    print("\n".join(lines(report)))
    if compiled:
        print("\n".join(["", *compiled.lines(report.memory)]))


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    with one_line_errors():
        if argv and is_in(argv[0], SERVING, "layout"):
            from dsjax.planning.serving_report import show_plan

            show_plan(argv)
        else:
            plan(*load_run(argv, Plan, "plan"))


if __name__ == "__main__":
    main(sys.argv[1:])
