"""Speed and memory of GPUs, as their maker publishes them.

CPUs are left out, because the speed of one model depends on its other load.
"""

from __future__ import annotations

from dataclasses import dataclass

from mipha.lookup import near_names


@dataclass(frozen=True)
class DeviceEntry:
    """The published figures of a GPU.

    Args:
        reported_names: Names that `torch.cuda.get_device_name` gives it.
        bfloat16_tflops: Matrix products of bfloat16 summed in float32, dense, 10^12 FLOP/s; None
            where the hardware has none.
        float32_tflops: Products of float32 without TF32, as torch computes by default.
        memory_gb: Gigabytes of 10^9 bytes. A driver shows more of HBM, and about this of GDDR with
            error correction.
        source: Document that prints these numbers.
    """

    reported_names: tuple[str, ...]
    bfloat16_tflops: float | None
    float32_tflops: float
    memory_gb: float
    source: str

    def tflops(self, dtype: str) -> float | None:
        """Return the peak in a type, `float32` or `bfloat16`; None where it has no such units."""
        assert dtype in ("float32", "bfloat16"), dtype
        return self.bfloat16_tflops if dtype == "bfloat16" else self.float32_tflops


# Half of the figure is entered where a sheet prints products of sparse matrices.
DEVICES: dict[str, DeviceEntry] = {
    "b200": DeviceEntry(
        ("NVIDIA B200",), 2250.0, 75.0, 180.0, "NVIDIA HGX B200 data sheet, one of eight"
    ),
    "h200": DeviceEntry(("NVIDIA H200",), 989.5, 67.0, 141.0, "NVIDIA H200 data sheet, SXM"),
    "h100": DeviceEntry(
        ("NVIDIA H100 80GB HBM3",), 989.5, 67.0, 80.0, "NVIDIA H100 data sheet, SXM"
    ),
    "h100-nvl": DeviceEntry(("NVIDIA H100 NVL",), 835.5, 60.0, 94.0, "NVIDIA H100 data sheet, NVL"),
    "h100-pcie": DeviceEntry(
        ("NVIDIA H100 PCIe",), 756.5, 51.0, 80.0, "NVIDIA H100 data sheet, PCIe"
    ),
    "a100": DeviceEntry(
        ("NVIDIA A100-SXM4-80GB",), 312.0, 19.5, 80.0, "NVIDIA A100 data sheet, 80 GB SXM"
    ),
    "a100-pcie": DeviceEntry(
        ("NVIDIA A100 80GB PCIe",), 312.0, 19.5, 80.0, "NVIDIA A100 data sheet, 80 GB PCIe"
    ),
    "a100-40gb": DeviceEntry(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        312.0,
        19.5,
        40.0,
        "NVIDIA A100 data sheet, 40 GB",
    ),
    "l40s": DeviceEntry(("NVIDIA L40S",), 362.0, 91.6, 48.0, "NVIDIA L40S data sheet"),
    "l4": DeviceEntry(("NVIDIA L4",), 121.0, 30.3, 24.0, "NVIDIA L4 data sheet"),
    "a10": DeviceEntry(("NVIDIA A10",), 125.0, 31.2, 24.0, "NVIDIA A10 data sheet"),
    "t4": DeviceEntry(
        ("Tesla T4",), None, 8.1, 16.0, "NVIDIA T4 data sheet; its 65 TFLOP/s are of float16"
    ),
    "v100": DeviceEntry(
        ("Tesla V100-SXM2-32GB", "Tesla V100-SXM2-16GB"),
        None,
        15.7,
        16.0,
        "NVIDIA V100 data sheet, SXM2; the smaller memory of two",
    ),
    "rtx-a6000": DeviceEntry(
        ("NVIDIA RTX A6000",), 154.8, 38.7, 48.0, "NVIDIA Ampere GA102 white paper"
    ),
    "rtx5090": DeviceEntry(
        ("NVIDIA GeForce RTX 5090",),
        209.5,
        104.8,
        32.0,
        "NVIDIA RTX Blackwell white paper, FP32 accumulate",
    ),
    "rtx4090": DeviceEntry(
        ("NVIDIA GeForce RTX 4090",),
        165.2,
        82.6,
        24.0,
        "NVIDIA Ada white paper, FP32 accumulate",
    ),
    "rtx4080": DeviceEntry(
        ("NVIDIA GeForce RTX 4080",),
        97.5,
        48.7,
        16.0,
        "NVIDIA Ada white paper, FP32 accumulate",
    ),
    "rtx3090": DeviceEntry(
        ("NVIDIA GeForce RTX 3090",),
        71.0,
        35.6,
        24.0,
        "NVIDIA Ampere GA102 white paper, FP32 accumulate",
    ),
}


def device_entry(name: str) -> DeviceEntry | None:
    """Return the entry of a device that plans know; None for `cpu`, which is this machine's.

    Raises:
        ValueError: There is no such device.
    """
    if name != "cpu" and name not in DEVICES:
        known = ["cpu", *DEVICES]
        near = [other for other in near_names(name, known) if other != "cpu"]
        hint = f"did you mean {' or '.join(near)}? Known" if near else "give its model"
        raise ValueError(f"no device {name!r}: {hint}: {', '.join(known)}")
    return DEVICES.get(name)


def device_reported_as(name: str) -> DeviceEntry | None:
    """Return the entry of a GPU by its name in the driver; None where the catalog has none."""
    return next((entry for entry in DEVICES.values() if name in entry.reported_names), None)
