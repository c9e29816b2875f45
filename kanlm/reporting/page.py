"""report.html: one self-contained page on a study or a run.

Styles and figures are inline and nothing is fetched, so the page can be mailed, archived
or put beside a paper.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from kanlm.atomic_io import write_text
from kanlm.reporting import figures, sweep_figure
from kanlm.reporting.figures import GLYPHS, Picture, arm_style
from kanlm.reporting.format import count, fixed
from kanlm.reporting.study import Study, read_study
from kanlm.reporting.summary import findings
from kanlm.reporting.sweep_table import sweep_tables
from kanlm.reporting.table import accounting_tables, result_tables
from kanlm.reporting.terminal import Table

#: Words used on every page, on those of several arms or seeds, of references, of stages.
DEFINITIONS = {
    "bits per byte": "Σ nats / (ln 2 · UTF-8 bytes) over the whole split, each token scored once "
    "with a sliding window. It depends on no tokenizer. The end-of-document token counts as a "
    "token and as no byte.",
    "perplexity": "exp of mean nats a token, or a whitespace-separated word. By token it compares "
    "only models with the same tokenizer. Of several seeds: exp of the mean loss.",
    "parameters": "All that are trained; FFN are those of the feed-forward blocks.",
    "FLOPs a token": "Forward pass; a multiply-add is two.",
    "tokens/s": "Training throughput without evaluation, sampling and checkpoints.",
    "peak memory": "Largest of the training process: on the GPU if there is one, else resident.",
}
COMPARISON_DEFINITIONS = {
    "interval": "How the figure of these trained models would vary over other documents of the "
    "same kind: the middle 95% of resamples of the documents (percentile bootstrap), nats averaged "
    "over seeds. In simulations with 40, 150 and 400 documents of very uneven length it held the "
    "true figure 90, 92 and 93% of the time. Of a difference of two arms, both are resampled over "
    "the same documents. It says nothing of other seeds.",
    "range over seeds": "Smallest and largest of the seeds' figures; it is no interval.",
}
REFERENCE_DEFINITIONS = {
    "bigram": "Token bigram with interpolated Kneser-Ney smoothing, its discount chosen on "
    "validation; counts from the training split.",
    "xz": "8 · (|xz(train + held-out)| − |xz(train)|) / |held-out|, preset 9e.",
}
STAGE_DEFINITIONS = {
    "before, learned, final": "Loss on a domain before its own stage, after it, and after the "
    "last stage T: L[j−1, j], L[j, j] and L[T, j].",
    "gain": "G_j = L[j−1, j] − L[j, j]: what the stage trained on domain j took off its loss.",
    "forgetting": "F_j = L[T, j] − L[j, j]: against when the domain was just learned. From best: "
    "against the least loss before the last stage.",
    "backward transfer": "Mean of −F_j over the domains before the last.",
    "forward transfer": "Mean of L[0, j] − L[j−1, j] over the domains from the third on.",
    "average final loss": "Mean of L[T, j] over all domains trained on.",
}


def write_report(folder: Path) -> Path:
    """Make `report.html` of a study's or a run's folder, and return its path.

    Raises:
        UserError: there is no results.json in it, a file in it is damaged, or the page cannot
            be written.
    """
    path = folder / "report.html"
    write_text(path, render(read_study(folder)))
    return path


def render(study: Study) -> str:
    """Render the page as HTML."""
    sentences = findings(study.results)
    return _template().render(
        title=study.name,
        stages=study.stages,
        lead=sentences[0],
        further=sentences[1:],
        arms=[
            {"name": arm, "label": study.results["arms"][arm]["feed_forward"]}
            | arm_style(study.arms, arm)
            for arm in study.arms
        ],
        colours={arm: arm_style(study.arms, arm)["color"] for arm in study.arms},
        glyphs={arm: GLYPHS[arm_style(study.arms, arm)["marker"]] for arm in study.arms},
        tables=result_tables(study.results),
        sweeps=sweep_tables(study.results),
        sweep_pictures=_marked(sweep_figure.sweep_pictures(study)),
        accounting=_accounting(study),
        curves=_marked(figures.learning_curves(study)),
        matrices=_marked(figures.loss_matrices(study)),
        forgetting=_marked(figures.forgetting_and_gain(study)),
        samples=_samples(study),
        configs=_configs(study),
        provenance=_provenance(study.results),
        several_seeds=any(len(arm["seeds"]) > 1 for arm in study.results["arms"].values()),
        definitions=_definitions(study),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("kanlm.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html")


def _marked(pictures: list[Picture]) -> list[dict[str, Any]]:
    """Let the SVG of pictures, drawn here with its text escaped, through the template."""
    return [vars(picture) | {"svg": Markup(picture.svg)} for picture in pictures]


def _accounting(study: Study) -> list[Table]:
    accounts = {
        name: arm["accounting"]
        for name, arm in study.results["arms"].items()
        if "accounting" in arm
    }
    return accounting_tables(accounts)


def _samples(study: Study) -> list[dict[str, Any]]:
    """Return the last sample of every stage, from each arm's first seed."""
    samples = []
    for arm in study.arms:
        for run in study.arm_runs(arm, study.results["arms"][arm]["seeds"][0]):
            if not run.lines["sample"]:
                continue
            line = run.lines["sample"][-1]
            prompted = line["text"].startswith(line["prompt"])
            start = len(line["prompt"]) if prompted else 0
            samples.append(
                {
                    "arm": arm,
                    "domain": run.domain,
                    "seed": run.seed,
                    "step": line["step"],
                    "prompt": line["prompt"],
                    "text": line["text"][start:],
                }
            )
    return samples


