"""Cards: what the makers' data sheets say of their GPUs, and which card a name means."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from lumen.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """A GPU in a machine of its kind, as the makers' data sheets have them; speeds are one way and
    of one GPU."""

    flops: float  # FLOP/s of dense 16-bit matmuls, no sparsity
    fp32: float  # FLOP/s in fp32, which Lumen does not round to TF32
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to the other GPUs of its machine
    network: float  # bytes/s to other machines
    per_node: int  # GPUs in a machine
    source: str

    def peak(self, precision: str) -> float:
        return self.fp32 if precision == "fp32" else self.flops


# Gigabytes a second, one way: 16 lanes of PCIe 4; and a GPU's share of a machine's 10 Gbit/s,
# assumed where a maker names no network.
PCIE = 32
ETHERNET = 1.25 / 8

NO_BF16 = ("v100", "t4")
NO_FP8 = (*NO_BF16, "a100-80gb", "a100-40gb", "3090", "a10g")

# SXM parts where there are several: PCIe ones are slower. 16-bit FLOPs, memory and bandwidth of
# b200 (its DGX), h200, h100, a100-80gb, l40s and rtx4090 agree with the tables of the book Machine
# Learning Engineering (Bekman); v100, l4, t4, NVLink (2 to 5) and InfiniBand (HDR, NDR) with other
# public ones; a10g's and 3090's matrices are from memory.
#
# Columns: TFLOP/s of 16-bit matmuls and of fp32; GB; GB/s of memory, link and network; GPUs in a
# machine; source.
# fmt: off
SHEETS = {
    "b200": (2250, 75, 180, 8000, 900, 50, 8, "NVIDIA DGX B200 and HGX B200 data sheets"),
    "h200": (989, 67, 141, 4800, 450, 50, 8, "NVIDIA H200 SXM and DGX H200 data sheets"),
    "h100": (989, 67, 80, 3350, 450, 50, 8, "NVIDIA H100 SXM and DGX H100 data sheets"),
    "a100-80gb": (312, 19.5, 80, 2039, 300, 25, 8, "NVIDIA A100 80GB and DGX A100 data sheets"),
    "a100-40gb": (312, 19.5, 40, 1555, 300, 25, 8, "NVIDIA A100 40GB and DGX A100 data sheets"),
    "l40s": (362, 91.6, 48, 864, PCIE, ETHERNET, 8, "NVIDIA L40S data sheet; network assumed"),
    "rtx4090": (
        165, 82.6, 24, 1008, PCIE, ETHERNET, 8, "NVIDIA Ada paper; machine, network assumed"
    ),
    "3090": (71, 35.6, 24, 936, PCIE, ETHERNET, 8, "NVIDIA GA102 paper; machine, network assumed"),
    "a10g": (70, 31.2, 24, 600, PCIE, ETHERNET, 8, "AWS G5 page; network assumed"),
    "v100": (125, 15.7, 32, 900, 150, 6.25, 8, "NVIDIA V100 SXM2 and DGX-1 data sheets"),
    "l4": (121, 30.3, 24, 300, PCIE, ETHERNET, 8, "NVIDIA L4 data sheet; network assumed"),
    "t4": (65, 8.1, 16, 320, PCIE / 2, 2 * ETHERNET, 4, "NVIDIA T4 data sheet; network assumed"),
}
# fmt: on


def in_plain_units(row: tuple) -> Hardware:
    """A row of SHEETS in FLOP/s, bytes and bytes/s."""
    tflops, fp32, gigabytes, bandwidth, link, network, per_node, source = row
    return Hardware(
        flops=tflops * 1e12,
        fp32=fp32 * 1e12,
        memory=gigabytes * 1e9,
        bandwidth=bandwidth * 1e9,
        link=link * 1e9,
        network=network * 1e9,
        per_node=per_node,
        source=source,
    )


HARDWARE = {name: in_plain_units(row) for name, row in SHEETS.items()}

# words of a name that tell no two rows apart
MAKERS = re.compile(r"nvidia|tesla|geforce|gpu|sxm\d*|hbm3e?|rtx|")


def name_words(name: str) -> set[str]:
    """What a card's name says beyond its maker: NVIDIA A100-SXM4-80GB -> a100, 80gb."""
    words = re.split(r"[^a-z0-9]+", name.lower().replace("rtx", "rtx "))
    return {word for word in words if not MAKERS.fullmatch(word)}


def data_sheet(name: str) -> Hardware | None:
    """The table's row for a GPU by the name that torch gives it, every word of which must be the
    row's.

    An H100 PCIe, a slice of one (MIG), a GH200, a 3090 Ti, an RTX 4090 Laptop are other cards,
    whose speed is not known here.
    """
    words = name_words(name)
    for key, row in HARDWARE.items():
        if name_words(key) <= words <= name_words(key) | {gigabytes(row)}:
            return row
    return None


def gigabytes(row: Hardware) -> str:
    return f"{row.memory / 1e9:.0f}gb"


def hardware_key(name: str) -> str:
    """The table's key for a card as somebody types it (rtx3090, tesla-v100); cpu and measured are
    themselves.

    UserError E002 names those that it may be: more than one (a100), or some that are spelt alike.
    """
    key = name.lower().replace("_", "-")
    if key in ("measured", "cpu", *HARDWARE):
        return key
    words, fitting = name_words(key), []
    for other, row in HARDWARE.items():
        if words and words <= name_words(other) | {gigabytes(row)}:
            fitting.append(other)
    if len(fitting) == 1:
        return fitting[0]
    hint = f"it may be {' or '.join(fitting)}; " if fitting else ""
    if not fitting and (near := difflib.get_close_matches(key, HARDWARE, 1, 0.8)):
        hint = f"did you mean {near[0]}? "
    text = f"hardware: {name!r} is not known; {hint}known: {', '.join(HARDWARE)}, cpu, measured"
    text += "; for another card give the nearest with --peak_flops and --memory_gb"
    raise UserError("E002", text)
