"""Settings in and out: TOML files and command lines become dataclasses, and dataclasses become TOML.

A setting is a dotted name and a value (`train.steps`, 500); a layer is a dict of them, and a later layer wins:
the model's file, the run's file, the command line. One set of functions checks all three, so that an error reads
the same wherever it was made: one line that gives the name, the value and what would be right.
tyro writes the `--help` pages.
"""

import difflib
import itertools
import json
import os
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

from dsjax.config import Config, ModelConfig, describe, fits

type Layer = dict[str, Any]

SERVING = "serving"
"""Folder of `configs/` with deployments."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a command that has none of its own."""


def load_config(argv: Sequence[str]) -> Config:
    """The run that a command line names: a TOML file and options (`["configs/tiny.toml", "--train.steps", "500"]`).

    Raises:
        ValueError: one line about the first thing that is wrong.
    """
    return load_run(argv, NoOptions, "train")[0]


def load_run[R, T](argv: Sequence[str], options: type[T], command: str, kind: type[R] = Config) -> tuple[R, T]:
    """The run that a command line names, and the command's own options.

    Args:
        argv: a TOML file, or the name of a packaged run (`tiny`), and options in any order.
        options: dataclass of the command's own options, all with defaults; they have no prefix (`--fresh`).
        command: the words behind `python -m dsjax.`, for `--help`.
        kind: what a file describes: a run, or another dataclass with a `model`.

    Raises:
        ValueError: one line about the first thing that is wrong.
        SystemExit: with status 0, after `--help` or `--print-config`.
    """
    own = _kinds(options)
    words, given = _read_words(argv, {**_kinds(kind), **own, "print_config": bool, "help": bool})
    show_help, print_config = (given.pop(name, False) for name in ("help", "print_config"))
    chosen = _build(options, {name: given.pop(name) for name in own if name in given})
    if words[1:]:
        raise ValueError(f"unexpected argument {words[1]!r} after {words[0]!r}: an option begins with --")
    if not words and not show_help:
        raise ValueError("no run is named: give a TOML file, such as configs/tiny.toml, or --help")
    config = _resolve(_find(words[0], "" if kind is Config else SERVING), given, kind) if words else None
    if show_help:
        _show_run_help(options, config, command, kind)
    if print_config:
        print(to_toml(config), end="")
        raise SystemExit(0)
    return config, chosen


def load_options[T](argv: Sequence[str], options: type[T], command: str) -> T:
    """A dataclass from a command line: fields without a default are arguments in their order, the others options.

    Args:
        argv: the words behind the command.
        options: any dataclass whose fields are bool, int, float, str, Literal, tuples or optionals of these.
        command: the words behind `python -m dsjax.`, for `--help`.

    Raises:
        ValueError: one line about the first thing that is wrong.
        SystemExit: with status 0, after `--help`.
    """
    kinds = _kinds(options)
    words, given = _read_words(argv, {**kinds, "help": bool})
    if given.pop("help", False):
        from tyro.conf import PositionalMetavarFromFieldName, PositionalRequiredArgs

        _show_page(options, command, PositionalRequiredArgs, PositionalMetavarFromFieldName)
    required = [name for name in _required(options) if name not in given]
    if words[len(required) :]:
        raise ValueError(f"unexpected argument {words[len(required)]!r}: an option begins with --")
    if required[len(words) :]:
        raise ValueError(f"argument {required[len(words)].upper()} is missing: see --help")
    arguments = {name: _from_words(name, kinds[name], [word]) for name, word in zip(required, words, strict=True)}
    return _build(options, arguments | given)


def load_subcommand(argv: Sequence[str], subcommands: Mapping[str, type], command: str) -> Any:
    """The options of the subcommand that the first word names, as `load_options` reads them.

    Raises:
        ValueError: one line about the first thing that is wrong.
        SystemExit: with status 0, after `--help`.
    """
    match list(argv):
        case ["-h" | "--help", *_]:
            print(f"usage: python -m dsjax.{command} COMMAND ...\n")
            for name, options in subcommands.items():
                what = (options.__doc__ or "").strip().splitlines()[0]
                print(textwrap.fill(what, 100, initial_indent=f"  {name:<14} ", subsequent_indent=" " * 17))
            print(f"\npython -m dsjax.{command} COMMAND --help says more about one.")
            raise SystemExit(0)
        case [name, *rest] if name in subcommands:
            return load_options(rest, subcommands[name], f"{command} {name}")
        case [name, *_]:
            raise ValueError(f"unknown command {name!r}: must be one of {', '.join(subcommands)}")
    raise ValueError(f"no command is named: give one of {', '.join(subcommands)}, or --help")


