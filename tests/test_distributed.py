"""Calibration and planning in several processes: the same as in one, and clear errors where ranks differ, raise or die."""

import os
import time

import pytest
import torch
import torch.distributed as dist

import jactus
from jactus import JactusError, Statistics
from jactus.calibration.distributed import _device
from jactus.model.lowrank import compressed_layers
from jactus.planning import planner
from jactus.planning.latency import Times
from jactus.planning.sharing import shares
from tests.models import BERT, EVERY, SMALL
from tests.ranks import together
from tests.test_statistics import assert_same_sums, calibrated

LIMIT = 60_000  # float64: several parts of BERT
PLAIN = SMALL.replace(union=("weight",))  # with smaller sides and traces
UNEVEN = {2: [[0, 1, 2, 3], [4]], 4: [[0], [], [1, 2, 3], [4]]}  # which batches each rank has; one has none


def world():
    return dist.group.WORLD


def shard(rank):
    batches = BERT.batches(5)
    return [batches[i] for i in UNEVEN[dist.get_world_size()][rank]]


def _summed(rank):
    model, own = BERT.model(), shard(rank)
    one = calibrated(model, own, group=world())
    if dist.get_world_size() == 2:
        return one, calibrated(model, own).all_reduce_()
    later = Statistics() if rank == 1 else calibrated(model, own, PLAIN, memory_limit=40_000)
    return one, later.all_reduce_()


@pytest.mark.parametrize("ranks", [2, 4])
def test_uneven_shards_and_one_without_data_sum_to_the_whole(ranks, tmp_path):
    model, batches = BERT.model(), BERT.batches(5)
    whole = calibrated(model, batches)
    other = whole if ranks == 2 else calibrated(model, batches, PLAIN, memory_limit=40_000)
    found = together(_summed, ranks, tmp_path)
    for its in found:
        for sums, right in zip(its, (whole, other)):
            assert_same_sums(sums, right)
            assert sums.config == right.config
            assert all(torch.equal(S, S.T) for S in sums.input_sums.values())
        for sums, first in zip(its, found[0]):
            assert all(torch.equal(a, b) for a, b in zip(sums._sums(), first._sums())), "bit for bit on all ranks"


def _adapted(rank, limit=None):
    model = jactus.adapt(
        BERT.model(),
        shard(rank),
        0.7,
        SMALL,
        fit_head=True,
        progress=False,
        group=world(),
        statistics_dtype="float64",
        memory_limit=limit,
    )
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_adapt_ends_with_one_model_on_all_ranks_and_that_of_one_process(limit, tmp_path):
    found = together(_adapted, 4, tmp_path, limit)
    for state in found:
        assert state.keys() == found[0].keys()
        assert all(torch.equal(t, found[0][name]) for name, t in state.items())
    one = jactus.adapt(
        BERT.model(), BERT.batches(5), 0.7, SMALL, fit_head=True, progress=False, statistics_dtype="float64"
    )
    batch = BERT.batch()
    right = one(**batch).logits
    one.load_state_dict(found[0])  # of the same shapes
    # the head ends where L-BFGS stops, on sums that round otherwise
    assert torch.allclose(one(**batch).logits, right, atol=1e-3)


def test_a_limit_with_a_snapshot_that_no_two_ranks_share_is_refused():
    model = BERT.model()
    with pytest.raises(JactusError, match=r"group=.*memory_limit.*leave resume out"):
        jactus.adapt(model, BERT.batches(2), 0.7, SMALL, memory_limit=LIMIT, resume="run", group=object())
    assert not compressed_layers(model)


def _planned(rank, path):
    statistics, model = Statistics.load(path), BERT.model()
    jactus.plan(model, statistics, EVERY, progress=False, group=world()).save(f"{path}.{rank}.plan")
    # what each rank measures is its own, and may not lead to ranks of its own
    planner.measured = lambda targets, config: {n: Times(1.0, (2, 8), (0.1 * (1 + rank), 0.8)) for n in targets}
    timed = jactus.plan(model, statistics, EVERY.replace(budget_unit="latency"), progress=False, group=world())
    return timed.ranks, {name: layer.times for name, layer in timed.layers.items()}


