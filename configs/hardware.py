"""The catalogue of devices: literals with their sources, dense peaks alone.

GB and TFLOP are 1e9 and 1e12. A peak counts a multiply-add as two operations and never
sparsity 2:4. Prices move by the month: each says when and where it was asked.
"""

import dataclasses

from ternax.configs import nearest
from ternax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins devices.

    Attributes:
      gb_per_s: bandwidth in one direction, half of what is advertised.
      joins: so many devices at most; a bridge stands between two cards.
    """

    name: str
    gb_per_s: float
    joins: int = 72


PCIE_4 = Link("PCIe 4.0 x16", 32.0)
PCIE_5 = Link("PCIe 5.0 x16", 64.0)
NVLINK_3 = Link("NVLink 3", 300.0)
NVLINK_4 = Link("NVLink 4", 450.0)
NVLINK_5 = Link("NVLink 5", 900.0)
LINKS = {
    "pcie4": PCIE_4,
    "pcie5": PCIE_5,
    "nvlink3": NVLINK_3,
    "nvlink4": NVLINK_4,
    "nvlink5": NVLINK_5,
}

# What multiplies operands that a device has no unit for: the next wider type.
WIDER = {"fp4": "fp8", "fp8": "fp16", "int4": "int8", "int8": "fp16", "fp16": "fp32"}

RUNPOD = "RunPod, March 2026 (deploybase.ai/articles/runpod-gpu-pricing)"


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator, or one processor socket.

    Attributes:
      name: what a command line calls it.
      title: what its maker calls it.
      year: when it was first sold.
      memory_gb: its memory as advertised. Makers mean 2**30 bytes, of which drivers and error
        correction take some: `memory_bytes_at_most`.
      bandwidth_gb_per_s: of that memory, by the datasheet.
      peak_tflops: type of the operands -> dense peak with a 32-bit accumulator; fp16 also
        stands for bf16, int8 and int4 count integer operations.
      watts: board or package power.
      link: to its siblings; None: the PCIe bus alone.
      pcie: the bus, or None.
      usd_per_h, spot_usd_per_h: price of an hour as `price_source` has it, or None.
      source: of the rest.
    """

    name: str
    title: str
    year: int
    memory_gb: float
    bandwidth_gb_per_s: float
    peak_tflops: dict[str, float]
    watts: float
    source: str
    link: Link | None = None
    pcie: Link | None = None
    usd_per_h: float | None = None
    spot_usd_per_h: float | None = None
    price_source: str = RUNPOD

    @property
    def memory_bytes_at_most(self) -> float:
        """What no program can exceed: an RTX 4090 shows 24,564 MiB, an H100 81,559 MiB."""
        return self.memory_gb * 2**30

    @property
    def fastest_link(self) -> Link | None:
        """What two tensor-parallel siblings talk over."""
        return self.link_between(2)

    def link_between(self, devices: int) -> Link | None:
        """What so many siblings talk over: their own link where it joins that many."""
        return self.link if self.link and devices <= self.link.joins else self.pcie

    def operands(self, wanted: str) -> str:
        """The type that multiplies operands of `wanted` here: itself, or the next wider one."""
        while wanted not in self.peak_tflops:
            wanted = WIDER[wanted]
        return wanted


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="rtx3090",
            title="NVIDIA GeForce RTX 3090",
            year=2020,
            memory_gb=24.0,
            bandwidth_gb_per_s=936.0,
            peak_tflops={"fp32": 35.6, "fp16": 71.0, "int8": 284.0, "int4": 568.0},
            watts=350.0,
            link=Link("NVLink 3 bridge", 56.25, joins=2),
            pcie=PCIE_4,
            usd_per_h=0.39,
            spot_usd_per_h=0.22,
            source="NVIDIA GA102 whitepaper: FP32 accumulation halves the FP16 rate",
        ),
        Device(
            name="rtx4090",
            title="NVIDIA GeForce RTX 4090",
            year=2022,
            memory_gb=24.0,
            bandwidth_gb_per_s=1008.0,
            peak_tflops={"fp32": 82.6, "fp16": 165.2, "fp8": 330.3, "int8": 660.6, "int4": 1321.2},
            watts=450.0,
            pcie=PCIE_4,
            usd_per_h=0.6,
            spot_usd_per_h=0.34,
            source="NVIDIA Ada whitepaper, at boost; FP32 accumulation halves FP16 and FP8",
        ),
        Device(
            name="rtx6000ada",
            title="NVIDIA RTX 6000 Ada",
            year=2022,
            memory_gb=48.0,
            bandwidth_gb_per_s=960.0,
            peak_tflops={"fp32": 91.1, "fp16": 364.2, "fp8": 728.5, "int8": 728.5, "int4": 1457.0},
            watts=300.0,
            pcie=PCIE_4,
            usd_per_h=0.77,
            price_source="marketplaces, order of magnitude, unverified",
            source="NVIDIA RTX 6000 Ada datasheet, whose 1457 TFLOP/s FP8 are sparse",
        ),
        Device(
            name="l4",
            title="NVIDIA L4",
            year=2023,
            memory_gb=24.0,
            bandwidth_gb_per_s=300.0,
            peak_tflops={"fp32": 30.3, "fp16": 121.0, "fp8": 242.5, "int8": 242.5, "int4": 485.0},
            watts=72.0,
            pcie=PCIE_4,
            usd_per_h=0.78,
            spot_usd_per_h=0.44,
            source="NVIDIA L4 datasheet, sparse figures halved",
        ),
        Device(
            name="a10g",
            title="NVIDIA A10G (AWS g5)",
            year=2021,
            memory_gb=24.0,
            bandwidth_gb_per_s=600.0,
            peak_tflops={"fp32": 35.0, "fp16": 70.0, "int8": 140.0, "int4": 280.0},
            watts=300.0,
            pcie=PCIE_4,
            usd_per_h=1.006,
            price_source="AWS g5.xlarge, us-east-1, list price, unverified",
            source="AWS g5 instances (300 W in nvidia-smi); llm-analysis a10g-pcie-24gb.json",
        ),
        Device(
            name="l40s",
            title="NVIDIA L40S",
            year=2023,
            memory_gb=48.0,
            bandwidth_gb_per_s=864.0,
            peak_tflops={
                "fp32": 91.6,
                "tf32": 183.0,
                "fp16": 362.05,
                "fp8": 733.0,
                "int8": 733.0,
                "int4": 733.0,
            },
            watts=350.0,
            pcie=PCIE_4,
            usd_per_h=1.4,
            spot_usd_per_h=0.79,
            source="NVIDIA L40S datasheet, sparse figures halved; 384 bit x 18 Gb/s",
        ),
        Device(
            name="a100-40-pcie",
            title="NVIDIA A100 40GB PCIe",
            year=2020,
            memory_gb=40.0,
            bandwidth_gb_per_s=1555.0,
            peak_tflops={"fp32": 19.5, "tf32": 156.0, "fp16": 312.0, "int8": 624.0, "int4": 1248.0},
            watts=250.0,
            link=Link("NVLink 3 bridge", 300.0, joins=2),
            pcie=PCIE_4,
            usd_per_h=1.29,
            price_source="on demand, order of magnitude, unverified",
            source="NVIDIA A100 datasheet",
        ),
        Device(
            name="a100-40-sxm",
            title="NVIDIA A100 40GB SXM4",
            year=2020,
            memory_gb=40.0,
            bandwidth_gb_per_s=1555.0,
            peak_tflops={"fp32": 19.5, "tf32": 156.0, "fp16": 312.0, "int8": 624.0, "int4": 1248.0},
            watts=400.0,
            link=NVLINK_3,
            pcie=PCIE_4,
            usd_per_h=1.29,
            price_source="on demand, order of magnitude, unverified",
            source="NVIDIA A100 datasheet",
        ),
        Device(
            name="a100-80-pcie",
            title="NVIDIA A100 80GB PCIe",
            year=2021,
            memory_gb=80.0,
            bandwidth_gb_per_s=1935.0,
            peak_tflops={"fp32": 19.5, "tf32": 156.0, "fp16": 312.0, "int8": 624.0, "int4": 1248.0},
            watts=300.0,
            link=Link("NVLink 3 bridge", 300.0, joins=2),
            pcie=PCIE_4,
            usd_per_h=2.1,
            spot_usd_per_h=1.19,
            source="NVIDIA A100 datasheet",
        ),
        Device(
            name="a100-80-sxm",
            title="NVIDIA A100 80GB SXM4",
            year=2020,
            memory_gb=80.0,
            bandwidth_gb_per_s=2039.0,
            peak_tflops={"fp32": 19.5, "tf32": 156.0, "fp16": 312.0, "int8": 624.0, "int4": 1248.0},
            watts=400.0,
            link=NVLINK_3,
            pcie=PCIE_4,
            usd_per_h=2.45,
            spot_usd_per_h=1.39,
            source="NVIDIA A100 datasheet",
        ),
        Device(
            name="h100-pcie",
            title="NVIDIA H100 80GB PCIe",
            year=2022,
            memory_gb=80.0,
            bandwidth_gb_per_s=2000.0,
            peak_tflops={"fp32": 51.2, "fp16": 756.0, "fp8": 1513.0, "int8": 1513.0},
            watts=350.0,
            link=Link("NVLink 4 bridge", 300.0, joins=2),
            pcie=PCIE_5,
            usd_per_h=3.51,
            spot_usd_per_h=1.99,
            source="NVIDIA H100 datasheet, sparse figures halved",
        ),
        Device(
            name="h100-sxm",
            title="NVIDIA H100 80GB SXM5",
            year=2022,
            memory_gb=80.0,
            bandwidth_gb_per_s=3350.0,
            peak_tflops={"fp32": 66.9, "fp16": 989.4, "fp8": 1978.9, "int8": 1978.9},
            watts=700.0,
            link=NVLINK_4,
            pcie=PCIE_5,
            usd_per_h=4.76,
            spot_usd_per_h=2.69,
            source="NVIDIA H100 datasheet, sparse figures halved",
        ),
        Device(
            name="h200-sxm",
            title="NVIDIA H200 141GB SXM5",
            year=2024,
            memory_gb=141.0,
            bandwidth_gb_per_s=4800.0,
            peak_tflops={"fp32": 66.9, "fp16": 989.4, "fp8": 1978.9, "int8": 1978.9},
            watts=700.0,
            link=NVLINK_4,
            pcie=PCIE_5,
            usd_per_h=6.35,
            spot_usd_per_h=3.59,
            source="NVIDIA H200 datasheet, sparse figures halved",
        ),
        Device(
            name="b200",
            title="NVIDIA B200 SXM (HGX)",
            year=2025,
            memory_gb=180.0,
            bandwidth_gb_per_s=8000.0,
            peak_tflops={
                "fp32": 75.0,
                "fp16": 2250.0,
                "fp8": 4500.0,
                "int8": 4500.0,
                "fp4": 9000.0,
            },
            watts=1000.0,
            link=NVLINK_5,
            pcie=PCIE_5,
            usd_per_h=10.57,
            spot_usd_per_h=5.98,
            source="NVIDIA DGX B200 datasheet over 8 (1440 GB, 64 TB/s), sparse figures halved",
        ),
        Device(
            name="dgx-spark",
            title="NVIDIA DGX Spark (GB10)",
            year=2025,
            memory_gb=128.0,
            bandwidth_gb_per_s=273.0,
            peak_tflops={"fp32": 31.0, "fp16": 125.0, "fp8": 250.0, "int8": 250.0, "fp4": 500.0},
            watts=140.0,
            link=Link("ConnectX-7, 2 x 200 GbE", 50.0),
            usd_per_h=0.152,
            price_source="$3,999 over three years, power not counted",
            source="NVIDIA DGX Spark: 1 PFLOP/s FP4 sparse, other types by halving; Hot Chips",
        ),
        Device(
            name="m1-pro",
            title="Apple M1 Pro (16-core GPU)",
            year=2021,
            memory_gb=32.0,
            bandwidth_gb_per_s=200.0,
            peak_tflops={"fp32": 5.3, "fp16": 5.3},
            watts=30.0,
            source="Apple M1 Pro, October 2021, 16-core GPU; power is the package's, typical",
        ),
        Device(
            name="m2-ultra",
            title="Apple M2 Ultra (76-core GPU)",
            year=2023,
            memory_gb=192.0,
            bandwidth_gb_per_s=800.0,
            peak_tflops={"fp32": 27.2, "fp16": 27.2},
            watts=295.0,
            source="Apple M2 Ultra, June 2023, 76-core GPU; power is a Mac Studio's",
        ),
        Device(
            name="x86-server",
            title="x86 server socket, 32 cores with AMX, 8 x DDR5-4800",
            year=2023,
            memory_gb=512.0,
            bandwidth_gb_per_s=307.2,
            peak_tflops={"fp32": 5.1, "int8": 163.8},
            watts=270.0,
            pcie=PCIE_5,
            source="derived: 8 x DDR5-4800; 32 cores at 2.5 GHz, AMX 2048 int8 operations a cycle",
        ),
        Device(
            name="epyc-9654",
            title="AMD EPYC 9654 (96 cores, 12x DDR5-4800)",
            year=2022,
            memory_gb=768.0,
            bandwidth_gb_per_s=460.8,
            peak_tflops={"fp32": 7.4, "int8": 29.5},
            watts=360.0,
            pcie=PCIE_5,
            source="derived: 12 x DDR5-4800; 96 cores at 2.4 GHz, 32 FP32 and 128 int8 op a cycle",
        ),
    )
}
ALIASES = {
    "3090": "rtx3090",
    "4090": "rtx4090",
    "a100": "a100-80-sxm",
    "a100-40": "a100-40-sxm",
    "a100-80": "a100-80-sxm",
    "h100": "h100-sxm",
    "h200": "h200-sxm",
    "spark": "dgx-spark",
}


def get_device(name: str) -> Device:
    """The named device. Raises UsageError naming the nearest ones."""
    device = DEVICES.get(ALIASES.get(name.lower(), name.lower()))
    if device is None:
        near = ", ".join(nearest(name.lower(), [*DEVICES, *ALIASES]))
        raise UsageError(f"no device is named {name!r}; nearest: {near}")
    return device
