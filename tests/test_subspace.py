"""Union and core: against the textbook formulas in float64, for random layers in random metrics."""

import pytest
import torch

from jactus.compression.coordinates import orthonormal
from jactus.planning.subspace import INDEPENDENT, directions, metric, task_rank
from jactus_kernels import JactusError

shapes = pytest.mark.parametrize(("m", "n"), [(12, 12), (9, 17), (20, 7)])


def covariance(d, tokens, seed):
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / tokens


def layer(m, n, seed=0, tokens=40):
    g = torch.Generator().manual_seed(seed)
    W, D = (torch.randn(m, n, generator=g, dtype=torch.float64) for _ in range(2))
    return W, covariance(m, tokens, seed + 1), covariance(n, tokens, seed + 2), D


def damped(S, damping):
    return S + damping * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype)


def root(S):
    values, vectors = torch.linalg.eigh(S)
    return vectors @ values.sqrt().diag() @ vectors.T


def closed_form_core(W, G, A, U, V):
    """C = (UᵀGU)⁻¹ (UᵀGWAV) (VᵀAV)⁻¹, as it stands in the design."""
    return torch.linalg.solve(U.T @ G @ U, U.T @ G @ W @ A @ V) @ torch.linalg.inv(V.T @ A @ V)


def loss(W, approximation, G, A):
    return float((root(G) @ (W - approximation) @ root(A)).square().sum())


def made(W, G, A, D, tasks, damping=0.01, covariances=False):
    sources = {"output_covariance": G, "input_covariance": A} if covariances else {}
    return directions(W, damped(G, damping), damped(A, damping), min(W.shape), tasks, gradient=D, **sources)


@shapes
@pytest.mark.parametrize("kind", ["identity", "input", "gradient", "fisher"])
def test_weight_directions_alone_give_the_truncated_weighted_svd(m, n, kind):
    W, G, A, _ = layer(m, n)
    G = G if kind in ("gradient", "fisher") else None
    A = A if kind in ("input", "fisher") else None
    eye_m, eye_n = torch.eye(m, dtype=W.dtype), torch.eye(n, dtype=W.dtype)
    Gd, Ad = eye_m if G is None else damped(G, 0.01), eye_n if A is None else damped(A, 0.01)
    found = directions(W, None if G is None else Gd, None if A is None else Ad, min(m, n), 0)
    P, s, Qt = torch.linalg.svd(root(Gd) @ W @ root(Ad), full_matrices=False)
    assert torch.allclose(found.sigma, s, rtol=1e-10)
    for rank in (1, 4, min(m, n)):
        U, C, V = found.factors(rank, 0.0)
        best = torch.linalg.solve(root(Gd), P[:, :rank] * s[:rank]) @ torch.linalg.solve(root(Ad), Qt[:rank].T).T
        assert torch.allclose(U @ C @ V.T, best, atol=1e-9 * float(W.norm()))


