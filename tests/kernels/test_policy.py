"""The policy and the settings: needs neither a GPU nor Triton's compiler."""

import subprocess
import sys

import pytest
import torch

import jactus_kernels as jk
from jactus_kernels import cuda, launches, policy, roofline, settings
from jactus_kernels.tiles import SHARED_LIMIT, find_tile

LAYER = {"m": 4096, "n": 4096, "gpu": "H100"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("JACTUS_BACKEND", "JACTUS_FP32", "JACTUS_POLICY"):
        monkeypatch.delenv(name, raising=False)
    yield
    policy._decide.cache_clear()
    policy._measurements.cache_clear()


def test_importing_needs_no_triton_and_no_gpu():
    code = "import sys; sys.modules['triton'] = None; import jactus_kernels; print(jactus_kernels.explain.__name__)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "explain"
    code = "import sys, jactus_kernels; print('triton' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize("op", policy.OPERATORS)
@pytest.mark.parametrize("gpu", [g.name for g in roofline.GPUS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("T,r", [(0, 16), (1, 16), (16, 262), (2048, 64), (16384, 1344)])
def test_no_prediction_beats_the_floor(op, gpu, dtype, T, r):
    decision = jk.explain(op, T=T, m=768, n=3072, r=r, dtype=dtype, gpu=gpu)
    assert decision.backend in ("triton", "torch")
    assert min(decision.triton_us, decision.torch_us) > decision.floor_us >= 0
    assert decision.op in str(decision)
    assert "us" in str(decision)


def test_the_symmetric_update_wins_and_a_large_product_is_left_to_the_library():
    assert jk.explain("covariance_update", T=4096, n=4096, gpu="H100").backend == "triton"
    assert jk.explain("core_linear", T=2048, r=1344, **LAYER).backend == "torch"
    small = {"T": 1, "m": 768, "n": 768, "r": 96, "gpu": "H100"}
    assert jk.explain("core_linear", **small).backend == "torch"  # launching Triton's kernels takes the host longer


def written(path, *rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in (policy.COLUMNS, *rows)))
    policy._decide.cache_clear()
    policy._measurements.cache_clear()
    return str(path)


def test_the_user_decides(monkeypatch):
    shape = {"T": 2048, "r": 1344, **LAYER}
    with jk.use(backend="triton"):
        assert jk.explain("core_linear", **shape).backend == "triton"
        with jk.use(backend="torch"):
            assert "says so" in jk.explain("core_linear", **shape).reason
        assert settings.current().backend == "triton"
    assert settings.current().backend == "auto"
    with jk.use(backend="fused"):
        fused = jk.explain("core_linear", T=2048, r=128, **LAYER)
    assert fused.backend == "triton"
    assert [launch.kernel for launch in fused.launches] == ["chain", "cuBLAS"]
    monkeypatch.setenv("JACTUS_BACKEND", "triton")
    assert jk.explain("core_linear", **shape).backend == "triton"


def test_settings_are_restored_when_the_block_raises():
    with pytest.raises(ZeroDivisionError), jk.use(backend="torch", fp32="tf32"):
        raise ZeroDivisionError
    assert settings.current() == settings.Settings()


def test_a_measurement_overrules_the_model(monkeypatch, tmp_path):
    shape = {"T": 2048, "r": 128, **LAYER}
    monkeypatch.setenv("JACTUS_POLICY", "none")
    before = jk.explain("core_linear", **shape)
    size = (2048, 4096, 4096, 128)
    rows = ("core_linear", "half", *size, 30, 60), ("training", "half", *size, 100, 300)
    monkeypatch.setenv("JACTUS_POLICY", written(tmp_path / "h100.csv", *rows))
    after = jk.explain("core_linear", **shape)
    assert after.backend == "triton"
    assert after.triton_us == pytest.approx(30)
    assert "measured here" in after.reason
    near = jk.explain("core_linear", **{**shape, "T": 4096})
    assert near.torch_us != before.torch_us
    assert "nearest measured" in near.reason
    assert "roofline" in jk.explain("folded_linear", **shape).reason
    # a training step is measured whole, so its two passes are corrected alike and add up to it
    passes = [jk.explain(op, **shape) for op in ("core_linear_train", "core_linear_backward")]
    assert sum(part.triton_us for part in passes) == pytest.approx(100)
    assert sum(part.torch_us for part in passes) == pytest.approx(300)
    monkeypatch.setenv("JACTUS_POLICY", written(tmp_path / "slow-h100.csv", ("core_linear", "half", *size, 60, 30)))
    assert jk.explain("core_linear", **shape).backend == "torch"
    monkeypatch.setenv("JACTUS_POLICY", str(tmp_path / "h100.csv"))
    other = jk.explain("core_linear", **{**shape, "gpu": "A100"})
    assert "another GPU, H100" in other.reason
    assert other.triton_us / other.torch_us == pytest.approx(after.triton_us / after.torch_us, rel=0.5)


def test_a_captured_call_goes_by_captured_measurements_and_pays_no_host(monkeypatch, tmp_path):
    size, shape = (1, 4096, 4096, 64), {"T": 1, "r": 64, **LAYER}
    rows = ("core_linear", "half", *size, 90, 40, "eager"), ("core_linear", "half", *size, 10, 20, "graph")
    monkeypatch.setenv("JACTUS_POLICY", written(tmp_path / "h100.csv", *rows))
    eager, captured = (jk.explain("core_linear", captured=c, **shape) for c in (False, True))
    assert (eager.backend, captured.backend) == ("torch", "triton")
    assert (eager.triton_us, captured.triton_us) == (pytest.approx(90), pytest.approx(10))
    monkeypatch.setenv("JACTUS_POLICY", "none")
    eager, captured = (jk.explain("widen", T=64, m=768, n=256, r=256, gpu="H100", captured=c) for c in (False, True))
    assert eager.triton_us == roofline.KERNEL_HOST_US  # one launch, of which the device sees little
    assert eager.torch_us == 2 * roofline.LIBRARY_HOST_US
    assert captured.triton_us < eager.triton_us / 4


def test_while_a_stream_is_captured_the_policy_is_asked_of_a_captured_call(monkeypatch):
    asked = []
    monkeypatch.setattr(
        policy, "for_device", lambda *args: asked.append(args[-1]) or policy.Decision("widen", "torch", "")
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        cuda.uses_triton("widen", torch.device("cuda", 0), torch.bfloat16, launches.Shape(1, 8, 4, 4))
    assert asked == [True, False]


def test_rows_from_before_there_was_a_mode_are_eager(monkeypatch, tmp_path):
    old = [",".join(policy.COLUMNS[:-1]), "core_linear,half,2048,4096,4096,128,30,60"]
    path = tmp_path / "h100.csv"
    path.write_text("\n".join(old))
    monkeypatch.setenv("JACTUS_POLICY", str(path))
    assert "measured here" in jk.explain("core_linear", T=2048, r=128, **LAYER).reason
    assert "roofline" in jk.explain("core_linear", T=2048, r=128, captured=True, **LAYER).reason


def test_what_was_measured_decides_and_other_gpus_of_the_family_go_by_it():
    """The shipped measurements: an H200 has none of its own and takes the H100's."""
    measured = {gpu: jk.explain("covariance_update", T=2048, n=4096, gpu=gpu) for gpu in ("H100", "H200")}
    assert all(decision.backend == "triton" for decision in measured.values())
    assert "another GPU, H100" in measured["H200"].reason


def test_a_broken_measurement_file_says_so(monkeypatch, tmp_path):
    path = tmp_path / "bad.csv"
    row = ("core_linear", "half", 1, 8, 8, 8, 0, 1)
    for content in ("op,T\ncore_linear,many\n", "\n".join(",".join(map(str, r)) for r in (policy.COLUMNS, row)), None):
        policy._measurements.cache_clear()
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
        monkeypatch.setenv("JACTUS_POLICY", str(path))
        with pytest.raises(jk.JactusError, match=r"bad\.csv.*measure again"):
            jk.explain("core_linear", T=3, r=16, **LAYER)


def test_what_torch_and_the_user_say_of_float32_is_heard(monkeypatch):
    """Times measured in one precision say nothing of another: the prediction's own change is kept."""
    shape = {"T": 2048, "n": 4096, "dtype": torch.float32, "gpu": "H100"}
    plain = jk.explain("covariance_update", **shape)
    assert (plain.backend, "measured here" in plain.reason) == ("triton", True)
    with jk.use(fp32="ieee"):
        assert jk.explain("covariance_update", **shape).triton_us > 1.5 * plain.triton_us
    monkeypatch.setattr(policy, "_torch_uses_tf32", lambda: True)
    assert jk.explain("covariance_update", **shape).torch_us < plain.torch_us / 2


def test_torchs_own_setting_of_tf32_is_read_whichever_way_it_was_made():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert policy._torch_uses_tf32()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert policy._torch_uses_tf32() == before


@pytest.mark.parametrize(("dtype", "r"), [(torch.bfloat16, 300), (torch.bfloat16, 1344), (torch.float32, 130)])
def test_where_nothing_is_fused_torch_runs(dtype, r):
    for op in ("core_linear_train", "core_linear_backward"):
        decision = jk.explain(op, T=2048, m=4096, n=4096, r=r, dtype=dtype, gpu="H100")
        assert (decision.backend, "no kernel fuses" in decision.reason) == ("torch", True)


def test_lengths_that_differ_little_are_decided_alike():
    shapes = {policy._coarse(launches.Shape(T, 8, 8, 4)).T for T in range(1, 4097)}
    assert shapes >= set(range(1, 65))
    assert len(shapes) < 64 + 8 * 6 + 2
    for T in range(65, 4097):
        assert T * 8 / 9 <= policy._coarse(launches.Shape(T, 8, 8, 4)).T <= T


@pytest.mark.parametrize("dtype,backend,says", [(torch.float64, "auto", "float64"), (torch.bfloat16, "torch", "says")])
def test_what_the_kernels_lack_runs_on_torch(dtype, backend, says):
    with jk.use(backend=backend):
        decision = jk.explain("core_linear", T=1, r=16, dtype=dtype, **LAYER)
    assert decision.backend == "torch"
    assert says in decision.reason


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: jk.explain("nonsense", T=1, n=1, gpu="H100"), "core_linear_train"),
        (lambda: jk.explain("core_linear", T=1, n=1, gpu="GT 710"), "MI300X"),
        (lambda: jk.use(backend="cuda").__enter__(), "JACTUS_BACKEND"),
        (lambda: jk.use(fp32="bf16").__enter__(), "tf32x3"),
        (lambda: find_tile("matmul", "sm_75", 2), "JACTUS_BACKEND=torch"),
        (lambda: jk.padded_rank(3, 0), "multiple=0"),
        (lambda: jk.pad_rank(torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(3, 1)), "do not share a rank"),
    ],
)
def test_bad_input_says_what_to_do(call, says):
    with pytest.raises(jk.JactusError, match=says):
        call()


