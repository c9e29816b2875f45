"""Every recipe in configs/ resolves, builds, and takes steps on text that is here."""

import json
from pathlib import Path

import pytest

from kanlm.cli import main
from kanlm.config import load, to_tree
from kanlm.experiments.study import plan
from kanlm.training.resolve import resolve

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolves_and_builds_on_the_meta_device(path: Path):
    config = resolve(load(path))
    assert resolve(config) == config
    assert all(spec["hidden"] for spec in config.model.feed_forward_by_layer)
    if config.study is not None:
        for arm in plan(config):
            assert to_tree(arm.config)["study"] is None


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if load(p).initialize_from is None], ids=lambda path: path.stem
)
def test_takes_two_steps(path: Path, tmp_path: Path):
    text = "".join(
        f"{n} bottles of beer on the wall, {n} bottles of beer.\n\n\n" for n in range(2999)
    )
    (tmp_path / "text.txt").write_text(text)
    source = f"{{kind: files, path: {tmp_path}/text.txt, separator: '\\n\\n\\n'}}"
    main(
        [
            "pretrain", str(path), "shrink=true", f"output_dir={tmp_path}/run",
            f"data.cache_dir={tmp_path}/cache", f"data.sources=[{source}]",
            "data.validation_fraction=0.1", "evaluation.split=validation",
            "tracking.wandb=disabled",
        ]
    )  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if json.loads(line)["kind"] == "train"]
    assert steps[-1] == 2
