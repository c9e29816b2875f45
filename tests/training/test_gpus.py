"""The table of GPUs, and who is in it."""

import pytest

from kanlm.errors import UserError
from kanlm.training.gpus import GPUS, gpu, reported_gpu


def test_unknown_names_are_refused_with_the_nearest():
    assert gpu("H200") is GPUS["h200"]
    with pytest.raises(UserError, match="--gpu h2000 is unknown; did you mean 'h200'"):
        gpu("h2000")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_name_that_begins_alike_is_another_gpu(name: str, key: str | None):
    assert reported_gpu(name) is (None if key is None else GPUS[key])


def test_peaks_by_precision():
    card = GPUS["a100-80gb"]
    assert card.peak("bf16", tf32=False) == 312e12
    assert card.peak("fp32", tf32=False) == 19.5e12
    assert card.peak("fp32", tf32=True) == 156e12
    assert card.peak("fp64", tf32=True) is None