def test_ranks_plan_some_layers_each_and_all_have_the_plan_of_one(tmp_path):
    statistics = calibrated(BERT.model(), BERT.batches(5), EVERY)
    statistics.save(tmp_path / "sums")
    found = together(_planned, 4, tmp_path, str(tmp_path / "sums"))
    assert all(its == found[0] for its in found)
    assert {times.folded for times in found[0][1].values()} == {(0.1, 0.8)}, "all of one machine: rank 0's"
    jactus.plan(BERT.model(), statistics, EVERY, progress=False).save(tmp_path / "alone")
    for rank in range(4):
        assert (tmp_path / f"sums.{rank}.plan").read_bytes() == (tmp_path / "alone").read_bytes()


def test_work_is_shared_by_cost_and_layers_of_one_input_stay_together():
    from jactus.model.targets import find_targets

    targets = find_targets(BERT.model(), SMALL)
    owners = {name: name.replace("key", "query").replace("value", "query") for name in targets}
    parts = shares(targets, owners, 4)
    assert sorted(name for part in parts for name in part) == sorted(targets)
    for part in parts:
        assert all(owners[name] in part for name in part)
    work = [sum(targets[n].m * targets[n].n * min(targets[n].m, targets[n].n) for n in part) for part in parts]
    heaviest = max(
        sum(targets[n].m * targets[n].n * min(targets[n].m, targets[n].n) for n in targets if owners[n] == o)
        for o in targets
    )
    assert max(work) - min(work) <= heaviest
    assert len(shares(targets, {}, 40)) == 40, "more ranks than layers leaves some without"


def _other(rank, what):
    model = BERT.model(seed=1 if rank == 1 and what == "model" else 0)
    if rank == 1 and what == "head":
        torch.nn.init.normal_(model.classifier.weight)
    config = SMALL.replace(budget=0.3) if rank == 1 and what == "config" else SMALL
    if what == "sums":  # as where all_reduce_ was forgotten
        return jactus.plan(model, calibrated(model, shard(rank)), config, progress=False, group=world())
    return calibrated(model, BERT.batches(2), config, group=world())


@pytest.mark.parametrize(
    "what, message",
    [
        ("model", "rank 1 has another model than rank 0, in bert.embeddings.word_embeddings.weight and"),
        ("head", "rank 1 has another model than rank 0, in classifier.weight and 0 more"),
        ("config", "rank 1 has another configuration than rank 0, in budget"),
        ("sums", "plan: rank 1 has another configuration than rank 0, in statistics"),
    ],
)
def test_ranks_with_other_models_or_configurations_are_refused_by_name(what, message, tmp_path):
    for error in together(_other, 2, tmp_path, what):
        assert isinstance(error, JactusError)
        assert message in str(error)


def _merged(rank, how):
    config = SMALL.replace(metric="input") if rank == 1 and how == "config" else SMALL
    found = calibrated(BERT.model(seed=1 if rank == 1 and how == "model" else 0), BERT.batches(2), config)
    kept = [t.clone() for t in found._sums()]
    try:
        found.all_reduce_()
    except JactusError as e:
        assert all(torch.equal(a, b) for a, b in zip(found._sums(), kept))
        return str(e)


@pytest.mark.parametrize("how", ["model", "config"])
def test_sums_of_other_models_are_not_added(how, tmp_path):
    for error in together(_merged, 2, tmp_path, how):
        assert "all_reduce_: ranks 0 and 1 calibrated" in error


def _dies(rank, how, folder):
    """Rank 1 goes away in its second batch, or in the middle of the reduction."""

    def batches():
        for i, batch in enumerate(BERT.batches(3)):
            if rank == 1 and i == 1 and how in ("dies", "raises"):
                os._exit(7) if how == "dies" else (_ for _ in ()).throw(ValueError("a bad row"))
            yield batch

    own = calibrated(BERT.model(), batches())
    own.save(f"{folder}/{rank}")
    if rank == 1 and how == "dies in the reduction":
        reduce, calls = dist.all_reduce, []
        dist.all_reduce = lambda *a, **k: os._exit(7) if len(calls) == 3 else (calls.append(1), reduce(*a, **k))
    start = time.monotonic()
    try:
        own.all_reduce_()
    except JactusError as e:
        return str(e), time.monotonic() - start, own
    return None


