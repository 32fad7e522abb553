"""Any layer in any metric: what hypothesis thinks of in shapes, dtypes, masks and degenerate spectra, held to float64."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import jactus
from jactus import JactusConfig, JactusError
from jactus.model.lowrank import core_layers

EXAMPLES = int(os.environ.get("JACTUS_EXAMPLES", "60"))  # more of them for a longer search
quick = settings(derandomize=True, deadline=None, database=None)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SPECTRA = {
    "flat": lambda k: torch.ones(k),
    "falling": lambda k: torch.logspace(0, -2, k),
    "repeated": lambda k: torch.cat([torch.ones(k // 2), torch.full((k - k // 2,), 0.1)]),
    "rank one": lambda k: torch.eye(k)[0],
    "condition 1e14": lambda k: torch.logspace(0, -7, k),  # of rows, so twice as many decades of their covariance
    "spike": lambda k: torch.cat(
        [torch.ones(1), torch.full((k - 1,), (0.06 / 0.94 / max(k - 1, 1)) ** 0.5)]
    ),  # 94% of the trace
    "zero": lambda k: torch.zeros(k),
}
CONFIG = JactusConfig().replace(rank_multiple=1, target_modules=("linear",), trainable_extras=())
ROWS, LENGTH = 2, 12


class Net(nn.Module):
    """A layer whose inputs and output gradients are what the batch says."""

    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
        self.linear.weight.data.copy_(weight)

    def forward(self, x, attention_mask, g):
        y = self.linear(x)
        return (y.double() * g * attention_mask[..., None]).sum(), int(attention_mask.sum())


def loss(model, batch):
    return model(**batch)


def rotated(d, generator):
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


def rows_of(spectrum, d, generator):
    """Rows (ROWS, LENGTH, d) whose covariance has about that spectrum."""
    return (
        torch.randn(ROWS, LENGTH, d, generator=generator, dtype=torch.float64)
        * spectrum(d).double()
        @ rotated(d, generator)
    )


@st.composite
def layers(draw):
    """A weight, batches, and which of the spectra they have."""
    m, n = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    dtype = draw(st.sampled_from(DTYPES))
    kinds = [draw(st.sampled_from(sorted(SPECTRA))) for _ in range(3)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    k = min(m, n)
    weight = rotated(m, generator)[:, :k] * SPECTRA[kinds[0]](k).double() @ rotated(n, generator)[:k]
    batches = []
    for _ in range(2):
        lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).long()
        x, g = (rows_of(SPECTRA[kind], d, generator) for kind, d in zip(kinds[1:], (n, m)))
        x[mask == 0] = 1e3  # padding, which must enter no sum
        batches.append({"x": x.to(dtype), "attention_mask": mask, "g": g.to(dtype).double()})
    return weight.to(dtype), batches, kinds


def exact(batches):
    """A and G of the tokens, in float64, with the damping."""
    kept = [batch["attention_mask"].bool() for batch in batches]
    damped = []
    for name in ("x", "g"):
        rows = torch.cat([batch[name].double()[mask] for batch, mask in zip(batches, kept)])
        S = rows.T @ rows / len(rows)
        damped.append(S + CONFIG.damping * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype))
    return damped


def root(S):
    values, vectors = torch.linalg.eigh(S)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


@settings(quick, max_examples=EXAMPLES)
@given(
    layer=layers(),
    budget=st.sampled_from([0.3, 0.5, 0.8, 1.0]),
    share=st.sampled_from([0.0, 0.25]),
    wide=st.booleans(),
)
def test_factors_are_finite_the_budget_is_kept_and_the_error_is_the_least_there_is(layer, budget, share, wide):
    weight, batches, kinds = layer
    config = CONFIG.replace(budget=budget, union_share=share)
    model = Net(weight)
    sums = torch.float64 if wide else torch.float32
    statistics = jactus.calibrate(
        model, batches, config, loss=loss, statistics_dtype=sums, verify=False, progress=False
    )
    if "zero" in kinds[1:]:
        with pytest.raises(JactusError, match=r"linear .*no signal reached"):
            jactus.plan(model, statistics, config, progress=False)
        return
    try:
        plan = jactus.plan(model, statistics, config, progress=False)
    except JactusError as e:
        assert f"budget={budget}" in str(e) or "Budget" in str(e) or "budget" in str(e)  # noqa: PT017  # less than one direction costs
        return
    assert plan.folded_parameters <= budget * weight.numel()
    jactus.compress(model, plan)
    held = core_layers(model)["linear"]
    U, V = (basis.detach().double() for basis in held.bases())
    C = held.effective_core.detach().double()
    assert all(bool(t.isfinite().all()) for t in (U, C, V))
    A, G = exact(batches)
    L, R, W = root(G), root(A), weight.double()
    sigma = torch.linalg.svdvals(L @ W @ R)
    rank = plan.layers["linear"].weight_rank(plan.ranks["linear"], plan.config)

    def norm(t, kind=2):
        return float(torch.linalg.matrix_norm(t, kind))

    # an entry of a sum of T products is off by T roundings of the trace at most, and σ² by what that is of its three factors
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    rounding = tokens * torch.finfo(sums).eps * (norm(A, "nuc") * norm(G) + norm(G, "nuc") * norm(A)) * norm(W) ** 2
    # factors are rounded entry by entry: in a plan to float32, in the layer to its dtype
    eps = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
    stored = norm(L) * norm(U, "fro") * norm(C @ V.T @ R) + norm(L @ U) * norm(C, "fro") * norm(V.T @ R)
    stored += norm(L @ U @ C) * norm(V, "fro") * norm(R)
    least = float(sigma[rank:].square().sum())
    most = (least + 2 * len(sigma) * rounding) ** 0.5 + eps * stored
    assert norm(L @ (W - U @ C @ V.T) @ R, "fro") <= most + 1e-12


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_a_model_in_float64_is_summed_in_float32_unless_told_otherwise(shape, share):
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    x, g = (torch.randn(ROWS, LENGTH, d, generator=generator, dtype=torch.float64) for d in (n, m))
    model = Net(torch.randn(m, n, generator=generator, dtype=torch.float64))
    batches = [{"x": x, "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long), "g": g}]
    found = [
        jactus.calibrate(
            model,
            batches,
            CONFIG.replace(union_share=share),
            loss=loss,
            statistics_dtype=dtype,
            verify=False,
            progress=False,
        )
        for dtype in ("float32", "float64")
    ]
    for sums, dtype in zip(found, (torch.float32, torch.float64)):
        assert {t.dtype for t in sums._sums()} == {dtype}
    for one, other in zip(*(sums._sums() for sums in found)):
        # T products are summed, each rounded
        assert torch.allclose(
            one.double(), other, atol=ROWS * LENGTH * torch.finfo(torch.float32).eps * float(other.abs().max()) * n
        )


@settings(quick, max_examples=EXAMPLES // 4)
@given(layer=layers(), value=st.sampled_from([float("nan"), float("inf")]), at=st.sampled_from(["x", "g"]))
def test_what_is_not_finite_in_the_last_batch_is_named_with_its_batch(layer, value, at):
    weight, batches, _ = layer
    batches[-1][at][-1, 0, -1] = value  # the first token of an example is none of padding
    with pytest.raises(JactusError, match=r"linear .*batch 1|batch 1: the loss is (nan|inf)"):
        jactus.calibrate(Net(weight), batches, CONFIG, loss=loss, verify=False, progress=False)
