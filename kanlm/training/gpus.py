"""What GPUs can do at best: memory, and operations a second by precision.

Dense peaks of the makers' data sheets, without the factor two of structured sparsity that
some of them print; tensor cores add up in float32. Model FLOPs utilisation is a share of
these, and `kanlm plan` sizes jobs by them. None of the figures was measured here.
"""

from dataclasses import dataclass

from kanlm.errors import UserError, nearest


@dataclass(frozen=True)
class GPU:
    """One kind of GPU."""

    memory_bytes: int
    #: Operations a second in bfloat16, TF32 and float32, a multiply-add counting two.
    bf16: float
    tf32: float
    fp32: float
    #: Where the figures are from.
    source: str

    def peak(self, precision: str, *, tf32: bool) -> float | None:
        """Operations a second for `training.precision`; None where the table has none.

        Args:
            tf32: whether products of float32 matrices may use TF32.
        """
        if precision == "fp32":
            return self.tf32 if tf32 else self.fp32
        return self.bf16 if precision == "bf16" else None


_A100 = "NVIDIA A100 Tensor Core GPU data sheet, June 2021"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture, v1.04, table 2"
_ADA = "NVIDIA Ada GPU Architecture, v2.1, appendix A"

#: By the name that users give.
GPUS = {
    "a100-40gb": GPU(40 * 10**9, 312e12, 156e12, 19.5e12, _A100),
    "a100-80gb": GPU(80 * 10**9, 312e12, 156e12, 19.5e12, _A100),
    "h100": GPU(80 * 10**9, 989.4e12, 494.7e12, 66.9e12, f"{_H100}, SXM5"),
    "h100-pcie": GPU(80 * 10**9, 756e12, 378e12, 51.2e12, f"{_H100}, PCIe"),
    "h200": GPU(141 * 10**9, 989.4e12, 494.7e12, 66.9e12, "NVIDIA H200 data sheet, SXM"),
    "b200": GPU(180 * 10**9, 2250e12, 1100e12, 75e12, "NVIDIA HGX B200 data sheet"),
    "l4": GPU(24 * 10**9, 121e12, 60.5e12, 30.3e12, "NVIDIA L4 data sheet"),
    "l40s": GPU(48 * 10**9, 362e12, 183e12, 91.6e12, "NVIDIA L40S data sheet"),
    "rtx-3090": GPU(24 * 10**9, 71e12, 35.6e12, 35.6e12, "NVIDIA Ampere GA102, v2.1, appendix A"),
    "rtx-4090": GPU(24 * 10**9, 165.2e12, 82.6e12, 82.6e12, _ADA),
}

#: What torch calls them. Names that only begin alike are other GPUs.
_REPORTED = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
}


def gpu(name: str) -> GPU:
    """The GPU that a user names.

    Raises:
        UserError: it is not in the table, with the nearest that is.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name} is unknown{nearest(name.lower(), GPUS)}")
    return GPUS[name.lower()]


def reported_gpu(name: str) -> GPU | None:
    """The GPU that `torch.cuda.get_device_name` calls so, or None where the table lacks it."""
    key = _REPORTED.get(name)
    return None if key is None else GPUS[key]
