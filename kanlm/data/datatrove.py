"""Steps of a `datatrove` pipeline, which prepare text on many machines.

`TokeniseParts` runs in any number of tasks under datatrove's local, SLURM or Ray executor, and
then `JoinParts` in one. What comes out is, byte for byte, what `kanlm data prepare` writes. A
task that was killed starts anew, and those that are done are not done again; joining resumes
after its last finished shard. All machines must see the sources and `data.cache_dir`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from kanlm.config import Config, DataSettings
from kanlm.data.corpus import open_tokenizer
from kanlm.data.distributed_prepare import join_parts, write_part
from kanlm.data.preparation import Target, prepare_target
from kanlm.data.sources import make_source
from kanlm.errors import UserError


class _Preparation(PipelineStep):
    """What both steps know: the domains, and the tokenizer, learned where the step is made.

    Args:
        config: its data and evaluation domains are prepared, as by `kanlm data prepare`.

    Raises:
        UserError: see `open_tokenizer`.
    """

    type = "🔢 - TOKENIZER"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.domains = [_absolute(data) for data in (config.data, *config.evaluation.domains)]
        self.tokenizer = open_tokenizer(config.tokenizer, config.data)

    def targets(self) -> Iterator[Target]:
        """Yield what is to be prepared."""
        for data in self.domains:
            for spec in data.sources:
                yield Target.of(make_source(spec, data.root), self.tokenizer, data)


class TokeniseParts(_Preparation):
    """Tokenises, in task `rank` of `world_size`, that part of every source.

    It reads the sources itself: no other step stands beside it in its pipeline.
    """

    name = "kanlm: tokenise parts"

    def run(
        self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        """Write the task's parts of what is not prepared.

        Raises:
            UserError: see `write_part`, or there is a step before this one.
        """
        if data is not None:
            raise UserError(
                f"{self.name}: it reads the sources of its config, and no documents of a step "
                "before it; write these to files, and name the files as a source"
            )
        for target in self.targets():
            # A single document is not divided.
            if target.folder.exists() or target.source.single_document:
                continue
            with self.track_time("source"):
                part = write_part(target, rank, world_size)
            self.stat_update("documents", value=part.documents, unit="source")
            self.stat_update("tokens", value=part.tokens, unit="source")


class JoinParts(_Preparation):
    """Makes shards of the parts, in a single task, and of sources that are a single document."""

    name = "kanlm: join parts"

    def run(
        self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        """Write the folders of shards, and delete the parts.

        Raises:
            UserError: see `join_parts` and `prepare`, or there are several tasks.
        """
        if world_size != 1:
            raise UserError(f"{self.name}: tasks = {world_size}: expected 1")
        for target in self.targets():
            make = prepare_target if target.source.single_document else join_parts
            with self.track_time("source"):
                sharded = make(target, report=logger.info)
            for shard in sharded.manifest.shards:
                self.stat_update("tokens", value=shard.tokens, unit="shard")


def _absolute(data: DataSettings) -> DataSettings:
    """Name folders so that they are found whatever folder a task runs in."""
    root, cache_dir = Path(data.root).absolute(), Path(data.cache_dir).absolute()
    return replace(data, root=str(root), cache_dir=str(cache_dir))
