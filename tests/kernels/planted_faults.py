"""Break every kernel on purpose and show that the sanitised tests notice: `python tests/kernels/planted_faults.py`.

Each fault is one edit of the source in a copy of the package; the copy's tests must then fail with the words given.
Run by `make kernels-check` with Triton and the sanitiser on PYTHONPATH.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VALUES = r"assert .*relative\("
READ, WRITE, RACE = r"reads \d+ element", r"writes \d+ element", r"program instances .* both touch"
CLASH = r"undefined result"  # two lanes of one store disagree


@dataclass(frozen=True)
class Fault:
    what: str
    file: str
    before: str
    after: str
    tests: str  # file and -k expression
    caught: str  # what the failing run must say


COVARIANCE, CORE = "tests/kernels/test_covariance_kernel.py", "tests/kernels/test_core_kernels.py"
DISPATCH = "tests/kernels/test_dispatch.py"
FAULTS = (
    Fault("covariance: the mask is ignored", "covariance.py", "mask=m_t, other=0) != 0", "mask=m_t, other=0) >= 0",
          f"{COVARIANCE} -k never_read", VALUES),
    Fault("covariance: rows past the last token are read", "covariance.py", "m_t = o_t < T\n", "m_t = o_t < T + 9\n",
          f"{COVARIANCE} -k ragged", READ),
    Fault("covariance: a tile is added past the last column of S", "covariance.py", "(col + o_c < n)[None, :]\n    tl",
          "(col + o_c < n + 3)[None, :]\n    tl", f"{COVARIANCE} -k ragged", f"{WRITE}|{READ}|{RACE}"),
    Fault("covariance: parts share one workspace tile", "covariance.py", "tl.cast(item, tl.int64) * (BM * BN)",
          "tl.cast(item % tiles, tl.int64) * (BM * BN)", f"{COVARIANCE} -k split", RACE),
    Fault("covariance: a resident block skips tiles", "covariance.py", "tiles * parts, tl.num_programs(0))",
          "tiles * parts, tl.num_programs(0) + 1)", f"{COVARIANCE} -k resident", VALUES),
    Fault("covariance: wide tiles are counted as square ones", "covariance.py", "t - WIDE * (k * (k + 1) // 2)",
          "t - k * (k + 1) // 2", f"{COVARIANCE} -k numbering", r"torch\.equal\("),
    Fault("covariance reduce: parts past the last are added", "blocks.py", "(o_s < parts)[:, None] & ",
          "(o_s >= 0)[:, None] & ",
          f"{COVARIANCE} -k split", READ),
    Fault("covariance reduce: elements past the edge are stored", "covariance.py", "other=0.0) + alpha * b_s, mask=m)",
          "other=0.0) + alpha * b_s, mask=o_i < n + 1)", f"{COVARIANCE} -k split", f"{WRITE}|{RACE}|{CLASH}"),
    Fault("matmul: block rows past the last group", "matmul.py", "min(rows - group * GROUP, GROUP)", "GROUP",
          f"{CORE} -k matmul", f"{VALUES}|{WRITE}"),
    Fault("matmul: the bias is read past its end", "blocks.py", "mask=o_c < cols, other=0.0).to",
          "mask=o_c >= 0, other=0.0).to", f"{CORE} -k matmul", READ),
    Fault("chain: the inner product is stored past the rank", "chain.py", "write(p_inner, b_i, t, 0, T, r, r",
          "write(p_inner, b_i, t, 0, T, R, r", f"{CORE} -k chain", f"{WRITE}|{RACE}|{CLASH}"),
    Fault("chain: the bias is added to the first columns only", "chain.py", "add_bias(b_o, p_bias, col, w, BW)",
          "add_bias(b_o, p_bias, 0, w, BW)", f"{CORE} -k chain", VALUES),
    Fault("gram: parts share one workspace", "core_gradient.py", "tl.cast(tl.program_id(2), tl.int64) * r * r",
          "tl.cast(0, tl.int64) * r * r", f"{CORE} -k core_gradient", RACE),
    Fault("pair: two blocks take the same tokens", "core_gradient.py", "T, tl.num_programs(0) * BT)", "T, BT)",
          f"{CORE} -k pair", f"{RACE}|{VALUES}"),
    Fault("sum of parts: stored past the end", "core_gradient.py", "b.to(p_out.dtype.element_ty), mask=o < size)",
          "b.to(p_out.dtype.element_ty), mask=o < size + 8)", f"{CORE} -k core_gradient", WRITE),
    Fault("decode inner: reads past the last input", "decode.py", "stop = min(start + part_len, n)",
          "stop = start + part_len", f"{CORE} -k decode", f"{READ}|{VALUES}"),
    Fault("decode outer: adds parts that are not there", "decode.py", "tl.where(s < parts, T, 0)", "T",
          f"{CORE} -k decode", READ),
    Fault("widen: pivots get the others' places", "scatter.py", "tl.where(is_pivot, 0, r), tl.where(is_pivot, r, w)",
          "tl.where(is_pivot, w, 0), tl.where(is_pivot, r, w)", f"{CORE} -k pivots", VALUES),
    Fault("widen: a column past the last other one is stored", "scatter.py", "& (o_c < size)[None, :])\n\n\n@triton.jit\ndef narrow",
          "& (o_c < size + 1)[None, :])\n\n\n@triton.jit\ndef narrow", f"{CORE} -k pivots", f"{WRITE}|{RACE}|{CLASH}|{VALUES}"),
    Fault("narrow: the others are read from the pivots' places", "scatter.py", "p_order + r + o_k", "p_order + o_k",
          f"{CORE} -k pivots", VALUES),
    Fault("narrow: the pivots are left out", "scatter.py", "b_z = b_z.to(tl.float32)", "b_z = b_z.to(tl.float32) * 0",
          f"{CORE} -k pivots", VALUES),
    Fault("every kernel: stores one column too many", "blocks.py", "(col + o_c < cols)[None, :]\n    tl.store",
          "(col + o_c <= cols)[None, :]\n    tl.store", f"{CORE} -k matmul", f"{WRITE}|{RACE}"),
    Fault("dispatch: masked rows reach torch's sum", "cuda.py", "X = X.masked_fill(~mask[:, None], 0)", "pass",
          f"{DISPATCH} -k either", VALUES),
    Fault("dispatch: the fused backward is forgotten", "fused.py", "fits_pair(T, r, size):", "False:",
          f"{DISPATCH} -k planned", r"assert \["),
)  # fmt: skip


def caught(fault: Fault) -> tuple[bool, str]:
    """Whether the tests of a copy with this fault fail as they should, and the line that says so."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("jactus_kernels", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder) / name)
        path = Path(folder) / "jactus_kernels" / fault.file
        source = path.read_text()
        if source.count(fault.before) != 1:
            return False, f"{fault.file} has {source.count(fault.before)} places like {fault.before!r}: mend this fault"
        path.write_text(source.replace(fault.before, fault.after))
        tests, _, wanted = fault.tests.partition(" -k ")
        command = [sys.executable, "-m", "ttsem.sanitize", "pytest", tests, "-k", wanted, "-x", "-q", "--tb=short"]
        inherited = [str(ROOT / part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([folder, *inherited])}
        run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    found = re.search(rf".*(?:{fault.caught}).*", run.stdout)
    if run.returncode == 0 or not found:
        return False, f"exit {run.returncode}: " + " | ".join((run.stdout + run.stderr).splitlines()[-3:])
    return True, found[0].strip()


def main() -> int:
    missed, begun = 0, time.time()
    with ThreadPoolExecutor(int(sys.argv[1]) if sys.argv[1:] else os.cpu_count()) as pool:
        for fault, (noticed, line) in zip(FAULTS, pool.map(caught, FAULTS)):
            missed += not noticed
            print(f"{'caught' if noticed else 'MISSED':8}{fault.what}\n          {line[:150]}", flush=True)
    print(f"{len(FAULTS) - missed} of {len(FAULTS)} planted faults caught in {time.time() - begun:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
