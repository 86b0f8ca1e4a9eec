"""The command line: parsing, and one line for whatever the user can mend.

Torch takes seconds to import: what can be answered or refused without it is, before it is loaded.
"""

import argparse
import ast
import dataclasses
import difflib
import errno
import json
import re
import shlex
import sys
from argparse import ArgumentError, HelpFormatter
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser

from backfold.data.files import refuse_missing
from backfold.errors import RunStopped, UserError
from backfold.files import refuse_missing_run
from backfold.version import __version__

PACKAGE = Path(str(files("backfold")))
RECIPES = PACKAGE / "recipes"
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
# What `pretrain --help` shows; `--help all` shows the rest.
USUAL = {
    "help", "config", "recipe", "resume", "overwrite", "mixture", "data", "out", "backbone",
    "image_size", "pretext", "epochs", "batch_size", "precision", "devices", "init", "seed",
}  # fmt: skip
HELP = ("-h", "--help")
# What jsonargparse says of types, and for people.
PLAINER = (
    (r"<class '([\w.]+)'>|typing\.", r"\1"),
    (r"Does not .*? Subtypes: \[(.*)\] Errors: .* Given value: ", r"Expected \1. Got value: "),
    (r"(Expected a (?:list|tuple)\. Got value: )(\S+)$", r"\1\2; write '[\2]'"),
)


class Command(NamedTuple):
    """One line on what it does; its settings, ``module.Class`` below `backfold`, imported in use.

    Its function is ``run_COMMAND`` in the module of the settings, or else in `cli.commands`.
    """

    description: str
    settings: str
    positional: tuple[str, str] | None = None  # a field that is given without a name, and its help


IMAGES = ("images", "image files; none takes a few of the run's own data")
COMMANDS = {
    "pretrain": Command(
        "pretrain a backbone on unlabelled images", "training.config.PretrainConfig"
    ),
    "evaluate": Command(
        "measure a backbone and its energy", "evaluation.evaluate.EvaluateSettings"
    ),
    "restore": Command("corrupt and restore image files", "cli.commands.RestoreSettings", IMAGES),
    "sample": Command("draw images from a run that removes noise", "cli.commands.SampleSettings"),
    "report": Command(
        "write one HTML file on a run", "cli.commands.ReportSettings", ("run", "a run's folder")
    ),
    "demo": Command(
        "pretrain, evaluate and report on the embedded images, in minutes",
        "training.config.PretrainConfig",
    ),
    "export": Command(
        "write a backbone for timm, Hugging Face, ONNX", "cli.commands.ExportSettings"
    ),
    "embed": Command("write a vector for every image", "cli.inference.EmbedSettings"),
    "score": Command("write how strange every image is, and where", "cli.inference.ScoreSettings"),
    "stats": Command("say what a data set looks like", "data.survey.StatsSettings"),
}
# Further options than their settings.
OPTIONS = {
    "pretrain": {"config", "mixture", "strategy", "recipe", "resume", "overwrite"},
    "demo": {"config", "mixture", "strategy"},
}
# After an interruption.
GO_ON = {
    **dict.fromkeys(OPTIONS, "`backfold pretrain --resume --out RUN` goes on"),
    **dict.fromkeys(("embed", "score"), "the same command goes on"),
}
# Evaluate takes other people's backbones too.
OF_RUNS = ("restore", "sample", "export", "embed", "score")
OVERVIEW = "\n".join(
    [
        "usage: backfold COMMAND [OPTIONS]",
        "",
        "Pretrain vision backbones on unlabelled images, as energy functions.",
        "",
        "commands:",
        *(f"  {name:<10}{command.description}" for name, command in COMMANDS.items()),
        "",
        "`backfold COMMAND --help` has a command's options, `backfold --version` the version.",
    ]
)


class Parser(ArgumentParser):
    """Options with dashes in the help; either dashes or underscores are taken."""

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """The help text."""
        return re.sub(
            r"--(?!print_config)[a-z][\w.]*",
            lambda match: match[0].replace("_", "-"),
            super().format_help(formatter),
        )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv[:1] and argv[0] in COMMANDS else ""
    try:
        _run(argv)
    except UserError as error:
        return _fail(error)
    except ArgumentError as error:
        return _fail(error, f"; see `{_help(command)}`")
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        return _fail(error, "; free space or choose another --out")
    except RunStopped as stop:
        from backfold.training.log import is_first_process

        print(f"backfold: {stop}", file=sys.stderr)
        # Launchers take another process's failure for a reason to kill the first.
        return stop.exit_code if is_first_process() else 0
    except (RuntimeError, MemoryError) as error:
        from backfold.memory import out_of_memory

        if not out_of_memory(error):
            raise
        return _fail(UserError("out of memory; give fewer images at once, or --accelerator cpu"))
    except KeyboardInterrupt:
        print(f"backfold: interrupted; {GO_ON.get(command, 'run it again')}", file=sys.stderr)
        return 130
    return 0


