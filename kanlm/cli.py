"""The command line: one verb, one function call.

Nothing heavy is imported until a verb runs, so that `--help` answers at once. A
`UserError` becomes one line on standard error and exit code 2; an interruption that was
saved exits with 128 plus the signal's number, or 75 when the time limit was over; one that came
before there was anything to save exits so, too. Options, files and overrides may come in any order.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from kanlm.errors import Interrupted, UserError
from kanlm.slow_notices import announce_slow_imports
from kanlm.version import version

_OVERRIDES = "section.key=value"
_SOURCE = (
    "stdlib-prose, stdlib-code, hub:NAME, a path or glob, a list of them or an entry of "
    "data.sources in YAML"
)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, call the verb, and exit with its code."""
    parsed = _parse(arguments)
    # Every line that kanlm prints is its own: no bars of libraries between them.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with _signals_interrupt(), announce_slow_imports():
            parsed.call(parsed)
    except UserError as error:
        _tell(error)
        sys.exit(2)
    except Interrupted as stop:
        _tell(stop)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt as stop:
        if _is_first_here():
            said = "kanlm: stopped; rerun the same command to resume from the last checkpoint"
            print(said, file=sys.stderr)
        sys.exit(128 + (stop.number if isinstance(stop, _Signalled) else signal.SIGINT))


class _Signalled(KeyboardInterrupt):
    """Another signal than Ctrl-C's, that ends what is going on as that does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """End a process that is alone with a line, not in silence, at SIGTERM and SIGUSR1.

    One of several would no longer be ended by them where it waits for the others.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise _Signalled(number)

    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    numbers = (signal.SIGTERM, signal.SIGUSR1) if alone else ()
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(error: UserError | Interrupted) -> None:
    """Print the one line, once for all processes of a run."""
    elsewhere = error.reported_by_other_rank
    if not (not _is_first_here() if elsewhere is None else elsewhere):
        print(f"kanlm: {error}", file=sys.stderr)