def load_model_config(name: str) -> ModelConfig:
    """The model of `configs/models/{name}.toml`, or of the TOML file whose path is given.

    Raises:
        ValueError: no such model, or one line about the first thing in its file that is wrong.
    """
    file = Path(name) if name.endswith(".toml") else _find_model(name, [_configs()])
    if file is None:
        raise ValueError(f"model.name = {name!r}: must be one of {', '.join(_names(_configs() / 'models'))}")
    return _build(ModelConfig, {"name": file.stem} | _read_toml(file, ModelConfig))


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as nested plain dicts, lists and scalars, fit for JSON."""

    def plain(value: Any) -> Any:
        return to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value

    return {f.name: plain(getattr(settings, f.name)) for f in fields(settings)}


def from_dict[T](kind: type[T], tree: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`.

    Raises:
        ValueError: one line about a name that `kind` has not, one that is missing, or a wrong value.
    """
    return _build(kind, _flatten(tree, _kinds(kind)))


def to_toml(settings: Any) -> str:
    """The settings as TOML, which `load_config` (a run) or `load_model_config` (a model) reads back as equal."""

    def lines(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, value in table.items():
            if not isinstance(value, dict):
                yield f"{name} = {_toml_value(value)}"
        for name, value in table.items():
            if isinstance(value, dict):
                yield from ("", f"[{prefix}{name}]", *lines(value, f"{prefix}{name}."))

    return "\n".join(lines(to_dict(settings), "")) + "\n"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Inside, an error of the user's (ValueError, OSError) ends the command: one line on stderr, exit status 2."""
    try:
        yield
    except BrokenPipeError:  # whoever reads the output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        print("dsjax:", in_one_line(error), file=sys.stderr)
        raise SystemExit(2) from None


def in_one_line(error: BaseException) -> str:
    """An error in one line: a heading and what stands below it, or the system's file and reason."""
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        character = error.object[error.start]
        return f"the terminal's encoding, {error.encoding}, has no {character!r}: set PYTHONIOENCODING=utf-8"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        files = " -> ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
        return f"{files}: {error.strerror}"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    heading, *details = lines or [type(error).__name__]
    return f"{heading.removesuffix(':')}: {'; '.join(details)}" if details else heading


# Files.


def _configs() -> Path:
    """The folder of the runs and models that come with dsjax: inside the wheel, or beside `dsjax/` in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else packaged.parent.parent / "configs"


def _names(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.toml"))


def is_in(word: str, folder: str, table: str) -> bool:
    """Whether a word names a packaged file of a folder of `configs/`, or a TOML file that has a table."""
    file = Path(word)
    if not file.is_file():
        return file.name == word and (_configs() / folder / f"{word}.toml").is_file()
    try:
        return table in tomllib.loads(file.read_text("utf-8-sig"))
    except (ValueError, OSError):  # whoever reads it next says what is wrong with it
        return False


def _find(word: str, folder: str) -> Path:
    """`configs/tiny.toml` is a file, `tiny` may also be the name of a packaged run, or of another folder's file."""
    packaged = [_configs() / folder / f"{word}.toml"] if Path(word).name == word else []
    for file in (Path(word), *packaged):
        if file.is_file():
            return file
    if Path(word).is_dir():
        raise ValueError(f"{word}: a folder; name a run's TOML file, such as {Path(word) / 'config.toml'}")
    what = "deployment" if folder else "run"
    raise ValueError(f"{word}: no such file, and no packaged {what} ({', '.join(_names(_configs() / folder))})")


def _find_model(name: str, folders: Iterable[Path]) -> Path | None:
    files = (folder / "models" / f"{name}.toml" for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _resolve[R](file: Path, given: Layer, kind: type[R]) -> R:
    """The run of a TOML file and of what the command line gives."""
    layer = _merge(_read_toml(file, kind), given)
    if kind is Config:
        layer["run"] = layer.get("run") or f"runs/{file.stem}"
    name = layer.get("model.name")
    model = _find_model(name, [file.parent, _configs()]) if name else None
    if model:
        layer = _merge({f"model.{key}": value for key, value in _read_toml(model, ModelConfig).items()}, layer)
    elif missing := [key for key in _required(ModelConfig) if f"model.{key}" not in layer]:
        known = ", ".join(sorted({*_names(_configs() / "models"), *_names(file.parent / "models")}))
        lacks = f", and lacks {', '.join(missing[:3])}{' ...' if missing[3:] else ''}"
        raise ValueError(
            f"model.name = {name!r}: must be one of {known}, or [model] must hold every size itself{lacks}"
        )
    return _build(kind, layer)


def _read_toml(file: Path, kind: type) -> Layer:
    try:
        text = file.read_bytes().decode("utf-8-sig")  # some editors put a mark of the encoding in front
        return _flatten(tomllib.loads(text), _kinds(kind))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8, as TOML is") from None
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{file}: {reason}") from None


# Layers.


def _table(kind: Any) -> type | None:
    """The dataclass that an annotation (`DataConfig`, `YarnConfig | None`) holds."""
    return next((part for part in (kind, *get_args(kind)) if is_dataclass(part)), None)


def _kinds(settings: type, prefix: str = "") -> dict[str, Any]:
    """Annotations of all settings of a dataclass by dotted name, those of its tables and the tables themselves."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(settings).items():
        kinds[prefix + name] = kind
        if table := _table(kind):
            kinds |= _kinds(table, f"{prefix}{name}.")
    return kinds


def _required(settings: type) -> list[str]:
    return [f.name for f in fields(settings) if f.default is MISSING and f.default_factory is MISSING]


def _flatten(tree: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = "") -> Layer:
    layer: Layer = {}
    for key, value in tree.items():
        name = prefix + key
        if name not in kinds:
            raise ValueError(f"unknown setting {name}{_nearest(name, kinds)}")
        if isinstance(value, Mapping) and _table(kinds[name]):
            layer |= _flatten(value, kinds, f"{name}.")
        else:
            layer[name] = _checked(name, kinds[name], value)
    return layer


def _checked(name: str, kind: Any, value: Any) -> Any:
    """A value from TOML, JSON or the command line as its annotation has it: tuples for lists, floats for integers."""
    if isinstance(value, list):
        value = tuple(value)
    if value in ("none", "None") and NoneType in get_args(kind):  # None is what help pages show
        value = None
    if not fits(value, kind):
        raise ValueError(f"{name} = {value!r}: must be {describe(kind)}")
    if kind is float or get_args(kind)[:1] == (float,):
        value = tuple(map(float, value)) if isinstance(value, tuple) else None if value is None else float(value)
    return value


def _merge(*layers: Layer) -> Layer:
    """Later layers win; a table replaces a `none`, and `none` a table."""
    merged: Layer = {}
    for layer in layers:
        for name in layer:
            for other in [old for old in merged if old.startswith(f"{name}.") or name.startswith(f"{old}.")]:
                del merged[other]
        merged |= layer
    return merged


def _build[T](settings: type[T], layer: Layer, prefix: str = "") -> T:
    values: Layer = {}
    kinds = get_type_hints(settings)
    for f in fields(settings):
        name, table = prefix + f.name, _table(kinds[f.name])
        if name in layer:
            values[f.name] = layer[name]
        elif table and (f.name in _required(settings) or any(key.startswith(f"{name}.") for key in layer)):
            values[f.name] = _build(table, layer, f"{name}.")
        elif f.name in _required(settings):
            raise ValueError(f"{name} is missing: it must be {describe(kinds[f.name])}")
    return settings(**values)


def _nearest(name: str, names: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """`; did you mean ...?`: a setting of the same last word in another table, or the most similar one."""
    last_words = {other: other.rpartition(".")[2] for other in names}
    last = name.rpartition(".")[2]
    similar = [
        *(other for other, word in last_words.items() if word == last),
        *difflib.get_close_matches(name, last_words, 1),
        *(
            other
            for close in difflib.get_close_matches(last, last_words.values(), 1)
            for other, word in last_words.items()
            if word == close
        ),
    ]
    return f"; did you mean {spell(similar[0])}?" if similar else ""


def _option(name: str) -> str:
    """An option as help pages spell it: `--train.batch-size`."""
    return "--" + name.replace("_", "-")


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    # A JSON string is a TOML string, but for DEL, which TOML wants escaped. repr(1e-06) and repr(inf) are TOML too.
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()


# The command line.


def _read_words(argv: Sequence[str], kinds: Mapping[str, Any]) -> tuple[list[str], Layer]:
    """Split a command line into its arguments and its options, checked, by setting name."""
    arguments: list[str] = []
    layer: Layer = {}
    rest = ["--help" if word == "-h" else word for word in argv]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            arguments.append(word)
            continue
        option, assigned, text = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        table, dot, last = name.rpartition(".")
        switch = table + dot + last.removeprefix("no_")
        if name not in kinds and kinds.get(switch) is bool and not assigned:
            layer[switch] = False
            continue
        if name not in kinds:
            negated = [_negated(name) for name, kind in kinds.items() if kind is bool] if switch != name else []
            raise ValueError(f"unknown option {option}{_nearest(name, [*kinds, *negated], _option)}")
        kind = kinds[name]
        if assigned:
            words = text.split(",") if get_origin(kind) is tuple else [text]
        else:
            words = _value_words(kind, rest)
            del rest[: len(words)]
        if not words and kind is not bool:
            raise ValueError(f"{option} has no value: it must be {describe(kind)}")
        layer = _merge(layer, {name: _from_words(name, kind, words or ["true"])})
    return arguments, layer


def _negated(name: str) -> str:
    """The name that switches a setting off: `checkpoint.no_resume`."""
    table, dot, last = name.rpartition(".")
    return f"{table}{dot}no_{last}"


def _value_words(kind: Any, rest: Iterable[str]) -> list[str]:
    """The words behind an option that are its value: as many as its annotation has room for."""
    words = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
    if kind is bool:
        return words[:1] if words[:1] in (["true"], ["false"]) else []
    if get_origin(kind) is tuple:
        return words if Ellipsis in get_args(kind) else words[: len(get_args(kind))]
    return words[:1]


def _from_words(name: str, kind: Any, words: list[str]) -> Any:
    """The value that words of a command line spell; the words themselves where they spell none, to be refused."""

    def spelled(word: str, kind: Any) -> Any:
        kind = next((part for part in get_args(kind) if part is not NoneType), kind)
        if kind is bool:
            return {"true": True, "false": False}.get(word, word)
        try:
            return kind(word) if kind in (int, float) else word
        except ValueError:
            return word

    values = [spelled(word, kind) for word in words]
    return _checked(name, kind, values if get_origin(kind) is tuple else values[0])


# tyro keeps paragraphs apart, but does not break long lines.
_ORDER = """Settings come from the model's TOML file, then the run's, then the options: the last one wins.

Name a run before --help to see its values."""


def _show_run_help(options: type, run: Any, command: str, kind: type) -> NoReturn:
    """The help page of a command that reads a run; once a run is named, the values shown are that run's."""
    from tyro.conf import AvoidSubcommands, Positional, arg

    config = Annotated[str, Positional, arg(metavar="CONFIG", help="TOML file of a run, or a packaged run's name.")]
    print_config = Annotated[bool, arg(help="Print all settings as TOML, and stop.")]
    settings = Annotated[kind, arg(name="")]
    shown = _flatten(to_dict(run), _kinds(kind)) if run else {}
    absent = {
        name: _table(part)
        for name, part in _kinds(kind).items()
        if _table(part) and get_args(part) and not any(key.startswith(f"{name}.") for key in shown)
    }
    page = make_dataclass(
        "Run",
        [
            ("config", config),
            ("print_config", print_config, False),
            ("options", Annotated[options, arg(name="")]),
            ("settings", settings, run) if run else ("settings", settings),
            *((name.replace(".", "_"), Annotated[table, arg(name=name)]) for name, table in absent.items()),
        ],
        kw_only=True,
        namespace={"__doc__": f"{options.__doc__}\n\n{_ORDER}"},
    )
    _show_page(page, command, AvoidSubcommands)


def _show_page(page: type, command: str, *markers: Any) -> NoReturn:
    import tyro
    from tyro.conf import FlagCreatePairsOff

    tyro.cli(page, args=["--help"], prog=f"python -m dsjax.{command}", config=(FlagCreatePairsOff, *markers))
    raise SystemExit(0)
