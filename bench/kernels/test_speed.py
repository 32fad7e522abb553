"""Times of every operator against torch; a time is kept only after the result was checked.

pytest bench/kernels                   # on a GPU: the layers of five models; on CPU: a toy layer, to stay runnable
pytest bench/kernels -k "Llama and 2048"
"""

import pytest
import torch

import jactus_kernels as jk

from . import cases

EPS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-23}
REPEATS = 10 if cases.ON_GPU else 1  # calls between two synchronisations


def label(value):
    return f"{value.model} {value.m}x{value.n} r{value.r} T{value.T}" if isinstance(value, cases.Case) else str(value)


def synchronize():
    if cases.ON_GPU:
        torch.cuda.synchronize()


def captured(call):
    """The call as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def timed(benchmark, op, case, dtype, provider, call, mode):
    def several():
        for _ in range(REPEATS):
            run()
        synchronize()

    run = captured(call) if mode == "graph" else call
    benchmark.extra_info.update(
        op=op, model=case.model, T=case.T, m=case.m, n=case.n, r=case.r, dtype=str(dtype).removeprefix("torch."),
        provider=provider, mode=mode, repeats=REPEATS, torch=torch.__version__, seed=0,
        device=torch.cuda.get_device_name() if cases.ON_GPU else "CPU",
    )  # fmt: skip
    benchmark.pedantic(several, rounds=20 if cases.ON_GPU else 3, warmup_rounds=3)


MODES = ["eager", "graph"] if cases.ON_GPU else ["eager"]
FORWARD = ["three products", "jactus", "dense", "two products", "jactus folded"]


@pytest.fixture(autouse=True)
def kernels_on_gpu():
    """On a GPU, time the kernels themselves, not what the policy would have chosen."""
    with jk.use(backend="fused" if cases.ON_GPU else "auto"):
        yield


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", FORWARD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", cases.cases(), ids=label)
def test_forward(benchmark, case, dtype, provider, mode):
    with torch.no_grad():
        calls = cases.forward(case, dtype)
        expected, ours = calls["three products"]().double(), calls[provider]().double()
        error = ((ours - expected).norm() / expected.norm()).item()
        # three chained products here and there, each rounded once
        assert error < 8 * EPS[dtype]
        benchmark.extra_info["error"] = error
        timed(benchmark, "forward", case, dtype, provider, calls[provider], mode)


@pytest.mark.parametrize("provider", ["three products", "jactus", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in cases.cases() if case.T >= 16], ids=label)
def test_training(benchmark, case, dtype, provider):
    calls = cases.training(case, dtype)
    expected, ours = calls["three products"]().double(), calls[provider]().double()
    error = ((ours - expected).norm() / expected.norm()).item()
    assert error < 8 * EPS[dtype]
    benchmark.extra_info["error"] = error
    timed(benchmark, "training", case, dtype, provider, calls[provider], "eager")


@pytest.mark.parametrize("provider", ["addmm_ of float32 copy", "jactus", "mm out_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", cases.widths(), ids=label)
def test_covariance(benchmark, case, dtype, provider):
    with torch.no_grad():
        calls = cases.covariance(case, dtype)
        if provider not in calls:
            pytest.skip("torch.mm(out_dtype=...) needs CUDA and 16-bit inputs")
        S = calls[provider]().clone().tril()
        X = cases.made(case.T, case.n, scale=1, dtype=dtype)
        expected = (X.double().T @ X.double()).tril()
        error = ((S.double() - expected).norm() / expected.norm()).item()
        # T products are added in float32: √T roundings at random, with a factor of slack
        assert error < 4 * max(case.T, 16) ** 0.5 * EPS[torch.float32]
        benchmark.extra_info["error"] = error
        timed(benchmark, "covariance", case, dtype, provider, calls[provider], "eager")
