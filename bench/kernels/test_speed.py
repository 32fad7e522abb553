"""Times of every operator against torch; a time is kept only after the result was checked.

pytest bench/kernels                   # on a GPU: the layers of five models; on CPU: a toy layer, to stay runnable
pytest bench/kernels -k "Llama and 2048"
"""

import time

import pytest
import torch

import jactus_kernels as jk

from ..cost.race import captured
from . import cases

EPS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-23}
ROUND = 5e-3  # seconds between two synchronisations, where one call takes less
CALLS = 64  # at most, and at least as many as there are copies of the weights
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
MODES = ["eager", "graph"] if cases.ON_GPU else ["eager"]


def label(value):
    return f"{value.model} {value.m}x{value.n} r{value.r} T{value.T}" if isinstance(value, cases.Case) else str(value)


def synchronize():
    if cases.ON_GPU:
        torch.cuda.synchronize()


def calls_in_a_round(call, least):
    """Enough to fill a round, if one call is that fast."""
    for i in range(3):
        call(i)
    synchronize()
    started = time.perf_counter()
    call(0)
    synchronize()
    most = CALLS if cases.ON_GPU else 1
    return max(1, least, min(most, int(ROUND / (time.perf_counter() - started))))


def timed(benchmark, op, case, dtype, provider, call, mode, copies=1):
    """`call(i)` uses copy i of the weights: a round goes over all of them, as a model goes over its layers."""
    count = calls_in_a_round(call, copies)

    def several():
        for i in range(count):
            call(i)

    run = captured(several) if mode == "graph" else several

    def waited():
        run()
        synchronize()

    benchmark.extra_info.update(
        op=op, model=case.model, T=case.T, m=case.m, n=case.n, r=case.r, dtype=str(dtype).removeprefix("torch."),
        provider=provider, mode=mode, repeats=count, torch=torch.__version__, seed=0,
        device=torch.cuda.get_device_name() if cases.ON_GPU else "CPU",
    )  # fmt: skip
    benchmark.pedantic(waited, rounds=15 if cases.ON_GPU else 3, warmup_rounds=2)


def error_of(found, right):
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


def allowed(case, dtype):
    """Three chained products here and there, each rounded once; and √k roundings at random of float32 sums of k terms."""
    return 8 * EPS[dtype] + max(case.m, case.n) ** 0.5 * EPS[torch.float32]


def skip_float32(case, dtype, mode):
    if dtype == torch.float32 and (mode == "graph" or case.model not in cases.IN_FLOAT32):
        pytest.skip("float32 is timed eagerly, and the layers of two models are enough")


@pytest.fixture(autouse=True)
def kernels_on_gpu():
    """On a GPU, time the kernels themselves, not what the policy would have chosen."""
    with jk.use(backend="fused" if cases.ON_GPU else "auto"):
        yield


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", ["three products", "jactus", "dense", "two products", "jactus folded"])
@DTYPES
@pytest.mark.parametrize("case", cases.cases(), ids=label)
def test_forward(benchmark, case, dtype, provider, mode):
    skip_float32(case, dtype, mode)
    with torch.no_grad():
        call = cases.forward(case, dtype, provider)
        error = error_of(call(0), cases.forward(case, dtype, "three products")(0))
        assert error < allowed(case, dtype)
        benchmark.extra_info["error"] = error
        timed(benchmark, "forward", case, dtype, provider, call, mode, cases.copies(case, dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", ["three products", "jactus", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in cases.cases() if case.T >= 256 or not cases.ON_GPU], ids=label)
def test_training(benchmark, case, dtype, provider, mode):
    call = cases.training(case, dtype, provider)
    error = error_of(call(0), cases.training(case, dtype, "three products")(0))
    assert error < allowed(case, dtype)
    benchmark.extra_info["error"] = error
    timed(benchmark, "training", case, dtype, provider, call, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", ["addmm_ of float32 copy", "jactus", "jactus wide", "mm out_dtype"])
@DTYPES
@pytest.mark.parametrize("case", cases.widths(), ids=label)
def test_covariance(benchmark, case, dtype, provider, mode):
    with torch.no_grad():
        calls = cases.covariance(case, dtype)
        if provider not in calls:
            pytest.skip("torch.mm(out_dtype=...) needs CUDA and 16-bit inputs, wide tiles a Hopper GPU as well")
        S = calls[provider](0).clone().tril()
        X = cases.made(case.T, case.n, scale=1, dtype=dtype)
        expected = (X.double().T @ X.double()).tril()
        error = error_of(S, expected)
        # T products are added in float32: √T roundings at random, with a factor of slack
        assert error < 4 * max(case.T, 16) ** 0.5 * EPS[torch.float32]
        benchmark.extra_info["error"] = error
        timed(benchmark, "covariance", case, dtype, provider, calls[provider], mode)