def _is_first_here() -> bool:
    """Whether this is the first process of its run on this machine, by its launcher's word."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage."""

    def error(self, message: str) -> NoReturn:
        told = f"{self.prog}: {message}; see `{self.prog} --help`\n"
        self.exit(2, told if _is_first_here() else None)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse, and sort what argparse leaves over behind options into `paths` and `overrides`.

    An override holds an equals sign, and a path may, if it exists. A verb without paths has
    None for them.
    """
    parser = _parser()
    parsed, left_over = parser.parse_known_args(arguments)
    for word in left_over:
        if word.startswith("-"):
            parser.error(f"unrecognized argument {word}")
    if parsed.paths is None:
        if left_over and parsed.overrides is None:
            parser.error(f"unrecognized argument {left_over[0]}")
        parsed.overrides = [*(parsed.overrides or ()), *left_over]
        return parsed
    words = [*parsed.paths, *parsed.overrides, *left_over]
    parsed.paths = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    parsed.overrides = [word for word in words if Path(word) not in parsed.paths]
    if not parsed.paths or (len(parsed.paths) > 1 and not parsed.several):
        found = " ".join(map(str, parsed.paths)) or "none"
        parser.error(f"expected {'at least ' if parsed.several else ''}one path, found {found}")
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kanlm",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=28),
        description="Train language models with Kolmogorov-Arnold feed-forward blocks, "
        "fine-tune them on new domains, and compare them with MLP twins of the same size.",
        epilog="Exit codes: 0 done; 2 a mistake, named in one line; 130 after Ctrl-C, 143 after "
        "SIGTERM, 138 after SIGUSR1, 75 when training.time_limit_minutes were over: the run was "
        "saved, rerun the same command to resume.",
    )
    parser.add_argument("--version", action="version", version=f"kanlm {version()}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_config_verb(verbs, "pretrain", _pretrain, "train a model from scratch")
    _add_config_verb(verbs, "finetune", _finetune, "train a run's model on another domain")
    for name, call, text in (
        ("compare", _compare, "train every arm on identical batches and print tables"),
        ("continual", _continual, "train every arm on one domain after another"),
    ):
        verb = _add_config_verb(verbs, name, call, text)
        verb.add_argument(
            "--dry-run",
            action="store_true",
            help="print parameters and FLOPs of every arm and stop",
        )
    planned = _add_config_verb(
        verbs, "plan", _plan, "estimate memory and time of a training job before it starts"
    )
    planned.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="number of GPUs; default: 1"
    )
    planned.add_argument("--gpu", default="h100", metavar="NAME", help="GPU model; default: h100")
    planned.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="GPUs in one machine; default: 8"
    )
    planned.add_argument(
        "--utilisation",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="share of the GPU's peak FLOP/s that training reaches; default: 0.3, which is too "
        "high for small or uncompiled models",
    )
    evaluate = _add_run_verb(verbs, "evaluate", _evaluate, "evaluate runs on held-out text", True)
    evaluate.add_argument(
        "--data",
        action="append",
        metavar="SOURCE",
        help=f"text to measure on: {_SOURCE}; may be repeated, for one table; default: the text "
        "of the first run",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add_run_verb(verbs, "generate", _generate, "continue a prompt", False)
    described = verbs.add_parser(
        "settings",
        help="print the settings of a config",
        description="Every setting with its type, default and meaning.",
    )
    described.add_argument(
        "name",
        nargs="?",
        help="a section, a setting, a feed-forward kind, a basis, a source or a strategy",
    )
    described.set_defaults(call=_settings, paths=None, overrides=None)
    listed = verbs.add_parser(
        "runs",
        help="list the runs and studies below a folder",
        description="The runs and studies below a folder: state, step, loss and time of each, the "
        "last written first. The runs of a study are listed where the folder is the study.",
    )
    listed.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="default: runs")
    listed.add_argument("--json", action="store_true", help="print JSON instead of a table")
    listed.set_defaults(call=_runs, paths=None, overrides=None)
    data = verbs.add_parser("data", help="inspect or prepare the text of a config")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    _add_config_verb(actions, "describe", _describe, "show what a config would train on")
    _add_config_verb(actions, "prepare", _prepare, "tokenise text into shards and stop")
    return parser


def _add_config_verb(
    verbs: Any, name: str, call: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    verb.add_argument("paths", nargs=1, metavar="CONFIG", help="a YAML file")
    if name != "continual":
        # Of a sequence of texts it would be unclear which one is meant.
        verb.add_argument(
            "--data",
            action="append",
            metavar="SOURCE",
            help=f"text in place of data.sources: {_SOURCE}; repeated, it is a mixture in equal "
            "shares",
        )
    return _complete(verb, call, "the file", several=False)


def _add_run_verb(
    verbs: Any, name: str, call: Callable[[argparse.Namespace], None], text: str, several: bool
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    count = "+" if several else 1
    verb.add_argument("paths", nargs=count, metavar="RUN", help="a run's folder")
    return _complete(verb, call, "the run", several=several)


def _complete(
    verb: argparse.ArgumentParser,
    call: Callable[[argparse.Namespace], None],
    below: str,
    *,
    several: bool,
) -> argparse.ArgumentParser:
    """Add what all verbs have."""
    verb.add_argument(
        "overrides", nargs="*", metavar=_OVERRIDES, help=f"settings laid over {below}'s"
    )
    verb.add_argument(
        "--print-config", action="store_true", help="print every resolved setting and stop"
    )
    verb.set_defaults(call=call, several=several)
    return verb


# Verbs


def _pretrain(arguments: argparse.Namespace) -> None:
    tree = _tree(arguments)
    from kanlm.config import from_tree

    _train(from_tree(tree), arguments)


def _finetune(arguments: argparse.Namespace) -> None:
    tree = _tree(arguments)
    from kanlm.training.inheritance import inherit

    _train(inherit(tree), arguments)


def _compare(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    if config is None:
        return
    from kanlm.experiments.compare import check_stages, compare, dry_run

    if arguments.dry_run:
        check_stages(config)
        dry_run(config)
    else:
        compare(config)


def _continual(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    if config is None:
        return
    from kanlm.experiments.compare import dry_run
    from kanlm.experiments.continual.run import check_stages, continual

    if arguments.dry_run:
        check_stages(config)
        dry_run(config)
    else:
        continual(config)


def _plan(arguments: argparse.Namespace) -> None:
    tree = _tree(arguments)
    from kanlm.config import from_tree
    from kanlm.training.inheritance import inherit

    start = tree.get("initialize_from")
    config = _resolved(inherit(tree) if start else from_tree(tree), arguments)
    if config is not None:
        from kanlm.experiments.planning.run import Devices, print_plans

        devices = Devices(
            arguments.gpu, arguments.gpus, arguments.gpus_per_node, arguments.utilisation
        )
        print_plans(config, devices)


def _evaluate(arguments: argparse.Namespace) -> None:
    verb = "evaluate" if arguments.data is None else "evaluate --data"
    if _read_runs(arguments, verb):
        return
    from kanlm.data.sources import parse_source_argument

    for source in arguments.data or ():
        parse_source_argument(source)
    from kanlm.experiments.evaluate import evaluate_runs

    evaluate_runs(
        arguments.paths, arguments.data or (), arguments.overrides, as_json=arguments.json
    )


def _generate(arguments: argparse.Namespace) -> None:
    if _read_runs(arguments, "generate"):
        return
    from kanlm.experiments.generate import generate

    print(generate(arguments.paths[0], arguments.overrides))


def _settings(arguments: argparse.Namespace) -> None:
    from kanlm.experiments.settings import settings_text

    print(settings_text(arguments.name), end="")


def _runs(arguments: argparse.Namespace) -> None:
    from kanlm.experiments.runs import print_runs

    print_runs(Path(arguments.folder), as_json=arguments.json)


def _describe(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    if config is None:
        return
    from kanlm.data.corpus import open_tokenizer
    from kanlm.data.describe import print_description

    print_description(config.data, open_tokenizer(config.tokenizer, config.data, report=print))


def _prepare(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    if config is None:
        return
    from kanlm.data.corpus import open_corpus, open_tokenizer

    tokenizer = open_tokenizer(config.tokenizer, config.data, report=print)
    for data in (config.data, *config.evaluation.domains):
        open_corpus(data, tokenizer, report=print)


# Helpers


def _tree(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read the config file with overrides and `--data` on top.

    Raises:
        UserError: it cannot be read, or another job is at work in the folder that the verb
            would write to, which is found out before torch is imported for seconds.
    """
    from kanlm import config as configs
    from kanlm.training.run_folder import check_free

    tree = configs.read_tree(arguments.paths[0], arguments.overrides)
    folder = tree.get("output_dir", configs.Config.output_dir)
    only_shows = arguments.print_config or getattr(arguments, "dry_run", False)
    writes = arguments.call in (_pretrain, _finetune, _compare, _continual) and not only_shows
    if writes and isinstance(folder, str):
        check_free(Path(folder))
    return configs.merge(tree, _stated_data(arguments))


