"""What text runs were trained on: how they cut it, and which other documents stand in it.

A run was trained on its own text and on that of the run it started from, and so on. To score a
model on text that it has seen says nothing, so text that `kanlm evaluate` is given is cut into
documents as the runs cut it, which leaves what they held out; and where it may have been cut in
another way, or come from another file, its documents are looked for in the training text itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from kanlm.checksums import file_sha256
from kanlm.config import Config, DataSettings, from_tree
from kanlm.data.corpus import Corpus, open_corpus
from kanlm.data.overlap import FOUND_SHARE, found_shares, window_tokens
from kanlm.data.sources import check_source, make_source
from kanlm.errors import UserError
from kanlm.training.checkpointing.reader import checkpoint_folder, read_state
from kanlm.training.run_folder import checkpoint_steps, read_config_tree
from kanlm.untrusted_io import read_object

#: Training tokens from which on a search takes so long that a line says so.
_MANY_TOKENS = 10_000_000


@dataclass(frozen=True)
class TrainingText:
    """Text that `run` was trained on."""

    run: Path
    data: DataSettings


def training_texts(run: Path) -> Iterator[TrainingText]:
    """Yield a run's text, then that of the run it started from, and so on.

    Raises:
        UserError: one of these runs is not there any more.
    """
    seen: set[Path] = set()
    while run.resolve() not in seen:
        seen.add(run.resolve())
        config = _config(run)
        yield TrainingText(run, config.data)
        if config.initialize_from is None:
            return
        run = Path(config.initialize_from)


def known_texts(run: Path) -> list[DataSettings]:
    """Return the texts that a run has cut into documents: those trained on, then others."""
    texts: list[DataSettings] = []
    try:
        texts += [text.data for text in training_texts(run)]
    except UserError:
        # Only its documents are not cut as they were; that they were trained on is found later.
        texts += [] if texts else [_config(run).data]
    return [*texts, *_config(run).evaluation.domains]


def cut_as_known(
    spec: Mapping[str, Any], known: Sequence[DataSettings]
) -> tuple[list[dict[str, Any]], str | None]:
    """Find how to read the source that a spec describes, cut into documents as in a known text.

    Files are the same by whatever name they are found, or if they hold the same bytes. Those that
    no known text has are read as the spec says, and so are all where the spec states something
    else.

    Args:
        spec: as from `parse_source_argument`, its paths absolute.
        known: texts, of which the first that has a file decides.

    Returns:
        sources, to be read with the root "."; and the domain, if they are all of a known text.
    """
    if spec["kind"] != "files":
        for data in known:
            for own in data.sources:
                rooted = _rooted(own, data.root)
                if _agrees(spec, rooted):
                    return [rooted], _domain_of_all(data)
        return [dict(spec)], None
    left = make_source(spec).local_files()
    sources: list[dict[str, Any]] = []
    domain = None
    for data in known:
        for own in data.sources:
            if own["kind"] != "files" or not _agrees(spec, own):
                continue
            theirs = _Files(_files_of(own, data.root))
            found = [path for path in left if path in theirs]
            if not found:
                continue
            left = [path for path in left if path not in found]
            sources.append(_reading(own, found))
            if not left and len(sources) == 1 and len(found) == len(theirs.paths):
                domain = _domain_of_all(data)
    if not sources:
        return [dict(spec)], None
    if left:
        sources.append(_reading(spec, left))
    return sources, domain


def is_held_out_by(data: DataSettings, text: DataSettings) -> bool:
    """Whether the held-out documents of `data` are held out of training on `text` by its own rule.

    So they are if its sources are sources of that text, cut alike, and if no larger shares are
    held out.
    """
    shares = [each.validation_fraction + each.test_fraction for each in (data, text)]
    if shares[0] > shares[1] + 1e-9:
        return False
    own = [_key(spec, text.root) for spec in text.sources]
    return all(_key(spec, data.root) in own for spec in data.sources)


def seen_documents(
    scored: Corpus,
    split: str,
    text: TrainingText,
    tokenizer: PreTrainedTokenizerFast,
    report: Callable[[str], None],
) -> np.ndarray:
    """Find which documents of a split were trained on, (documents,) bool.

    Args:
        tokenizer: of the run, and of `scored`.
        report: takes lines on what takes long.

    Raises:
        UserError: the training text is not there any more as it was.
    """
    corpus = open_corpus(text.data, tokenizer, report=report)
    _check_unchanged(text, corpus)
    train = corpus.split("train")
    if train.n_tokens > _MANY_TOKENS:
        report(
            f"looking for documents of {scored.data.domain} in the {train.n_tokens:,} training "
            f"tokens of {text.run}"
        )
    groups = [
        group
        for entry in scored.sources
        for group in entry.splits[split].token_documents(entry.sharded.ending)
    ]
    held_out = scored.split(split)
    window = window_tokens(held_out.n_tokens, int(held_out.document_bytes.sum()))
    return found_shares(groups, train, window) >= FOUND_SHARE


def _check_unchanged(text: TrainingText, corpus: Corpus) -> None:
    """Compare a text with what its run says that it was trained on."""
    results, checkpoints = text.run / "results.json", text.run / "checkpoints"
    steps = checkpoint_steps(checkpoints)
    if results.exists():
        hashes = read_object(results).get("provenance", {}).get("data_hash", {})
        same = hashes.get(text.data.domain) == corpus.fingerprint
    elif steps:
        state = read_state(checkpoint_folder(checkpoints, steps[0]))
        same = state.get("tokens_hash") == corpus.tokens_hash
    else:
        raise UserError(f"{text.run} has neither results.json nor a checkpoint to say so")
    if not same:
        raise UserError(f"the text in data '{text.data.domain}' of {text.run} has changed since")


class _Files:
    """Files that others may be, by another name or as copies."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._resolved = {path.resolve() for path in paths}
        self._by_size: dict[int, list[Path]] = {}
        for path in paths:
            self._by_size.setdefault(path.stat().st_size, []).append(path)

    def __contains__(self, path: Path) -> bool:
        if path.resolve() in self._resolved:
            return True
        alike = self._by_size.get(path.stat().st_size, [])
        return bool(alike) and file_sha256(path) in map(file_sha256, alike)


