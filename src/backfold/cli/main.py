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
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from backfold.data.files import refuse_missing
from backfold.errors import RunStopped, UserError
from backfold.files import refuse_missing_run
from backfold.version import __version__

PACKAGE = Path(str(files("backfold")))
RECIPES = PACKAGE / "recipes"
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
# What may differ between a run and its continuation without changing its result.
FREE_ON_RESUME = {
    "out", "num_workers", "prefetch", "accelerator", "devices", "checkpoint_minutes",
    "keep_checkpoints", "micro_batch", "compile", "num_nodes", "shard_optimizer", "loggers",
}  # fmt: skip
# What `pretrain --help` shows; `--help all` shows the rest.
USUAL = {
    "help", "config", "recipe", "resume", "overwrite", "mixture", "data", "out", "backbone",
    "image_size", "pretext", "epochs", "batch_size", "precision", "devices", "init", "seed",
}  # fmt: skip
HELP = ("-h", "--help")


@dataclass(frozen=True)
class Command:
    """What a command does.

    Args:
        description: one line.
        settings: ``module.Class`` below `backfold`, imported when the command is used.
        run: the function of these settings, in `backfold.cli`, likewise.
        positional: fields of the settings that are given without a name, and their help.
        go_on: what to do after an interruption.
        options: further ones than the settings.
    """

    description: str
    settings: str
    run: str
    positional: tuple[str, str] | None = None
    go_on: str = "run it again"
    options: frozenset[str] = frozenset()


RESUMES = "`backfold pretrain --resume --out RUN` goes on"
AGAIN = "the same command goes on"
DEMO = frozenset({"config", "mixture", "strategy"})
PRETRAIN = DEMO | {"recipe", "resume", "overwrite"}
OF_RUNS = ("restore", "export", "embed", "score")  # evaluate takes other people's backbones too
COMMANDS = {
    "pretrain": Command(
        "pretrain a backbone on unlabelled images",
        "training.config.PretrainConfig",
        "commands.run_pretrain",
        go_on=RESUMES,
        options=PRETRAIN,
    ),
    "evaluate": Command(
        "measure a backbone and its energy",
        "evaluation.evaluate.EvaluateSettings",
        "evaluation.run_evaluate",
    ),
    "restore": Command(
        "corrupt and restore image files",
        "cli.commands.RestoreSettings",
        "commands.run_restore",
        ("images", "image files; none takes a few of the run's own data"),
    ),
    "report": Command(
        "write one HTML file on a run",
        "cli.commands.ReportSettings",
        "commands.run_report",
        ("run", "a run's folder"),
    ),
    "demo": Command(
        "pretrain, evaluate and report on the embedded images, in minutes",
        "training.config.PretrainConfig",
        "commands.run_demo",
        go_on=RESUMES,
        options=DEMO,
    ),
    "export": Command(
        "write a backbone for timm, Hugging Face, ONNX",
        "cli.export.ExportSettings",
        "export.run_export",
    ),
    "embed": Command(
        "write a vector for every image",
        "cli.inference.EmbedSettings",
        "inference.run_embed",
        go_on=AGAIN,
    ),
    "score": Command(
        "write energy and restoration error of every image",
        "cli.inference.ScoreSettings",
        "inference.run_score",
        go_on=AGAIN,
    ),
    "stats": Command(
        "say what a data set looks like", "cli.stats.StatsSettings", "stats.run_stats"
    ),
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
    command = argv[0] if argv[:1] and argv[0] in COMMANDS else ""
    try:
        _run(argv)
    except UserError as error:
        return _fail(error)
    except ArgumentError as error:
        return _fail(error, f"; see `{' '.join(['backfold', command]).strip()} --help`")
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
        hint = COMMANDS[command].go_on if command else "run it again"
        print(f"backfold: interrupted; {hint}", file=sys.stderr)
        return 130
    return 0


def _fail(error: Exception, remedy: str = "") -> int:
    text = " ".join(str(error).split())
    text = re.sub(r'^Parser key "([^"]+)":', lambda match: f"--{_dashed(match[1])}:", text)
    print(f"backfold: error: {text}{remedy}", file=sys.stderr)
    return 2


def _run(argv: list[str]) -> None:
    command = shlex.join(["backfold", *argv])
    if argv[:1] in (["--help"], ["-h"], ["--version"]):
        print(__version__ if argv[0] == "--version" else overview())
        return
    if not argv or argv[0] not in COMMANDS:
        raise UserError(
            f"there is no command {' '.join(argv[:1])!r}; choose from {', '.join(COMMANDS)}"
        )
    name, *arguments = map(_with_underscores, argv)
    if set(HELP) & set(arguments):
        build_parser(name, usual="all" not in arguments).print_help()
        return
    _refuse_early(name, arguments)
    if _is_training(name):
        arguments = _with_mixture(arguments)
        arguments = [*_base_config(name, arguments), *arguments]
    parser = build_parser(name)
    given = parser.instantiate(parser.parse_args(arguments))
    settings_class = _import(COMMANDS[name].settings)
    fields = {field.name: given[field.name] for field in dataclasses.fields(settings_class)}
    settings, run = settings_class(**fields), _import(f"cli.{COMMANDS[name].run}")
    if name == "pretrain":
        _pretrain(run, settings, given, command)
    elif name == "demo":
        run(settings, command)
    else:
        run(settings)


def _is_training(name: str) -> bool:
    return "config" in COMMANDS[name].options


def _import(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(f"backfold.{module}"), attribute)


def _pretrain(run: Any, config: Any, given: Namespace, command: str) -> None:
    from backfold.training.signals import was_requeued

    requeued = was_requeued(config.out)
    if given.resume:
        _refuse_changes(config)
    run(config, given.resume or requeued, given.overwrite and not requeued, command)


def overview() -> str:
    """The help of `backfold` itself: the commands, without their settings."""
    lines = [f"  {name:<10}{command.description}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: backfold COMMAND [OPTIONS]",
            "",
            "Pretrain vision backbones on unlabelled images, as energy functions.",
            "",
            "commands:",
            *lines,
            "",
            "`backfold COMMAND --help` has a command's options, `backfold --version` the version.",
        ]
    )