@shapes
@pytest.mark.parametrize("covariances", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_the_core_is_the_closed_form_inside_the_union(m, n, covariances, share):
    """Square where no width is given, and longer on the side with fewer rows."""
    W, G, A, D = layer(m, n)
    found = made(W, G, A, D, min(m, n), covariances=covariances)
    Gd, Ad = damped(G, 0.01), damped(A, 0.01)
    # orthonormal up to the last bits of a remainder that may be INDEPENDENT short: ε/INDEPENDENT²
    slack = 100 * 2**-52 / INDEPENDENT**2
    for rank in range(1, min(m, n) + 1):
        for width in (None, *range(rank, min(m, n) + 1)):
            U, C, V = found.factors(rank, share, width=width)
            p, q = (width or rank, rank) if m <= n else (rank, width or rank)
            assert (U.shape, C.shape, V.shape) == ((m, p), (p, q), (n, q))
            assert torch.allclose(U.T @ Gd @ U, torch.eye(p, dtype=W.dtype), atol=slack)
            assert torch.allclose(V.T @ Ad @ V, torch.eye(q, dtype=W.dtype), atol=slack)
            assert torch.allclose(C, closed_form_core(W, Gd, Ad, U, V), atol=slack * float(found.sigma[0]))


def test_the_other_side_of_a_wider_core_keeps_its_task_directions():
    """With all directions on one side there is no room for the task's there, which is nothing to the other."""
    W, G, A, D = layer(12, 30)
    found = made(W, G, A, D, 12)
    _, _, V = found.factors(6, 0.5)
    _, _, wide = found.factors(6, 0.5, width=12)
    assert torch.allclose(V[:, :3], wide[:, :3], atol=1e-12)
    held = [float((torch.linalg.qr(X)[0].T @ D.T).square().sum()) for X in (V, wide)]
    assert abs(held[1] / held[0] - 1) < 1e-9
    assert held[0] > 1.05 * float((torch.linalg.qr(found.factors(6, 0.0)[2])[0].T @ D.T).square().sum())


@shapes
def test_full_rank_equals_dense(m, n):
    W, G, A, D = layer(m, n)
    for share in (0.0, 0.3, 0.8):  # task directions take no place of the weight's there
        U, C, V = made(W, G, A, D, min(m, n)).factors(min(m, n), share)
        assert torch.allclose(U @ C @ V.T, W, atol=1e-8)
        assert (U.shape, C.shape, V.shape) == ((m, min(m, n)), (min(m, n),) * 2, (n, min(m, n)))
        assert torch.allclose(C, C.diagonal().diag(), atol=1e-12)


@shapes
def test_more_directions_than_there_are_or_were_kept_are_refused(m, n):
    """The shorter side has no more than its rows, nor has a plan of before more than it kept."""
    W, G, A, D = layer(m, n)
    rank = min(m, n)
    with pytest.raises(JactusError, match=f"{rank + 1} directions a side were asked for, but only {rank} were kept"):
        made(W, G, A, D, 3).factors(rank, 0.0, width=rank + 1)
    few = directions(W, damped(G, 0.01), damped(A, 0.01), 4, 3, gradient=D)
    with pytest.raises(JactusError, match="5 directions a side were asked for, but only 4 were kept; plan again"):
        few.factors(5, 0.0)


def test_task_directions_are_in_the_union_and_beat_weight_directions_at_holding_the_gradient():
    W, G, A, D = layer(20, 30)
    D = D[:, :1] @ D[:1] + 1e-3 * D  # nearly one direction
    found = made(W, G, A, D, 8)

    def held(share):
        U, _, V = found.factors(8, share)
        Qu, Qv = torch.linalg.qr(U)[0], torch.linalg.qr(V)[0]
        return float((Qu.T @ D @ Qv).square().sum() / D.square().sum())

    assert held(0.25) > 0.99 > 0.5 > held(0.0)


def test_more_rank_never_costs_loss_and_the_union_costs_no_more_than_its_share():
    W, G, A, D = layer(16, 24)
    found = made(W, G, A, D, 16)
    Gd, Ad = damped(G, 0.01), damped(A, 0.01)
    previous = float("inf")
    for rank in range(1, 17):
        U, C, V = found.factors(rank, 0.25)
        now = loss(W, U @ C @ V.T, Gd, Ad)
        kept = rank - task_rank(rank, 0.25)
        assert now <= float(found.sigma[kept:].square().sum()) + 1e-9, "task directions may only add to what is kept"
        assert now <= previous + 1e-9
        previous = now


def test_dependent_task_directions_are_replaced_by_weight_directions():
    W, *_ = layer(10, 14)
    W[:, :] = torch.linalg.svd(W)[0] @ torch.linspace(5, 1, 10).double().diag() @ torch.linalg.svd(W)[2][:10]
    eye = torch.eye(10, dtype=W.dtype), torch.eye(14, dtype=W.dtype)
    leading = torch.linalg.svd(W)
    D = leading[0][:, :1] @ leading[2][:1]  # the weight's own first direction: nothing new
    found = directions(W, None, None, 10, 4, gradient=D)
    U, C, V = found.factors(6, 0.5)
    assert U.shape == (10, 6)
    best = leading[0][:, :6] * leading[1][:6] @ leading[2][:6]
    assert torch.allclose(U @ C @ V.T, best, atol=1e-9)
    assert torch.allclose(U.T @ eye[0] @ U, torch.eye(6, dtype=W.dtype), atol=1e-9)


def test_rank_deficient_covariances_are_legal():
    W, _, _, D = layer(12, 12)
    G, A = covariance(12, 3, 1), covariance(12, 2, 2)
    U, C, V = made(W, G, A, D, 6).factors(12, 0.25)
    assert torch.allclose(U @ C @ V.T, W, atol=1e-6)


def steep(d, decades, seed):
    """A metric whose eigenvalues fall by so many powers of ten."""
    Q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    return Q @ torch.logspace(0, -decades, d, dtype=torch.float64).diag() @ Q.T


@shapes
@pytest.mark.parametrize("decades", [4, 8, 14])
def test_bases_stay_orthonormal_however_steep_the_metric(m, n, decades):
    """Squares lose half the digits: below RESOLVED another route must take over."""
    W, _, _, D = layer(m, n)
    G, A = steep(m, decades, 1), steep(n, decades, 2)
    found = directions(W, G, A, min(m, n), 3, gradient=D)
    L_G, L_A = torch.linalg.cholesky(G), torch.linalg.cholesky(A)
    exact = torch.linalg.svdvals(L_G.T @ W @ L_A)
    assert torch.allclose(found.sigma, exact, rtol=1e-6, atol=1e-9 * float(exact[0]))
    for basis, L in ((found.left.weight, L_G), (found.right.weight, L_A)):
        inside = L.T @ basis
        # a triangular solve is backward stable: what is lost is ε times the condition of the factor
        slack = 100 * 2**-52 * 10 ** (decades / 2)
        assert torch.allclose(inside.T @ inside, torch.eye(min(m, n), dtype=W.dtype), atol=slack)
    U, C, V = found.factors(min(m, n), 0.0)
    error = L_G.T @ (U @ C @ V.T - W) @ L_A
    assert float(error.norm()) < 1e-8 * float(exact.norm())


@shapes
def test_a_weight_of_low_rank_has_no_loss_beyond_it(m, n):
    W, G, A, D = layer(m, n)
    W = W[:, :3] @ W[:3]  # rank 3
    found = made(W, G, A, D, 4)
    assert float(found.sigma[3:].max()) < 1e-7 * float(found.sigma[0])
    for rank in (3, min(m, n)):
        U, C, V = found.factors(rank, 0.0)
        assert torch.allclose(U @ C @ V.T, W, atol=1e-9 * float(W.norm()))
        assert torch.allclose(V.T @ damped(A, 0.01) @ V, torch.eye(rank, dtype=W.dtype), atol=1e-10)


@shapes
def test_a_layer_of_zeros_and_a_gradient_of_zeros_are_legal(m, n):
    W, G, A, D = layer(m, n)
    found = made(0 * W, G, A, D, 4)
    U, C, V = found.factors(4, 0.25)
    assert float(found.sigma.max()) == 0
    assert torch.equal(U @ C @ V.T, 0 * W)
    assert torch.allclose(U.T @ damped(G, 0.01) @ U, torch.eye(4, dtype=W.dtype), atol=1e-10)
    assert made(W, G, A, 0 * D, 4).task_core.shape == (0, 0)


def test_few_task_directions_of_many_are_the_leading_ones_and_leave_the_random_state_alone():
    W, G, A, _ = layer(60, 90)
    g = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(d, 60, generator=g, dtype=torch.float64))[0] for d in (60, 90))
    D = left @ torch.logspace(0, -3, 60, dtype=torch.float64).diag() @ right.T
    before = torch.get_rng_state()
    found = directions(W, damped(G, 0.01), damped(A, 0.01), 20, 6, gradient=D.float())
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    again = directions(W, damped(G, 0.01), damped(A, 0.01), 20, 6, gradient=D.float())
    directions(W, damped(G, 0.01), damped(A, 0.01), 20, 6, gradient=D.bfloat16())
    assert torch.equal(found.left.task, again.left.task)
    held = torch.linalg.qr(found.left.task)[0].T @ D @ torch.linalg.qr(found.right.task)[0]
    assert held.square().sum() > (1 - 1e-3) * torch.linalg.svdvals(D)[:6].square().sum()


