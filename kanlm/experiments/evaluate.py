"""`kanlm evaluate`: finished runs side by side on the held-out documents of one text.

Documents are held out by the hash of their content, with the fractions of the run's own
data, so that a text a run was trained on is measured on what it never saw. A file that a run
was trained on is cut into documents as that run cut it, for the same reason.
"""

import glob
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kanlm.config import Config, DataSettings
from kanlm.data.corpus import Corpus, open_corpus
from kanlm.data.sources import parse_source_argument
from kanlm.errors import UserError
from kanlm.evaluation.perplexity import Evaluation, evaluate
from kanlm.evaluation.references import cached_references
from kanlm.experiments.provenance import collect
from kanlm.experiments.results import Place, Record, derive
from kanlm.reporting.contents import read_run_results
from kanlm.reporting.table import print_table, quality_table
from kanlm.training.folder import load_config
from kanlm.training.resolve import resolve
from kanlm.training.trained import load_tokenizer, load_trained


def evaluate_runs(
    runs: list[Path], source: str | None, overrides: list[str], *, as_json: bool = False
) -> dict[str, Any]:
    """Evaluate runs on one text, print a table or JSON, and return what results.json holds.

    Arguments:
        runs: folders of finished runs; each is an arm, named by its folder.
        source: as in `parse_source_argument`; None is the first run's own text.
        overrides: settings laid over each run's, such as `evaluation.stride=64`.

    Raises:
        UserError: a run is not there or not finished, the runs hold out different text, or an
            override goes unread.
    """
    verb = "evaluate" if source is None else "evaluate --data"
    configs = {str(run): resolve(load_config(run, overrides, verb)) for run in runs}
    _check_fractions(configs)
    first = next(iter(configs.values()))
    known = [config.data for config in configs.values()]
    domain, places, facts = "", {}, {}
    corpora: dict[str, Corpus] = {}
    for name, config in configs.items():
        data = _data(config, first.data, source, known)
        domain = data.domain
        evaluation, corpora[name] = _evaluate(Path(name), config, data)
        facts[name] = _facts(Path(name))
        places[
            Place(
                arm=name,
                seed=config.seed,
                strategy="plain",
                stage=0,
                domain=domain,
                step=0,
                split=config.evaluation.split,
            )
        ] = evaluation
    reference = next(iter(corpora.values()))
    try:
        results = derive(
            [Record.of(evaluation, place) for place, evaluation in places.items()],
            facts,
            domains=[domain],
            documents=places,
            references={domain: cached_references(reference, first.evaluation.split)},
            provenance=collect(first, {domain: reference.fingerprint}),
            resamples=first.evaluation.bootstrap_resamples,
        )
    except ValueError as error:
        raise UserError(f"these runs cannot stand side by side: {error}") from None
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        print_table(quality_table(results))
    return results


def _check_fractions(configs: dict[str, Config]) -> None:
    """Refuse runs that hold out different shares of a text: their documents would differ."""
    fractions = {(c.data.validation_fraction, c.data.test_fraction) for c in configs.values()}
    if len(fractions) == 1:
        return
    smallest = min(fractions, key=sum)
    raise UserError(
        "these runs hold out different shares of their text, (validation, test) = "
        f"{' and '.join(map(str, sorted(fractions)))}; what all of them hold out is measured with "
        f"data.validation_fraction={smallest[0]:g} data.test_fraction={smallest[1]:g}"
    )


def _data(
    config: Config, default: DataSettings, source: str | None, known: list[DataSettings]
) -> DataSettings:
    """The text to evaluate on, split by the fractions of the run's own data.

    Arguments:
        default: settings of the text where `source` is None.
        known: texts that the runs were trained on.
    """
    if source is None:
        return replace(
            config.data, domain=default.domain, sources=default.sources, root=default.root
        )
    spec = parse_source_argument(source)
    for data in known:
        for own in data.sources:
            if own["kind"] == spec["kind"] == "files" and _files(data.root, own) == _files(
                ".", spec
            ):
                return replace(config.data, domain=data.domain, sources=[own], root=data.root)
    domain = re.sub(r"[/\\:]+", "-", source).strip("-.") or "text"
    # A path on the command line is the user's, not relative to the run's data.root.
    return replace(config.data, domain=domain, sources=[spec], root=".")


def _files(root: str, spec: dict[str, Any]) -> set[Path]:
    """The files that a source's pattern finds."""
    return {
        Path(path).resolve() for path in glob.glob(str(Path(root) / spec["path"]), recursive=True)
    }


def _evaluate(run: Path, config: Config, data: DataSettings) -> tuple[Evaluation, Corpus]:
    model = load_trained(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(run)
    corpus = open_corpus(data, tokenizer)
    evaluation = evaluate(
        model.to(device),  # pyright: ignore
        corpus.split(config.evaluation.split),
        context_length=config.model.context_length,
        stride=config.evaluation.stride or config.model.context_length,
        batch_size=config.evaluation.batch_size,
        attention_within_documents=config.data.attention_within_documents,
        device=device,
    )
    return evaluation, corpus


def _facts(run: Path) -> dict[str, Any]:
    path = run / "results.json"
    if not path.exists():
        raise UserError(f"{run} has no results.json yet: finish that run first")
    _, facts = read_run_results(path)
    return facts