def _load(arguments: argparse.Namespace) -> Any:
    """Return the resolved configuration, or None where it was only to be printed."""
    tree = _tree(arguments)
    from kanlm.config import from_tree

    return _resolved(from_tree(tree), arguments)


def _stated_data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that `--data` stands for: a domain named after its text.

    Raises:
        UserError: overrides state the text as well, or there is no such text.
    """
    if not getattr(arguments, "data", None):
        return {}
    from kanlm import config as configs
    from kanlm.data.sources import make_source, parse_source_argument

    stated = {
        name: override
        for override in arguments.overrides
        for name, _ in configs.leaves(configs.parse_override(override))
    }
    for name, override in stated.items():
        if name == "data" or configs.lies_in(name, ("data.sources", "data.root")):
            raise UserError(f"--data and {override} both name the text; give one of them")
    sources = [parse_source_argument(source) for source in arguments.data]
    data = {"sources": sources, "root": "."}
    if "data.domain" not in stated:
        labels = dict.fromkeys(make_source(source).label for source in sources)
        data["domain"] = "+".join(labels)
    return {"data": data}


def _resolved(config: Any, arguments: argparse.Namespace) -> Any:
    """Check what needs no torch before it is imported, which takes seconds, and then the rest."""
    from kanlm import config as configs

    _check_before_torch(config, arguments)
    from kanlm.training.resolve import resolve

    config = resolve(config)
    if arguments.print_config:
        print(configs.to_yaml(config), end="")
        return None
    return config


def _check_before_torch(config: Any, arguments: argparse.Namespace) -> None:
    from kanlm.data.sources import check_source, open_sources

    if arguments.call is _pretrain and config.initialize_from is not None:
        raise UserError("initialize_from belongs to `kanlm finetune`; leave it out to pretrain")
    for i, source in enumerate(config.data.sources):
        check_source(source, config.data.root, f"data.sources.{i}")
    # What is finished needs no text any more.
    done = arguments.print_config or (Path(config.output_dir) / "results.json").exists()
    if arguments.call is not _plan and not done:
        for data in (config.data, *config.evaluation.domains):
            open_sources(data)


def _read_runs(arguments: argparse.Namespace, verb: str) -> bool:
    """Check that runs can be read, and print their settings, a YAML document each, if asked for."""
    from kanlm import config as configs
    from kanlm.training.run_folder import check_weights, load_config

    found = [load_config(run, arguments.overrides, verb) for run in arguments.paths]
    if arguments.print_config:
        print("---\n".join(map(configs.to_yaml, found)), end="")
        return True
    for run in arguments.paths:
        check_weights(run)
    return False


def _train(config: Any, arguments: argparse.Namespace) -> None:
    """Pretrain or fine-tune, and print where the results are."""
    if arguments.print_config:
        _resolved(config, arguments)
        return
    _check_before_torch(config, arguments)
    from kanlm.experiments.single import train

    folder = train(config)
    if folder is not None:
        for name in ("model", "results.json", "report.html"):
            print(folder / name)
