"""Datasets of the Hugging Face hub, and dataset folders on this machine."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kanlm.data.network import hub_problem, offline
from kanlm.data.sources.base import Cursor, Source, hash_json
from kanlm.data.sources.files import find_files, stamp
from kanlm.data.sources.rows import checked_text
from kanlm.errors import UserError, first_line, nearest


class Hub(Source):
    """One column of a dataset, through `datasets.load_dataset`.

    Streamed text is read once, while it is tokenised; what has been prepared needs no
    network any more.

    Args:
        name: hub name, a folder, or a builder such as `json` that `data_files` feeds.
        config: configuration of the dataset.
        split: the dataset's split to read; kanlm makes its own splits of it.
        column: field that holds the text.
        data_files: files for the builder.
        revision: commit or tag of the hub repository.
        streaming: read without downloading the whole dataset first.
    """

    def __init__(
        self,
        root: str | Path = ".",
        *,
        name: str,
        config: str | None = None,
        split: str = "train",
        column: str = "text",
        data_files: str | list[str] | None = None,
        revision: str | None = None,
        streaming: bool = True,
    ) -> None:
        super().__init__(root)
        self.name, self.config, self.split, self.column = name, config, split, column
        self.data_files = [data_files] if isinstance(data_files, str) else data_files
        self.revision = revision
        self.streaming = streaming
        self.label = re.sub(r"[^\w-]+", "-", name).strip("-") or "hub"

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str | None, Cursor]]:
        with self._explained():
            dataset = self._open()
            if not self.streaming:
                start = cursor["rows"] if cursor else 0
                for row in range(start, len(dataset)):
                    yield self._text(dataset[row]), {"rows": row + 1}
                return
            if cursor:
                dataset.load_state_dict(cursor)
            for row in dataset:
                yield self._text(row), dataset.state_dict()

    def part(self, index: int, count: int) -> Iterator[str | None]:
        """Divide between the dataset's files where it is streamed, else anywhere."""
        with self._explained():
            dataset = self._open()
            count = min(count, dataset.num_shards if self.streaming else len(dataset))
            if index < count:
                for row in dataset.shard(count, index, contiguous=True):
                    yield self._text(row)

    def local_files(self) -> list[Path]:
        """Return the files of a folder, or those that the patterns of `data_files` find."""
        if folder := self._folder():
            return sorted(path for path in folder.rglob("*") if path.is_file())
        return [path for each in self.data_files or [] for path in find_files(each, self.root)]

    def fingerprint(self) -> str:
        files = self.local_files()
        stats = [stamp(file) for file in files]
        options = [self.name, self.config, self.split, self.column, self.revision]
        return hash_json(["hub", options, stats])

    def describe(self) -> str:
        config = f", config {self.config}" if self.config else ""
        return f"hub dataset {self.name}{config}, split {self.split}, column {self.column}"

    def _folder(self) -> Path | None:
        folder = self.root / self.name
        return folder if folder.is_dir() else None

    def _files_of_builder(self) -> list[str] | None:
        """Find the files that patterns name; in a folder or on the hub `datasets` looks itself."""
        found = [] if self._folder() else self.local_files()
        return [str(path.absolute()) for path in found] or self.data_files

    def _open(self) -> Any:
        """Load the dataset, which must have the column."""
        dataset = self._load()
        # Older versions of datasets know the columns of a stream from its rows alone.
        names = dataset.column_names or list(next(iter(dataset), {}))
        if names and self.column not in names:
            raise UserError(
                f"{self._where()}: no column '{self.column}'{nearest(self.column, names)}"
            )
        return dataset

    def _load(self) -> Any:
        from datasets import load_dataset

        def load() -> Any:
            return load_dataset(
                str(self._folder() or self.name),
                self.config,
                split=self.split,
                data_files=self._files_of_builder(),
                revision=self.revision,
                streaming=self.streaming,
            )

        if self._folder() or self.local_files() or (problem := hub_problem()) is None:
            return load()
        if self.streaming:
            raise ConnectionError(problem)
        # It may have been downloaded before.
        with offline():
            return load()

    def _text(self, row: dict[str, Any]) -> str | None:
        return checked_text(row.get(self.column), self.column, self._where())

    def _where(self) -> str:
        return f"hub dataset '{self.name}'"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what `datasets` raises into one line, which tells no network from no dataset."""
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        # Which HTTP client it is depends on the version of huggingface_hub.
        http_error: type[Exception] = HfHubHTTPError.__bases__[0]
        try:
            yield
        except (DatasetNotFoundError, HfHubHTTPError) as error:
            raise UserError(f"{self._where()}: {first_line(error)}") from None
        except (ConnectionError, http_error, LocalEntryNotFoundError) as error:
            raise UserError(
                f"{self._where()}: no network ({first_line(error)}); offline, use stdlib-prose, "
                "stdlib-code, or {kind: files, path: …}"
            ) from None
        except (DatasetsError, ValueError, OSError) as error:
            raise UserError(f"{self._where()}: {first_line(error)}") from None
