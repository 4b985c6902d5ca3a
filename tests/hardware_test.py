"""The catalogue against bus widths, clocks and the relations datasheets keep."""

import pytest

from ternax.configs.hardware import ALIASES, DEVICES, LINKS, get_device
from ternax.errors import UsageError


@pytest.mark.parametrize(
    "name, bits, gbit_per_s",
    [("l40s", 384, 18), ("rtx4090", 384, 21), ("rtx3090", 384, 19.5), ("a100-40-sxm", 5120, 2.43)],
)
def test_bandwidth_is_bus_width_times_pin_rate(name, bits, gbit_per_s):
    assert get_device(name).bandwidth_gb_per_s == pytest.approx(bits * gbit_per_s / 8, rel=1e-3)


def test_server_sockets_by_their_channels_and_clocks():
    assert get_device("epyc-9654").bandwidth_gb_per_s == pytest.approx(12 * 4.8 * 8)
    assert get_device("x86-server").bandwidth_gb_per_s == pytest.approx(8 * 4.8 * 8)
    assert get_device("x86-server").peak_tflops["int8"] == pytest.approx(
        32 * 2.5 * 2048 / 1e3, rel=1e-3
    )


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_every_entry_is_whole(device):
    assert device.source and device.title and 2015 < device.year < 2030
    assert device.memory_bytes_at_most > device.memory_gb * 1e9 > 1e9
    assert 100 < device.bandwidth_gb_per_s < 10_000 and device.watts > 0
    peaks = device.peak_tflops
    # Half as wide is never slower; a dense rate of twice the width is at least half.
    for wide, narrow in (("fp32", "fp16"), ("fp16", "fp8"), ("fp16", "int8"), ("fp8", "fp4")):
        if wide in peaks and narrow in peaks:
            assert peaks[narrow] >= peaks[wide]
    assert (device.usd_per_h is None) or device.price_source


def test_links():
    """NVLink 4's 900 GB/s, both ways, are seven times PCIe 5.0 x16."""
    assert LINKS["nvlink4"].gb_per_s / LINKS["pcie5"].gb_per_s == pytest.approx(7.03, abs=0.01)
    assert get_device("h100").fastest_link is LINKS["nvlink4"]
    assert get_device("l40s").fastest_link is LINKS["pcie4"]
    # A bridge stands between two cards.
    assert get_device("h100-pcie").link_between(2).name == "NVLink 4 bridge"
    assert get_device("h100-pcie").link_between(4) is LINKS["pcie5"]
    assert get_device("m1-pro").link_between(2) is None


def test_names():
    assert {get_device(name).name for name in ALIASES} <= set(DEVICES)
    assert get_device("H100").name == "h100-sxm"
    with pytest.raises(UsageError, match="no device is named 'h1000'; nearest: h100"):
        get_device("h1000")
