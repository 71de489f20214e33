"""Serve a trained model over HTTP: `python -m dsjax.serve runs/tiny`, then open http://127.0.0.1:8000."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsjax.inference.settings import EngineSettings, Precision
from dsjax.parallel.hosts import Distributed, errors_of_process, start
from dsjax.serving.settings import ServerSettings
from dsjax.settings import load_options, one_line_errors


@dataclass(frozen=True, kw_only=True)
class Options(ServerSettings, EngineSettings):
    """Serve a model with OpenAI's HTTP interface, and a page to chat with it."""

    path: str
    """Folder of a run, or of weights in Hugging Face's, DeepSeek's or dsjax's own form with a tokenizer.json."""
    ema: bool = False
    """Use the moving average of a run's weights."""
    deployment: str = ""
    """TOML file of `configs/serving`, or its name: how several devices share the model, and settings of the engine, of
    which those given here win; empty for one device."""
    precision: Precision = "auto"
    """Of weights and their products: `fp8` quantizes what is not stored so; `auto` is as stored, where that is fast."""
    distributed: Distributed = field(default_factory=Distributed)

    def __post_init__(self) -> None:
        ServerSettings.__post_init__(self)
        EngineSettings.__post_init__(self)


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    with one_line_errors():
        options = load_options(argv, Options, "serve")
        try:
            from dsjax.serving.run import serve
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("jinja2", "prometheus_client", "starlette", "uvicorn"):
                raise
            raise ValueError(
                f"{error.name} is not installed: install dsjax[serve], or say `uv run --extra serve`"
            ) from None
        start(options.distributed)
        how = {"ema": options.ema, "precision": options.precision}
        with errors_of_process():
            return serve(options.path, options, options, options.deployment, **how)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before it served; afterwards Ctrl-C is a way to end it
        sys.exit(130)
