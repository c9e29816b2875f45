"""Figures are sound SVG, follow the page's colour and keep an arm's colour."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kanlm.reporting.figures import (
    PALETTE,
    arm_style,
    curves_figure,
    forgetting_and_gain,
    learning_curves,
    loss_matrices,
)
from kanlm.reporting.study import read_study


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(e.itertext()).strip() for e in root.iter() if e.tag.endswith("}text")]


def test_a_domain_has_its_validation_and_training_on_one_axis(study_folder: Path) -> None:
    study = read_study(study_folder)
    pictures = learning_curves(study)
    assert [p.title for p in pictures] == ["prose, bits per byte", "code, bits per byte"]
    for picture, domain in zip(pictures, study.domains, strict=True):
        assert {"bits per byte", "step"} <= set(texts(picture.svg))
        for color in PALETTE[:3]:
            assert color.lower() in picture.svg.lower()
        (axes,) = curves_figure(study, domain)[0].axes
        # Of each arm: training in its own stage, two seeds and their mean.
        training, *_, mean = axes.lines[:4]
        run = next(r for r in study.runs if (r.arm, r.domain) == ("kan", domain))
        start = 0 if domain == "prose" else 600
        trained = [line["step"] + start for line in run.lines["train"]]
        assert np.asarray(training.get_xdata()).tolist() == trained
        by_seed = [
            [line["bits_per_byte"] for line in r.lines["train"]]
            for r in study.arm_runs("kan")
            if r.domain == domain
        ]
        np.testing.assert_allclose(np.asarray(training.get_ydata()), np.mean(by_seed, axis=0))
        # Validated in both stages, every hundred steps.
        assert np.asarray(mean.get_xdata()).tolist() == list(range(100, 1000, 100))
        low, high = axes.get_ylim()
        shown = np.asarray(mean.get_ydata(), dtype=float)
        assert low < shown.min() < shown.max() < high


def test_every_seed_is_drawn_beside_the_mean(
    tmp_path: Path, study_maker: Callable[..., Path]
) -> None:
    def lines(seeds: tuple[int, ...]) -> int:
        folder = study_maker(tmp_path / f"{len(seeds)}", arms=("kan",), seeds=seeds)
        svg = learning_curves(read_study(folder))[0].svg
        root = ElementTree.fromstring(svg)
        style = f"stroke: {PALETTE[0].lower()}"
        drawn = [(e.get("style") or "").lower() for e in root.iter() if e.tag.endswith("}path")]
        return sum(style in each and "fill: none" in each for each in drawn)

    assert lines((0, 1, 2)) - lines((0,)) == 3


def test_heat_maps_write_every_cell(study_folder: Path) -> None:
    study = read_study(study_folder)
    pictures = loss_matrices(study)
    assert [p.arm for p in pictures] == ["kan", "swiglu", "gelu"]
    matrix = study.results["arms"]["kan"]["bits_per_byte"]
    written = texts(pictures[0].svg)
    for row in matrix:
        assert {f"{value:.3f}" for value in row} <= set(written)
    assert f"+{matrix[1][0] - matrix[0][0]:.3f}" in written
    assert f"−{matrix[0][1] - matrix[1][1]:.3f}" in written


def test_what_was_not_measured_is_a_dash_in_the_pages_colour(study_folder: Path) -> None:
    study = read_study(study_folder)
    study.results["arms"]["kan"]["bits_per_byte"][0][1] = None
    svg = loss_matrices(study)[0].svg
    # The cell itself, and both changes that it would be part of.
    dashes = [e for e in ElementTree.fromstring(svg).iter() if "".join(e.itertext()) == "–"]
    leaves = [e for e in dashes if e.tag.endswith("}text")]
    assert len(leaves) == 3
    assert all("currentColor" in (e.get("style") or "") for e in leaves)


def test_one_stage_has_no_matrix_and_nothing_to_forget(
    tmp_path: Path, study_maker: Callable[..., Path]
) -> None:
    study = read_study(study_maker(tmp_path / "study", stages=1))
    assert loss_matrices(study) == forgetting_and_gain(study) == []
    assert "trained on prose" not in texts(learning_curves(study)[0].svg)
    two = read_study(study_maker(tmp_path / "two"))
    assert {"trained on prose", "trained on code"} <= set(texts(learning_curves(two)[0].svg))
    assert learning_curves(two)[0].key == ""


def test_text_takes_the_pages_colour_and_no_size_is_fixed(study_folder: Path) -> None:
    study = read_study(study_folder)
    for picture in [*learning_curves(study), *loss_matrices(study), *forgetting_and_gain(study)]:
        root = ElementTree.fromstring(picture.svg)
        assert root.get("width") is root.get("height") is None
        assert root.get("viewBox")
        assert "currentColor" in picture.svg
        assert "#010203" not in picture.svg


def test_arms_differ_in_colour_or_marker() -> None:
    arms = [f"arm {i}" for i in range(30)]
    styles = {tuple(arm_style(arms, arm).values()) for arm in arms}
    assert len(styles) == 30
