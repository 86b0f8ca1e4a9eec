"""The command line: parsing, and one line for whatever the user can mend."""

import dataclasses
import errno
import re
import shlex
import sys
from argparse import ArgumentError, HelpFormatter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from backfold.cli import commands
from backfold.cli.evaluation import run_evaluate
from backfold.cli.export import ExportSettings, run_export
from backfold.cli.inference import EmbedSettings, ScoreSettings, run_embed, run_score
from backfold.cli.stats import StatsSettings, run_stats
from backfold.errors import UserError
from backfold.evaluation.evaluate import EvaluateSettings
from backfold.training.config import PretrainConfig
from backfold.training.distribution import refuse_strategy
from backfold.training.progress import is_first_process
from backfold.training.run_folder import DEMO_RUN
from backfold.training.stopping import RunStopped, was_requeued
from backfold.version import __version__

RECIPES = files("backfold") / "recipes"
COMMANDS = (
    "pretrain",
    "evaluate",
    "restore",
    "report",
    "demo",
    "export",
    "embed",
    "score",
    "stats",
)
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
# What may differ between a run and its continuation without changing its result.
FREE_ON_RESUME = {
    "out", "num_workers", "prefetch", "accelerator", "devices", "checkpoint_minutes",
    "keep_checkpoints", "micro_batch", "compile", "num_nodes", "shard_optimizer", "loggers",
}  # fmt: skip
# Commands that are given by their settings alone.
PLAIN: dict[str, tuple[type, Callable[[Any], None]]] = {
    "evaluate": (EvaluateSettings, run_evaluate),
    "export": (ExportSettings, run_export),
    "embed": (EmbedSettings, run_embed),
    "score": (ScoreSettings, run_score),
    "stats": (StatsSettings, run_stats),
}
GO_ON = {
    "pretrain": "`backfold pretrain --resume --out RUN` goes on",
    "demo": "`backfold pretrain --resume --out RUN` goes on",
    "embed": "the same command goes on",
    "score": "the same command goes on",
}


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
    try:
        _run(argv)
    except UserError as error:
        print(f"backfold: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except ArgumentError as error:
        command = f"backfold {argv[0]}" if argv[:1] and argv[0] in COMMANDS else "backfold"
        print(f"backfold: error: {_one_line(error)}; see `{command} --help`", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(
            f"backfold: error: {_one_line(error)}; free space or choose another --out",
            file=sys.stderr,
        )
        return 2
    except RunStopped as stop:
        print(f"backfold: {stop}", file=sys.stderr)
        # Launchers take another process's failure for a reason to kill the first.
        return stop.exit_code if is_first_process() else 0
    except KeyboardInterrupt:
        hint = GO_ON.get(argv[0] if argv else "", "run it again")
        print(f"backfold: interrupted; {hint}", file=sys.stderr)
        return 130
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return re.sub(r'^Parser key "([^"]+)":', lambda match: f"--{match[1].replace('_', '-')}:", text)


def _run(argv: list[str]) -> None:
    parser, parsers = build_parsers()
    command = shlex.join(["backfold", *argv])
    argv = [_with_underscores(argument) for argument in argv]
    if "--strategy" in {argument.partition("=")[0] for argument in argv}:
        refuse_strategy(_value(argv, "--strategy", ""))
    if argv[:1] == ["pretrain"]:
        argv = ["pretrain", *_base_config(argv[1:]), *argv[1:]]
    elif argv[:1] == ["demo"]:
        argv = ["demo", f"--config={recipe_path('demo')}", "--out=runs/demo", *argv[1:]]
    values = parser.parse_args(argv)
    name = values.subcommand
    given = parsers[name].instantiate(values[name])
    if name in ("pretrain", "demo"):
        config = PretrainConfig(**_fields(given, PretrainConfig))
        if name == "demo":
            commands.run_demo(config, command)
            return
        requeued = was_requeued(config.out)
        if given.resume:
            _refuse_changes(config)
        commands.run_pretrain(
            config, given.resume or requeued, given.overwrite and not requeued, command
        )
    elif name in PLAIN:
        settings, run = PLAIN[name]
        run(settings(**_fields(given, settings)))
    elif name == "restore":
        commands.run_restore(
            commands.RestoreSettings(**_fields(given, commands.RestoreSettings)), given.images
        )
    else:
        commands.run_report(given.run, given.out)


def build_parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `backfold`, and those of its commands by name."""
    parser = Parser(
        prog="backfold",
        description="Pretrain vision backbones on unlabelled images, as energy functions.",
        exit_on_error=False,
        version=__version__,
    )
    commands_group = parser.add_subcommands(required=True)
    parsers = {
        "pretrain": _pretrain_parser(),
        "evaluate": _class_parser(EvaluateSettings, "measure a backbone and its energy"),
        "restore": _class_parser(commands.RestoreSettings, "corrupt and restore image files"),
        "report": Parser(exit_on_error=False, description="write one HTML file on a run"),
        "demo": _demo_parser(),
        "export": _class_parser(ExportSettings, "write a backbone for timm, Hugging Face, ONNX"),
        "embed": _class_parser(EmbedSettings, "write a vector for every image"),
        "score": _class_parser(ScoreSettings, "write energy and restoration error of every image"),
        "stats": _class_parser(StatsSettings, "say what a data set looks like"),
    }
    parsers["restore"].add_argument(
        "images", type=Path, nargs="*", help="image files; none takes a few of the run's own data"
    )
    parsers["report"].add_argument(
        "run", type=Path, nargs="?", default=DEMO_RUN, help="a run's folder"
    )
    parsers["report"].add_argument(
        "--out", type=Path | None, default=None, help="the file; none takes RUN/report.html"
    )
    for name, child in parsers.items():
        commands_group.add_subcommand(name, child, help=child.description)
    return parser, parsers


def _class_parser(settings: Any, description: str) -> Parser:
    parser = Parser(exit_on_error=False, description=description)
    names = {field.name for field in dataclasses.fields(settings)}
    parser.add_class_arguments(settings, skip=names & {"overwrite"})
    if "overwrite" in names:
        parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def _pretrain_parser() -> Parser:
    parser = Parser(exit_on_error=False, description="pretrain a backbone on unlabelled images")
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_argument(
        "--recipe", type=str | None, default=None, help=f"shipped YAML: {', '.join(recipe_names())}"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_class_arguments(PretrainConfig)
    return parser


def _demo_parser() -> Parser:
    parser = Parser(
        exit_on_error=False,
        description="pretrain, evaluate and report on the embedded images, in minutes",
    )
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(PretrainConfig)
    return parser


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(
        item.name.removesuffix(".yaml") for item in RECIPES.iterdir() if item.name.endswith(".yaml")
    )


def recipe_path(name: str) -> Path:
    """A shipped recipe's file.

    Raises:
        UserError: there is none of that name.
    """
    if name not in recipe_names():
        raise UserError(f"unknown recipe {name!r}; choose from {', '.join(recipe_names())}")
    return Path(str(RECIPES / f"{name}.yaml"))


def _base_config(arguments: list[str]) -> list[str]:
    """The config that comes before all flags: the run's own, a recipe, or the demo's."""
    given = {argument.partition("=")[0] for argument in arguments}
    if given & {"-h", "--help"}:
        return []
    if "--config" in given:
        _check_settings_file(Path(_value(arguments, "--config", "")))
    if "--resume" in given:
        return [f"--config={_value(arguments, '--out', 'runs/pretrain')}/config.yaml"] * (
            Path(_value(arguments, "--out", "runs/pretrain"), "config.yaml").is_file()
        )
    if "--recipe" in given:
        return [f"--config={recipe_path(_value(arguments, '--recipe', ''))}"]
    if not given & {"--config", "--data", "--backbone"}:
        print("no --data and no --backbone: the demo's recipe on the embedded images",
              file=sys.stderr)  # fmt: skip
        return [f"--config={recipe_path('demo')}", "--out=runs/pretrain"]
    return []


def _check_settings_file(path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; check --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {error}; mend it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; give lines such as `batch_size: 64`")


def _value(arguments: list[str], option: str, default: str) -> str:
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else "".join(arguments[position + 1 : position + 2])
    return default


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _refuse_changes(config: PretrainConfig) -> None:
    from backfold.training.config_file import config_to_dict
    from backfold.training.run_folder import RunFolder, load_checkpoint

    checkpoint = RunFolder(config.out).last_checkpoint
    if not checkpoint.exists():
        return
    before, now = load_checkpoint(checkpoint)["config"], config_to_dict(config)
    changed = [key for key in now if key not in FREE_ON_RESUME and before.get(key) != now[key]]
    if changed:
        raise UserError(
            f"--resume goes on with the run's own settings, and {', '.join(changed)} differ(s); "
            "leave them out, or start a new run with another --out"
        )


def _fields(given: Namespace, settings: Any) -> dict[str, Any]:
    return {field.name: given[field.name] for field in dataclasses.fields(settings)}


if __name__ == "__main__":
    sys.exit(main())