def _files_of(own: Mapping[str, Any], root: str) -> list[Path]:
    """Return the files of a run's source; none where they are not there any more."""
    try:
        return make_source(own, root).local_files()
    except UserError:
        return []


def _agrees(spec: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether a known source does nothing else than the spec states."""
    stated = {name: value for name, value in spec.items() if name not in ("path", "weight")}
    return all(own.get(name) == value for name, value in stated.items())


def _rooted(own: Mapping[str, Any], root: str) -> dict[str, Any]:
    """Return a source whose paths do not depend on the root any more."""
    rooted = {name: value for name, value in own.items() if name != "weight"}
    if own["kind"] == "files":
        return _reading(own, make_source(own, root).local_files())
    if own["kind"] == "hub":
        folder = Path(root) / own["name"]
        if folder.is_dir():
            rooted["name"] = str(folder.absolute())
        files = own.get("data_files")
        if files is not None:
            files = [files] if isinstance(files, str) else files
            rooted["data_files"] = [str((Path(root) / file).absolute()) for file in files]
    return rooted


def _reading(spec: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    """Return a source of these files alone, by paths that do not depend on a root."""
    spec = {name: value for name, value in spec.items() if name != "weight"}
    return {**spec, "path": [str(path.absolute()) for path in files]}


def _domain_of_all(data: DataSettings) -> str | None:
    """Return the name of a text that has no other source."""
    return data.domain if len(data.sources) == 1 else None


def _key(spec: Mapping[str, Any], root: str) -> Any:
    """Return what two specs have in common that read the same documents."""
    try:
        rooted = _rooted(check_source(spec, root), root)
    except UserError:
        # Its files are gone, and with them the shards' name.
        return dict(spec)
    if "path" in rooted:
        rooted["path"] = sorted(str(Path(path).resolve()) for path in rooted["path"])
    return rooted


def _config(run: Path) -> Config:
    return from_tree(read_config_tree(run))
