"""A corpus prepared by datatrove's local executor is the one that `kanlm data prepare` makes."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

import dill
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from kanlm.cli import main
from kanlm.config import Config, load
from kanlm.data.corpus import open_corpus, open_tokenizer
from kanlm.data.datatrove import JoinParts, TokeniseParts
from kanlm.errors import UserError

README = Path(__file__).parents[2] / "data" / "README.md"
CONFIG = """
data:
  domain: tales
  root: {root}
  cache_dir: {cache}
  sources:
    - {{kind: files, path: set/*.jsonl}}
    - {{kind: files, path: one.txt, weight: 0.5}}
evaluation:
  domains:
    - {{domain: others, root: {root}, cache_dir: {cache}, sources: [{{kind: hub, name: hub}}]}}
tokenizer: {{kind: bpe, vocab_size: 300}}
"""


@pytest.fixture
def root(tmp_path, stories, write_jsonl, monkeypatch):
    """Seven files, one that is a single document, and a dataset of two files."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    for folder, count in (("set", 7), ("hub", 2)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            path = tmp_path / folder / f"train-{number}.jsonl"
            write_jsonl(path, stories(90 * number + 50, seed=number))
    (tmp_path / "one.txt").write_text("".join(stories(400, seed=9)))
    return tmp_path


def configured(root: Path, cache: str) -> Config:
    path = root / f"{cache}.yaml"
    path.write_text(CONFIG.format(root=root, cache=root / cache))
    return load(path)


def run(step: PipelineStep, folder: Path, tasks: int, workers: int) -> None:
    LocalPipelineExecutor([step], tasks=tasks, workers=workers, logging_dir=str(folder)).run()


def content(cache: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def test_the_cache_is_that_of_data_prepare(root: Path, monkeypatch):
    configured(root, "here")
    main(["data", "prepare", str(root / "here.yaml")])
    config = configured(root, "there")
    run(TokeniseParts(config), root / "logs" / "tokenise", tasks=3, workers=2)
    parts = sorted(path.name for path in (root / "there").glob("*.parts-of-3/*.json"))
    assert parts == sorted([f"0000{part}.json" for part in range(3)] * 2)
    run(JoinParts(config), root / "logs" / "join", tasks=1, workers=1)
    # Without the near-duplicates, which are looked for when a corpus is opened.
    expected = content(root / "here")
    assert {name for name in expected if "manifest" in name}
    found = content(root / "there")
    assert found == {name: data for name, data in expected.items() if "near-dup" not in name}
    # A run finds it, and tokenises nothing.
    monkeypatch.setattr("kanlm.data.preparation.Encoder", None)
    tokenizer = open_tokenizer(config.tokenizer, config.data)
    for data in (config.data, *config.evaluation.domains):
        assert open_corpus(data, tokenizer).split("train").n_tokens > 0


def test_a_pipeline_pickled_for_slurm_writes_the_same_parts(root: Path, monkeypatch):
    """All but SLURM itself: what it is given to start is started here, in another folder."""
    config = configured(root, "here")
    run(TokeniseParts(config), root / "logs" / "local", 2, 1)
    launched = []

    def launch(script: str, *_: object) -> str:
        launched.append(script)
        return "1"

    monkeypatch.setattr("datatrove.executor.slurm.launch_slurm_job", launch)
    SlurmPipelineExecutor(
        [TokeniseParts(configured(root, "there"))],
        tasks=2,
        time="1:00:00",
        partition="cpu",
        logging_dir=str(root / "logs" / "slurm"),
        slurm_logs_folder=str(root / "logs"),
        # They would stay this process's.
        requeue_signals=None,
    ).run()
    pickled = root / "logs" / "slurm" / "executor.pik"
    assert f"launch_pickled_pipeline {pickled}" in launched[0]
    (root / "elsewhere").mkdir()
    monkeypatch.chdir(root / "elsewhere")
    monkeypatch.setenv("SLURM_NODELIST", "here")
    monkeypatch.setattr("datatrove.executor.slurm.expand_slurm_nodelist", str.split)
    for rank in range(2):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
        dill.loads(pickled.read_bytes()).run()
    found, expected = content(root / "there"), content(root / "here")
    assert len([name for name in found if "parts-of-2" in name]) == 2 * 2 * 3
    assert found == expected


def test_the_readme_launches_both_steps(root: Path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    configured(root, "there")
    monkeypatch.chdir(root)
    launched = []

    def launch(script: str, _: object, *options: str) -> str:
        launched.append((script, options))
        return str(len(launched))

    monkeypatch.setattr("datatrove.executor.slurm.launch_slurm_job", launch)
    exec(code.replace("configs/pretrain.yaml", "there.yaml"), {})
    jobs = [(script, options) for script, options in launched if "merge_stats" not in script]
    (tokenise, _), (join, options) = jobs
    assert "logs/tokenise/executor.pik" in tokenise
    assert "logs/join/executor.pik" in join
    assert any("afterok:1" in option for option in options)


def test_a_step_that_comes_in_between_is_refused(root: Path):
    step = TokeniseParts(configured(root, "there"))
    with pytest.raises(UserError, match="no documents of a step before it"):
        step.run(iter(()))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tasks = 2: expected 1"):
        JoinParts(configured(root, "there")).run(None, 0, 2)


def test_done_is_done(root: Path, monkeypatch):
    config = configured(root, "there")
    for logs in ("first", "again"):
        run(TokeniseParts(config), root / "logs" / logs, 2, 1)
        run(JoinParts(config), root / "logs" / f"{logs}-join", 1, 1)
        monkeypatch.setattr("kanlm.data.distributed_prepare.Encoder", None)
        stats = json.loads((root / "logs" / f"{logs}-join" / "stats.json").read_text())
        assert stats[0]["stats"]["tokens"]["total"] > 0
    assert not list((root / "there").glob("*.parts-of-*"))