def build_parser(name: str, *, usual: bool = False) -> Parser:
    """The parser of a command.

    Args:
        name: the command's.
        usual: show in the help of `pretrain` and `demo` what is usually set.
    """
    command = COMMANDS[name]
    parser = Parser(prog=f"backfold {name}", exit_on_error=False, description=command.description)
    settings = _import(command.settings)
    names = {field.name for field in dataclasses.fields(settings)}
    if _is_training(name):
        _add_training_options(parser, command.options)
    parser.add_class_arguments(
        settings, skip={"overwrite", *(command.positional or ())[:1]} & names
    )
    if "overwrite" in names:
        parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    if command.positional is not None:
        field, text = command.positional
        default = next(item.default for item in dataclasses.fields(settings) if item.name == field)
        several = default is dataclasses.MISSING
        parser.add_argument(
            field,
            type=Path,
            nargs="*" if several else "?",
            default=[] if several else default,
            help=text,
        )
    if usual and _is_training(name):
        _hide_the_rest(parser)
    return parser


def _add_training_options(parser: Parser, options: frozenset[str]) -> None:
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    if "recipe" in options:
        names = f"shipped YAML: {', '.join(recipe_names())}"
        parser.add_argument("--recipe", type=str | None, default=None, help=names)
        parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
        parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument(
        "--mixture",
        type=str | None,
        default=None,
        help="tasks and their weights, such as masking=1,sorting=0.5; sets pretext and "
        "tasks.mixture",
    )


def _hide_the_rest(parser: Parser) -> None:
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest not in USUAL:
                action.help = argparse.SUPPRESS
        if all(action.help == argparse.SUPPRESS for action in group._group_actions):
            group.title = group.description = None
    parser.epilog = "`--help all` shows every setting."


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


def _base_config(name: str, arguments: list[str]) -> list[str]:
    """The config that comes before all flags: the run's own, a recipe, or the demo's."""
    given = _options(arguments)
    if "config" in given:
        _check_settings_file(Path(_value(arguments, "--config", "")))
    if name == "demo":
        return [f"--config={recipe_path('demo')}", "--out=runs/demo"]
    if "resume" in given:
        config = Path(_value(arguments, "--out", "runs/pretrain"), "config.yaml")
        return [f"--config={config}"] if config.is_file() else []
    if "recipe" in given:
        return [f"--config={recipe_path(_value(arguments, '--recipe', ''))}"]
    if not given & {"config", "data", "backbone"}:
        print(
            "no --data and no --backbone: the demo's recipe on the embedded images", file=sys.stderr
        )
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


def _refuse_early(name: str, arguments: list[str]) -> None:
    """Refuse misspelt options and data that are not there before torch is loaded.

    Raises:
        UserError: either of them.
    """
    known = {*_field_names(COMMANDS[name].settings), *COMMANDS[name].options, "print_config"}
    for option in sorted(_options(arguments)):
        if option.split(".")[0] not in known:
            nearest = difflib.get_close_matches(option, known, n=1)
            hint = f"nearest: --{_dashed(nearest[0])}; " if nearest else ""
            raise UserError(
                f"there is no option --{_dashed(option)}; {hint}see `backfold {name} --help`"
            )
    if "strategy" in _options(arguments):
        from backfold.training.devices import refuse_strategy

        refuse_strategy(_value(arguments, "--strategy", ""))
    data = _value(arguments, "--data", "")
    if data and data != "null":
        refuse_missing(data)
    checkpoint = _value(arguments, "--checkpoint", "")
    if checkpoint and name in OF_RUNS:
        refuse_missing_run(Path(checkpoint))


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


def _options(arguments: Sequence[str]) -> set[str]:
    """Names of the options given, without dashes and values."""
    return {each[2:].partition("=")[0] for each in arguments if each.startswith("--") and each[2:]}


def _value(arguments: list[str], option: str, default: str) -> str:
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else "".join(arguments[position + 1 : position + 2])
    return default


def _with_mixture(arguments: list[str]) -> list[str]:
    """``--mixture a=1,b=2`` as the two settings that it stands for.

    Raises:
        UserError: no weights of that form.
    """
    text = _value(arguments, "--mixture", "")
    if not text:
        return arguments
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        weights = {name.strip(): float(weight) for name, _, weight in pairs}
    except ValueError:
        raise UserError(f"mixture is {text!r}; give for instance masking=1,sorting=0.5") from None
    at = next(i for i, each in enumerate(arguments) if each.partition("=")[0] == "--mixture")
    rest = [*arguments[:at], *arguments[at + (1 if "=" in arguments[at] else 2) :]]
    return [*rest, "--pretext=mixture", f"--tasks.mixture={json.dumps(weights)}"]


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _refuse_changes(config: Any) -> None:
    from backfold.training.config import config_to_dict
    from backfold.training.run import RunFolder, load_checkpoint

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


if __name__ == "__main__":
    sys.exit(main())