def _fail(error: Exception, remedy: str = "") -> int:
    text = " ".join(str(error).split())
    text = re.sub(r'^Parser key "([^"]+)":', lambda match: f"--{_dashed(match[1])}:", text)
    for pattern, words in PLAINER:
        text = re.sub(pattern, words, text)
    print(f"backfold: error: {text}{remedy}", file=sys.stderr)
    return 2


def _run(argv: list[str]) -> None:
    if argv[:1] in (["--help"], ["-h"], ["--version"]):
        print(__version__ if argv[0] == "--version" else OVERVIEW)
        return
    if not argv or argv[0] not in COMMANDS:
        raise UserError(
            f"there is no command {' '.join(argv[:1])!r}; choose from {', '.join(COMMANDS)}"
        )
    name, line = argv[0], shlex.join(["backfold", *argv])
    # Options may be written with dashes or underscores.
    arguments = [
        re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), argument)
        for argument in argv[1:]
    ]
    if set(HELP) & set(arguments):
        build_parser(name, usual="all" not in arguments).print_help()
        return
    # What stands behind each option that is given.
    options = {}
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument.startswith("--") and argument[2:]:
            option, equals, value = argument[2:].partition("=")
            options[option] = value if equals or following.startswith("--") else following
    _refuse_early(name, options)
    if name in OPTIONS:
        configs, flags = _configs_first(arguments)
        arguments = [*_base_config(name, options), *configs, *flags, *_mixture(options)]
    parser, settings = build_parser(name), _settings(name)
    given = _parsed(parser, name, arguments)
    values = {field.name: given[field.name] for field in dataclasses.fields(settings)}
    module = settings.__module__ if ".cli." in settings.__module__ else "backfold.cli.commands"
    run = getattr(import_module(module), f"run_{name}")
    if name == "pretrain":
        run(settings(**values), given.resume, given.overwrite, line)
    elif name == "demo":
        run(settings(**values), line)
    else:
        run(settings(**values))


def _parsed(parser: Parser, name: str, arguments: list[str]) -> Any:
    """What is given; an option that is none is named with the nearest one."""
    try:
        return parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        unknown = re.search(r"[Uu]nrecognized arguments: ([^\s=]+)", str(error))
        if unknown is None:
            raise
        known = [option[2:] for option in parser._option_string_actions if option[:2] == "--"]
        hint = _hint(name, unknown[1].lstrip("-"), known)
        said = f"{unknown[1]!r} is no option, and none takes it; {hint}"
        raise UserError(said) from error


def _settings(name: str) -> Any:
    module, _, attribute = COMMANDS[name].settings.rpartition(".")
    return getattr(import_module(f"backfold.{module}"), attribute)


def build_parser(name: str, *, usual: bool = False) -> Parser:
    """The parser of a command.

    Args:
        name: the command's.
        usual: show in the help of `pretrain` and `demo` what is usually set.
    """
    command, settings = COMMANDS[name], _settings(name)
    parser = Parser(prog=f"backfold {name}", exit_on_error=False, description=command.description)
    names = {field.name for field in dataclasses.fields(settings)}
    if name in OPTIONS:
        parser.add_argument("--config", action="config", help="YAML file; flags override it")
        if "recipe" in OPTIONS[name]:
            recipes = f"shipped YAML: {', '.join(recipe_names())}"
            parser.add_argument("--recipe", type=str | None, default=None, help=recipes)
            parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
            parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
        mixture = "tasks and their weights, such as masking=1,sorting=0.5"
        mixture += "; sets pretext and tasks.mixture"
        parser.add_argument("--mixture", type=str | None, default=None, help=mixture)
    apart = {"overwrite", *(command.positional or ())[:1]} & names
    parser.add_class_arguments(settings, skip=apart)
    if "overwrite" in names:
        parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    if command.positional is not None:
        field, text = command.positional
        default = getattr(settings, field, [])
        nargs = "?" if default else "*"
        parser.add_argument(field, type=Path, nargs=nargs, default=default, help=text)
    if name == "demo":
        recipe = parser.parse_args([f"--config={recipe_path(name)}", "--out=runs/demo"])
        parser.set_defaults({key: value for key, value in recipe.items() if key != "config"})
    if usual and name in OPTIONS:
        for group in parser._action_groups:
            for action in group._group_actions:
                if action.dest not in USUAL:
                    action.help = argparse.SUPPRESS
            if all(action.help == argparse.SUPPRESS for action in group._group_actions):
                group.title = group.description = None
        parser.epilog = "`--help all` shows every setting."
    return parser


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """A shipped recipe's file.

    Raises:
        UserError: there is none of that name.
    """
    if name not in recipe_names():
        raise UserError(f"unknown recipe {name!r}; choose from {', '.join(recipe_names())}")
    return RECIPES / f"{name}.yaml"


