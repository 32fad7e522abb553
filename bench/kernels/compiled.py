"""What the compiler made of one kernel configuration, read from its binary: no GPU is needed.

Registers and spills come from `cuobjdump` and the SASS (NVIDIA) or the code object's metadata (AMD).
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORE = {
    "sm_80": r"\bHMMA\b",
    "sm_90": r"\b(HGMMA|HMMA)\b",
    "sm_100": r"\b(UTCHMMA|UTCQMMA|UTCMMA|UTC\w*MMA|HMMA)\b",
    "gfx942": r"\bv_mfma\w+",
}
WIDE_LOAD = {
    "sm_80": r"\b(LDGSTS\.E\S*128|LDG\.E\S*128)",
    "sm_90": r"\b(UTMALDG|LDGSTS\.E\S*128|LDG\.E\S*128)",
    "sm_100": r"\b(UTMALDG|LDGSTS\.E\S*128|LDG\.E\S*128)",
    "gfx942": r"\b(buffer_load_dwordx4|global_load_dwordx4)",
}


@dataclass(frozen=True)
class Variant:
    """One configuration of one kernel: what a launcher would pass, with every pointer and stride 16-byte aligned."""

    name: str
    kernel: Any
    family: str
    dtype: str
    types: dict[str, str]  # run-time argument → Triton type; "=1" marks an integer specialised to one
    constants: dict[str, Any]
    warps: int
    stages: int
    unaligned: tuple[str, ...] = ()
    matmul: bool = True  # whether tensor-core instructions are required
    blocks: int = 1  # resident blocks the tile table claims


@dataclass
class Facts:
    registers: int
    spills: int
    shared: int
    blocks: int
    tensor_core: int
    wide_loads: int
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def compile_variant(v: Variant) -> Any:
    """The compiled kernel, ahead of time, for the variant's family."""
    signature, constants, attrs = {}, dict(v.constants), {}
    for i, name in enumerate(v.kernel.arg_names):
        if name in v.constants:
            signature[name] = "constexpr"
        elif v.types[name] == "=1":
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = v.types[name]
            divisible = v.types[name].startswith("*") or v.types[name] in ("i32", "i64")
            if divisible and name not in v.unaligned:
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(v.kernel, signature, constants, attrs)
    options = {"num_warps": v.warps, "num_stages": v.stages}
    return triton.compile(source, target=TARGETS[v.family], options=options)


def facts(v: Variant, compiled: Any) -> Facts:
    """Registers, spills, shared memory, occupancy and instruction counts of a compiled variant."""
    read = _amd if v.family == "gfx942" else _nvidia
    return read(v, compiled)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia(v: Variant, compiled: Any) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([_tool("cuobjdump"), "--dump-resource-usage", file.name], text=True)
        sass = subprocess.check_output([_tool("nvdisasm"), "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    stack = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass)) + (stack > 0)
    shared = compiled.metadata.shared
    threads = v.warps * 32
    per_sm = {"sm_80": 164, "sm_90": 228, "sm_100": 228}[v.family] << 10
    # registers are handed out to warps in units of 256; every block reserves 1 KiB of shared memory
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * v.warps)
    blocks = min(by_registers, 2048 // threads, per_sm // (shared + 1024), 32)
    return Facts(registers, spills, shared, blocks, *_instructions(v.family, sass))


def _amd(v: Variant, compiled: Any) -> Facts:
    text = compiled.asm["amdgcn"]

    def meta(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    registers = meta("vgpr_count")
    # scratch beyond the spills themselves would be a stack: it counts as one
    spills = meta("vgpr_spill_count") + meta("sgpr_spill_count") + (meta("private_segment_fixed_size") > 0)
    shared = compiled.metadata.shared
    # vgpr_count covers both halves of gfx942's unified file: 512 a lane, handed out by eights, four SIMDs a unit
    waves = min(8, 512 // max(8, -(-registers // 8) * 8)) * 4
    blocks = min(waves // v.warps, (64 << 10) // max(shared, 1))
    return Facts(registers, spills, shared, blocks, *_instructions(v.family, text))


def _instructions(family: str, listing: str) -> tuple[int, int]:
    return len(re.findall(TENSOR_CORE[family], listing)), len(re.findall(WIDE_LOAD[family], listing))
