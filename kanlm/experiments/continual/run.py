"""`kanlm continual`: every arm on one domain after another, and what each forgot.

Stage 0 is pretraining on `data`; each of `study.stages` then fine-tunes the model of the
stage before. After every stage the model is measured on the held-out text of all domains.
"""

from pathlib import Path

from kanlm.config import Config
from kanlm.errors import UserError
from kanlm.experiments import study
from kanlm.experiments.compare import conclude
from kanlm.training.run_folder import lock_folder


def continual(config: Config) -> Path:
    """Train all arms of a resolved config through all stages, and write the results.

    Returns the study's folder.

    Raises:
        UserError: there is no stage after pretraining, or another job is at work in the folder.
    """
    check_stages(config)
    assert config.study is not None
    with lock_folder(Path(config.output_dir)):
        return conclude(config, study.run(config, config.study.stages))


def check_stages(config: Config) -> None:
    """Check that there is something to learn afterwards.

    Raises:
        UserError: see `continual`.
    """
    if config.study is None or not config.study.stages:
        raise UserError("study.stages is empty: name the domains that follow pretraining")