def test_triton_asked_for_where_it_cannot_run():
    with jk.use(backend="triton"), pytest.raises(jk.JactusError, match="float64"):
        jk.explain("core_linear", T=1, r=16, dtype=torch.float64, **LAYER)
    with jk.use(fp32="tf32"), pytest.raises(jk.JactusError, match="no TF32"):
        jk.explain("core_linear", T=1, m=8, n=8, r=16, dtype=torch.float32, gpu="MI300X")


@pytest.mark.parametrize("T", [1, 63, 64, 1000, 65536])
@pytest.mark.parametrize("tiles", [1, 21, 5000])
def test_parts_cover_every_token_once(T, tiles):
    for family in SHARED_LIMIT:
        tile = find_tile("covariance", family, 2)
        parts, length = launches.token_parts(T, tile, tiles, slots=264)
        assert (parts - 1) * length < T <= parts * length
        assert length % tile.step == 0
        assert parts == 1 or parts * tiles <= 264


def test_padding_a_rank_changes_nothing_and_trains_to_zero():
    torch.manual_seed(0)
    x, U, C, V = (torch.randn(*s, dtype=torch.float64) for s in ((9, 7), (5, 19), (19, 19), (7, 19)))
    padded = [t.requires_grad_(i == 1) for i, t in enumerate(jk.pad_rank(U, C, V))]
    assert padded[1].shape == (32, 32)
    y = jk.core_linear(x, *padded)
    assert torch.allclose(y, jk.core_linear(x, U, C, V), atol=1e-12)
    gradient = torch.autograd.grad(y.square().sum(), padded[1])[0]
    assert gradient[:19, :19].any()
    assert not gradient[19:].any()
    assert not gradient[:, 19:].any()


def test_three_tf32_products_are_as_accurate_as_float32():
    """Why "auto" makes float32 products of three TF32 ones: the error of the scheme itself, emulated bit by bit."""

    def tf32(x):
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)  # ten bits of mantissa, as the tensor core reads

    torch.manual_seed(0)
    A, B = torch.randn(300, 1000), torch.randn(1000, 200)
    exact = A.double() @ B.double()
    (A_hi, B_hi), one = (tf32(A), tf32(B)), tf32(A) @ tf32(B)
    three = tf32(A - A_hi) @ B_hi + A_hi @ tf32(B - B_hi) + one

    def error(x):
        return ((x.double() - exact).norm() / exact.norm()).item()

    assert error(three) <= 2 * error(A @ B)
    assert error(one) > 1e-4
