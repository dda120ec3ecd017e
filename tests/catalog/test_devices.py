"""Devices: found by their names in the driver, and plausible."""

from __future__ import annotations

import pytest

from mipha.catalog.devices import DEVICES, device_reported_as


def test_a_device_is_found_by_what_the_driver_calls_it() -> None:
    assert device_reported_as("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert device_reported_as("NVIDIA H100 PCIe") is DEVICES["h100-pcie"]
    assert device_reported_as("some other device") is None
    names = [name for entry in DEVICES.values() for name in entry.reported_names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", DEVICES)
def test_an_entry_is_plausible_and_has_a_source(name: str) -> None:
    entry = DEVICES[name]
    assert entry.source and entry.reported_names
    assert 5 < entry.float32_tflops < 200 and 8 <= entry.memory_gb <= 300
    # Twice and more what single float32 units do; sparse figures, double again, would stand out.
    assert entry.bfloat16_tflops is None or 1.9 < entry.bfloat16_tflops / entry.float32_tflops < 31
    assert (
        entry.tflops("float32") == entry.float32_tflops
        and entry.tflops("bfloat16") == entry.bfloat16_tflops
    )
