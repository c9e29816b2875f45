"""`kanlm compare`: every arm on identical batches, once or with a sweep, and a table."""

from pathlib import Path

from kanlm.config import Config
from kanlm.data.corpus import open_tokenizer
from kanlm.data.tokenizer import vocabulary_size
from kanlm.errors import UserError
from kanlm.experiments import study
from kanlm.experiments.collect import collect
from kanlm.model.accounting import account
from kanlm.reporting.page import write_report
from kanlm.reporting.table import print_accounting, print_results
from kanlm.slow_notices import announce_if_slow
from kanlm.training.run_folder import lock_folder
from kanlm.training.tracking import print_line


def compare(config: Config) -> Path:
    """Train all arms of a resolved config and write results.json and report.html.

    Returns the study's folder.

    Raises:
        UserError: the config names stages, which belong to `kanlm continual`, or another job
            is at work in the folder.
    """
    check_stages(config)
    with lock_folder(Path(config.output_dir)):
        return conclude(config, study.run(config, []))


def check_stages(config: Config) -> None:
    """Check that nothing is to be learned afterwards.

    Raises:
        UserError: see `compare`.
    """
    if config.study is not None and config.study.stages:
        raise UserError("study.stages belongs to `kanlm continual`; leave it out to compare")


def conclude(config: Config, finished: study.Finished) -> Path:
    """Write results.json and report.html of a study, print the tables, say where."""
    folder = Path(config.output_dir)
    with announce_if_slow("putting the results of all runs together", print_line):
        collect(config, finished)
    with announce_if_slow("writing the report", print_line):
        report = write_report(folder)
    print_results(folder / "results.json")
    print(f"results  {folder / 'results.json'}\nreport   {report}")
    return folder


def dry_run(config: Config) -> None:
    """Print the accounting of every arm: nothing is trained.

    Raises:
        UserError: a setting for which the study itself would be refused.
    """
    arms = study.plan(config)
    assert config.study is not None
    for arm in arms:
        study.check_settings(arm, config.study.stages)
    accounts = {}
    for arm in arms:
        size = arm.config.model.vocab_size
        if size is None:
            size = vocabulary_size(open_tokenizer(arm.config.tokenizer, arm.config.data))
        accounts[arm.name] = account(arm.config.model, size)
    print_accounting(accounts)
