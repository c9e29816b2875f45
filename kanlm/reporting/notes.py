"""What a reader must know of figures, on the line with them.

`notes` of results.json, which runs wrote, and what follows from the rest of it: steps left
out, a choice at the edge of its grid, figures of the text that a choice was made on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kanlm.reporting.format import short_names


@dataclass
class Notes:
    """Notes on figures, and the marks given to those that a table has shown so far."""

    results: Mapping[str, Any]
    #: Note → mark.
    marks: dict[str, str] = field(default_factory=dict)

    def mark(self, arm: str, domain: str) -> str:
        """Return the marks of the notes on an arm's figure on a domain."""
        found = [
            note["note"]
            for note in all_notes(self.results)
            if note["arm"] == arm and note["domain"] in (None, domain)
        ]
        for note in found:
            self.marks.setdefault(note, f"[{len(self.marks) + 1}]")
        return " ".join(mark for note, mark in self.marks.items() if note in found)

    def lines(self, domains: Sequence[str]) -> list[str]:
        """Return notes on the text itself, which are about all arms, then those with a mark."""
        shared = [
            f"{note['domain']}: {note['note']}" if note["domain"] else note["note"]
            for note in all_notes(self.results)
            if note["arm"] is None and note["domain"] in (None, *domains)
        ]
        return [*dict.fromkeys(shared), *(f"{mark} {note}" for note, mark in self.marks.items())]


def all_notes(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return notes with `arm` and `domain`, None being all."""
    return [*results["notes"], *_derived(results)]


def _derived(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    chosen_on = set()
    split = results["records"][0]["split"]
    for name, arm in results["arms"].items():
        if arm["skipped_steps"]:
            steps = f"{arm['skipped_steps']:,} of {arm['steps']:,} steps were left out"
            yield {"arm": name, "domain": None, "note": f"{steps}: no finite loss, or a leap"}
        if "sweep" not in arm:
            continue
        sweep = arm["sweep"]
        if edge := edge_warning(sweep):
            yield {"arm": name, "domain": None, "note": edge}
        if sweep["other_trials"]:
            left = f"{sweep['other_trials']} trials in its folder are not of the grid"
            yield {"arm": name, "domain": None, "note": f"{left} and had no part in the choice"}
        if sweep["split"] == split:
            chosen_on.add(sweep["domain"])
    for domain in sorted(chosen_on):
        yield {
            "arm": None,
            "domain": domain,
            "note": f"settings were chosen on this very {split} split, which flatters them a "
            "little; evaluation.split=test is not chosen on",
        }


def edge_warning(sweep: Mapping[str, Any]) -> str | None:
    """Say at which edges of its grid an arm's choice lies; None for none."""
    names = short_names([edge["setting"] for edge in sweep["edges"]])
    found = [
        f"{names[edge['setting']]} {edge['value']:g} is the {edge['edge']} of its grid"
        for edge in sweep["edges"]
    ]
    if not found:
        return None
    return f"{' and '.join(found)}: better ones may lie beyond it"