def _configs(study: Study) -> list[dict[str, str]]:
    """Return resolved settings of each arm's first run of every stage."""
    return [
        {"arm": arm, "domain": run.domain, "text": run.config}
        for arm in study.arms
        for run in study.arm_runs(arm, study.results["arms"][arm]["seeds"][0])
    ]


def _definitions(study: Study) -> dict[str, str]:
    """Return the definitions of words that the page uses."""
    return {
        **DEFINITIONS,
        **(COMPARISON_DEFINITIONS if study.results["comparisons"] else {}),
        **(REFERENCE_DEFINITIONS if study.results["references"] else {}),
        **(STAGE_DEFINITIONS if len(study.stages) > 1 else {}),
    }


def _provenance(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of everything known about how the results were made."""
    known = results["provenance"]
    hardware = known.get("hardware", {})
    rows = []
    if "commit" in known:
        commit = known["commit"] or "not from a repository"
        rows.append(
            ("commit", commit + (", with uncommitted changes" if known.get("dirty") else ""))
        )
    if hardware:
        gpus = ", ".join(hardware["gpus"]) or "none"
        rows += [
            (
                "processor",
                f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads used",
            ),
            ("memory", count(hardware["memory_bytes"], "B")),
            ("GPU", gpus),
            ("platform", hardware["platform"]),
        ]
    if "versions" in known:
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in known["versions"].items())))
    if "config_hash" in known:
        rows.append(("settings, sha256", known["config_hash"]))
    rows += [(f"text of {k}, sha256", v) for k, v in known.get("data_hash", {}).items()]
    for domain, reference in results["references"].items():
        made_of = _reference(reference)
        if made_of:
            rows.append((f"references on {domain}", made_of))
    return rows


def _reference(reference: Mapping[str, Any]) -> str:
    parts = []
    if "bigram_training_tokens" in reference:
        parts.append(
            f"bigram counted {count(reference['bigram_training_tokens'])} tokens, "
            f"discount {fixed(reference.get('bigram_discount'), 2)}"
        )
    if "xz_training_bytes" in reference:
        parts.append(
            f"xz read {count(reference['xz_training_bytes'], 'B')} of training and "
            f"{count(reference.get('xz_heldout_bytes'), 'B')} of held-out text"
        )
    return "; ".join(parts)