def _configs_first(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Configs and recipes in their order, as configs, and all else, which overrides them.

    A run that goes on has its own settings, whatever recipe it began with.
    """
    configs, flags, rest = [], [], iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option not in ("--config", "--recipe"):
            flags.append(argument)
            continue
        value = value if equals else next(rest, "")
        if not value or value.startswith("--"):
            raise UserError(f"{option} names nothing; give it a file's or a recipe's name")
        path = Path(value) if option == "--config" else recipe_path(value)
        _check_config(path)
        if option == "--config" or "--resume" not in arguments:
            configs.append(f"--config={path}")
    return configs, flags


def _check_config(path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; check --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {error}; mend it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; give lines such as `batch_size: 64`")


def _base_config(name: str, options: Mapping[str, str]) -> list[str]:
    """The config that comes before all others: the run's own, or the demo's."""
    if "resume" in options:
        config = Path(options.get("out", "runs/pretrain"), "config.yaml")
        return [f"--config={config}"] if config.is_file() else []
    if name != "demo" and not options.keys() & {"config", "recipe", "data", "backbone"}:
        print(
            "no --data and no --backbone: the demo's recipe on the embedded images", file=sys.stderr
        )
        return [f"--config={recipe_path('demo')}", "--out=runs/pretrain"]
    return []


def _mixture(options: Mapping[str, str]) -> list[str]:
    """The two settings that ``--mixture a=1,b=2`` stands for."""
    text = options.get("mixture")
    if not text:
        return []
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        weights = {name.strip(): float(weight) for name, _, weight in pairs}
    except ValueError:
        raise UserError(f"mixture is {text!r}; give for instance masking=1,sorting=0.5") from None
    return ["--mixture=null", "--pretext=mixture", f"--tasks.mixture={json.dumps(weights)}"]


def _refuse_early(name: str, options: Mapping[str, str]) -> None:
    """Refuse misspelt options and data that are not there before torch is loaded.

    Raises:
        UserError: either of them.
    """
    known = _field_names(COMMANDS[name].settings) | OPTIONS.get(name, set()) | {"print_config"}
    for option in sorted(options):
        if option.split(".")[0] not in known:
            hint = _hint(name, option, known)
            raise UserError(f"there is no option --{_dashed(option)}; {hint}")
    if "strategy" in options:
        raise UserError(
            f"--strategy {options['strategy']}: several processes run on DDP, as FSDP has no "
            "second derivative; leave it out; --shard-optimizer true helps where memory is short"
        )
    if options.get("data", "null") not in ("", "null"):
        refuse_missing(options["data"])
    if options.get("checkpoint") and name in OF_RUNS:
        refuse_missing_run(Path(options["checkpoint"]))


def _field_names(settings: str) -> set[str]:
    """A dataclass's fields and those of its bases in the same module, read from its source."""
    module, _, name = settings.rpartition(".")
    tree = ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found, bases = set(), [name]
    while bases:
        node = classes[bases.pop()]
        bases += [base.id for base in node.bases if isinstance(base, ast.Name)]
        found |= {
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
    return found


def _hint(command: str, option: str, known: Iterable[str]) -> str:
    """What may have been meant, and where to look."""
    nearest = difflib.get_close_matches(option, known, n=1)
    return (f"nearest: --{_dashed(nearest[0])}; " if nearest else "") + f"see `{_help(command)}`"


def _help(command: str) -> str:
    return f"backfold {command} --help{' all' if command in OPTIONS else ''}"


def _dashed(name: str) -> str:
    return name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