def test_a_covariance_without_signal_is_refused():
    with pytest.raises(JactusError, match="covariance is zero"):
        metric(torch.zeros(3, 3), 0.01, torch.device("cpu"))


@shapes
def test_coordinates_change_the_core_and_not_the_product(m, n):
    W, G, A, D = layer(m, n)
    U, C, V = made(W, G, A, D, min(m, n)).factors(5, 0.4)
    U2, C2, V2 = orthonormal(U, C, V)
    assert torch.allclose(U2 @ C2 @ V2.T, U @ C @ V.T, atol=1e-10)
    for B, old in ((U2, U), (V2, V)):
        assert torch.allclose(B.T @ B, torch.eye(5, dtype=B.dtype), atol=1e-10)
        for k in range(1, 6):  # leading columns span what they did
            assert torch.allclose(B[:, :k] @ (B[:, :k].T @ old[:, :k]), old[:, :k], atol=1e-10 * float(old.norm()))


def test_task_directions_can_lead():
    W, G, A, D = layer(12, 15)
    found = made(W, G, A, D, 6)
    (U, C, V), (U2, C2, V2) = found.factors(8, 0.25), found.factors(8, 0.25, task_first=True)
    assert torch.allclose(U2[:, :2], U[:, 6:])
    assert torch.allclose(V2[:, 2:], V[:, :6])
    assert torch.allclose(U2 @ C2 @ V2.T, U @ C @ V.T)