@pytest.mark.parametrize("how", ["dies", "raises", "dies in the reduction"])
def test_a_rank_that_is_lost_is_an_error_on_the_others_whose_sums_stay_their_own(how, tmp_path):
    alive_0, lost, alive_2 = together(_dies, 3, tmp_path, how, str(tmp_path), timeout=10)
    assert lost == 7 or isinstance(lost, ValueError)
    for rank, its in ((0, alive_0), (2, alive_2)):
        message, seconds, own = its
        assert "waited for the others in vain" in message
        assert seconds < 30
        kept = Statistics.load(tmp_path / str(rank))
        assert own.terms == kept.terms
        assert all(torch.equal(a, b) for a, b in zip(own._sums(), kept._sums()))
    assert alive_0[2].merge_([alive_2[2]]).terms == 2 * alive_2[2].terms
    own = Statistics.load(tmp_path / "0").merge_([Statistics.load(tmp_path / "2")])
    assert_same_sums(alive_0[2], own)


def _interrupted(rank, path, stop):
    def batches():
        for i, batch in enumerate(shard(rank)):
            if rank == stop and i == 2:
                raise KeyError("stopped")
            seen.append(i)
            yield batch

    seen = []
    try:
        return calibrated(BERT.model(), batches(), resume=path, resume_every=0, group=world()), seen
    except (KeyError, JactusError):
        return None


def test_every_rank_has_its_own_snapshot_and_all_go_on_from_theirs(tmp_path):
    """One path for all of them; rank 0 is stopped, and what rank 1 had summed is kept."""
    path = tmp_path / "run.snapshot"
    assert together(_interrupted, 2, tmp_path, str(path), 0, timeout=10) == [None, None]
    kept = {"run.rank0of2.snapshot", "run.rank1of2.snapshot", "run.rank1of2.snapshot.part0"}
    assert {p.name for p in tmp_path.glob("run*")} == kept
    written = (tmp_path / "run.rank1of2.snapshot").stat().st_mtime_ns
    whole = calibrated(BERT.model(), BERT.batches(5))
    for sums, _ in together(_interrupted, 2, tmp_path, str(path), None):
        assert_same_sums(sums, whole)
    assert written
    assert not list(tmp_path.glob("run*")), "removed at the end"


def _nothing(rank):
    return calibrated(BERT.model(), [], group=world())


def _by_a_twin(rank):
    """A group that is not of gloo alone, as NCCL's: what ranks say goes over a group of its own."""
    both = dist.new_group(backend="cpu:gloo,cuda:gloo")
    assert dist.get_backend(both) != "gloo"
    return calibrated(BERT.model(), shard(rank), group=both)


def test_a_group_of_another_backend_reduces_the_same(tmp_path):
    whole = calibrated(BERT.model(), BERT.batches(5))
    for sums in together(_by_a_twin, 2, tmp_path):
        assert_same_sums(sums, whole)


def test_sums_on_the_cpu_go_where_the_group_reduces(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    assert _device(None, torch.device("cpu")) == torch.device("cuda")
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    assert _device(None, torch.device("cpu")) == torch.device("cpu")
    assert _device(None, torch.device("cuda", 3)) == torch.device("cuda", 3)


def test_a_launched_process_without_a_group_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for step in (jactus.calibrate, jactus.adapt):
        with pytest.raises(JactusError, match=r"one of 2 processes of torchrun.*init_process_group"):
            step(BERT.model(), BERT.batches(2))


def test_no_batch_on_any_rank_is_an_error(tmp_path):
    for error in together(_nothing, 2, tmp_path):
        assert "none of the 2 ranks has any sums" in str(error)


def test_one_process_without_a_group_is_as_ever():
    found = calibrated(BERT.model(), BERT.batches(2))
    assert_same_sums(calibrated(BERT.model(), BERT.batches(2), group=dist.group.WORLD).all_reduce_(), found)
