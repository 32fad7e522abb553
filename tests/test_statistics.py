"""Calibration: what is summed, that it does not depend on how the examples come, and that nothing is left behind."""

import copy

import pytest
import torch
from torch import nn

import jactus
from jactus import Statistics
from jactus.calibration.recorder import Recorder
from tests.models import BERT, FAMILIES, GPT2, LLAMA, SMALL, T5, VIT


def calibrated(model, batches, config=SMALL, statistics_dtype="float64", **kwargs):
    return jactus.calibrate(model, batches, config, statistics_dtype=statistics_dtype, progress=False, **kwargs)


def assert_same_sums(a: Statistics, b: Statistics, rtol=1e-10):
    assert a.terms == b.terms
    assert a.tokens == b.tokens
    assert list(a.layers) == list(b.layers)
    for x, y in zip(a._sums(), b._sums()):
        assert torch.allclose(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))


def rows(batches, size):
    """The same examples, in the same order, at another batch size."""
    whole = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    count = len(next(iter(whole.values())))
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, count, size)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_batch_size_does_not_matter(family):
    model = family.model(dtype=torch.float64)
    examples = family.batches(17)
    if "pixel_values" in examples[0]:
        for batch in examples:
            batch["pixel_values"] = batch["pixel_values"].double()
    one, four, all_but_ragged = (calibrated(model, rows(examples, size)) for size in (1, 4, 64))
    assert_same_sums(one, four)
    assert_same_sums(one, all_but_ragged)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_shards_merge_to_the_whole(family):
    model = family.model()
    batches = family.batches(5)
    config = SMALL
    whole = calibrated(model, batches, config)
    parts = [calibrated(model, shard, config) for shard in (batches[:2], batches[2:3], batches[3:])]
    assert_same_sums(parts[0].merge_(parts[1:]), whole, rtol=1e-5)


def test_sums_are_what_they_say(tmp_path):
    """Against the definitions, on a plain module with an unreduced loss of the user's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(11, 5).double(), torch.randint(0, 3, (11,))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    found = calibrated(model, [(x[:4], y[:4]), (x[4:], y[4:])], loss=loss)
    hidden = model[1](model[0](x))
    logits = model[2](hidden)
    g2 = torch.softmax(logits, 1) - nn.functional.one_hot(y, 3)
    g1 = (g2 @ model[2].weight) * (1 - hidden.square())
    for name, inputs, g in (("0", x, g1), ("2", hidden, g2)):
        assert torch.allclose(found.input_covariance(name), inputs.T @ inputs / 11)
        assert torch.allclose(found.output_covariance(name), g.T @ g / 11)
        assert torch.allclose(found.mean_gradient(name), g.T @ inputs / 11)
    assert found.terms == 11
    assert found.layer_tokens("0") == 11


@pytest.mark.parametrize("form", ["terms", "pair"])
def test_every_form_of_a_loss_gives_the_same(form):
    model, batches = BERT.model(), BERT.batches()

    def loss(model, batch):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        terms = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return terms if form == "terms" else (terms.sum(), len(terms))

    assert_same_sums(calibrated(model, batches, loss=loss), calibrated(model, batches), rtol=1e-5)


@pytest.mark.parametrize("family", [BERT, LLAMA, GPT2, T5], ids=lambda f: f.name)
def test_padding_changes_nothing(family):
    """A row padded to any length gives the sums of the row alone."""
    model = family.model(dtype=torch.float64)
    batch = family.batch(rows=4, length=7)
    bare = []
    for i in range(4):
        keep = int(batch["attention_mask"][i].sum())
        row = {k: v[i : i + 1, :keep] if v.dim() > 1 and v.shape[1] == 7 else v[i : i + 1] for k, v in batch.items()}
        if family is T5:
            row["labels"] = row["labels"][:, : int((row["labels"] != -100).sum())]
        bare.append(row)
    assert_same_sums(calibrated(model, [batch]), calibrated(model, bare))


def test_equal_lengths_do_not_confuse_encoder_and_decoder_masks():
    model = T5.model(dtype=torch.float64)
    batch = T5.batch(rows=4, length=5)  # labels are of length 5 too
    batch["labels"][0, 3:] = -100
    found = calibrated(model, [batch])
    encoder, decoder = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    for name in found.layers:
        cross = name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        expected = decoder if name.startswith("decoder") and not cross else encoder
        assert found.layer_tokens(name) == expected, name


def test_layers_with_one_input_share_its_sum():
    for family, groups in (
        (BERT, [("query", "key", "value")]),
        (LLAMA, [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]),
    ):
        found = calibrated(family.model(), family.batches())
        for name, layer in found.layers.items():
            ending = name.rpartition(".")[2]
            group = next((g for g in groups if ending in g), (ending,))
            assert layer.inputs.rpartition(".")[2] == group[0], name
        assert set(found.input_sums) == {layer.inputs for layer in found.layers.values()}
    t5 = calibrated(T5.model(), T5.batches())
    cross = {s.inputs for n, s in t5.layers.items() if n.endswith(("EncDecAttention.k", "EncDecAttention.v"))}
    assert len(cross) == 1, "all cross-attentions read the same encoder output"


def test_sharing_changes_no_value():
    model, batches = BERT.model(dtype=torch.float64), BERT.batches()
    shared = calibrated(model, batches)
    name = "bert.encoder.layer.1.attention.self.value"
    alone = calibrated(model, batches, SMALL.replace(target_modules=(name,)))
    assert torch.allclose(shared.input_covariance(name), alone.input_covariance(name))
    assert torch.allclose(shared.output_covariance(name), alone.output_covariance(name))


@pytest.mark.parametrize("sources", [("weight",), ("weight", "covariance"), ("weight", "gradient")])
@pytest.mark.parametrize("metric", ["identity", "input", "gradient", "fisher"])
def test_only_what_is_needed_is_collected(metric, sources):
    config = SMALL.replace(metric=metric, union=sources)
    found = calibrated(VIT.model(), VIT.batches(), config)
    name = "vit.layers.0.attention.q_proj"
    name = name if name in found.layers else next(iter(found.layers))
    covariances = "covariance" in sources
    assert (found.input_covariance(name) is not None) == (metric in ("input", "fisher") or covariances)
    assert (found.output_covariance(name) is not None) == (metric in ("gradient", "fisher") or covariances)
    assert (found.mean_gradient(name) is not None) == ("gradient" in sources)
    assert found.layer_tokens(name) > 0


def test_several_passes_under_a_memory_limit_give_the_same():
    model, batches = BERT.model(), BERT.batches()
    whole = calibrated(model, batches, SMALL)
    limited = calibrated(model, batches, SMALL, memory_limit=12_000)
    assert len(limited.input_sums) > len(whole.input_sums), "groups are split where a pass ends"
    assert whole.terms == limited.terms
    for name in whole.layers:
        for kind in ("input_covariance", "output_covariance", "mean_gradient"):
            assert torch.equal(getattr(whole, kind)(name), getattr(limited, kind)(name)), (name, kind)


def test_the_loss_scale_is_divided_out():
    model, batches = BERT.model(dtype=torch.float64), BERT.batches()
    assert_same_sums(calibrated(model, batches, loss_scale=1024.0), calibrated(model, batches))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_sum_in_float32(dtype):
    """The sums of a half-precision model are as near to float64's as its own rounding lets them be."""
    exact = calibrated(BERT.model(dtype=torch.float64), BERT.batches())
    found = calibrated(BERT.model(dtype=dtype), BERT.batches(), SMALL, statistics_dtype="float32")
    name = "bert.encoder.layer.0.intermediate.dense"
    assert found.input_sums[found.layers[name].inputs].dtype == torch.float32
    error = (found.input_covariance(name).double() - exact.input_covariance(name)).norm()
    # inputs carry a few roundings of 2⁻⁸ (2⁻¹¹) each; squares twice that
    assert error < 8 * torch.finfo(dtype).eps * exact.input_covariance(name).norm()


def test_under_autocast():
    model, batches = BERT.model(), BERT.batches()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = calibrated(model, batches, SMALL, statistics_dtype="float32")
    same_terms = calibrated(model, batches, SMALL, statistics_dtype="float32")
    assert found.terms == same_terms.terms
    for x, y in zip(found._sums(), same_terms._sums()):
        assert x.dtype == torch.float32
        assert float((x - y).norm()) < 0.1 * float(y.norm())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_model(fails, monkeypatch):
    model = BERT.model().train()
    model.bert.encoder.layer[0].eval()
    next(model.parameters()).requires_grad_(False)
    seen = []
    handle = model.bert.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *a: seen.append(1))

    def state():
        hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
        modes = {n: m.training for n, m in model.named_modules()}
        return hooks, modes, {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}

    before, weights = state(), copy.deepcopy(model.state_dict())
    if fails:
        monkeypatch.setattr(Recorder, "end", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, BERT.batches())
    else:
        calibrated(model, BERT.batches())
    assert state() == before
    assert seen, "another tool's hook still ran"
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    handle.remove()


def test_a_file_gives_the_same_statistics_back(tmp_path):
    found = calibrated(LLAMA.model(), LLAMA.batches(), SMALL)
    found.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert (loaded.terms, loaded.tokens) == (found.terms, found.tokens)
    assert all(torch.equal(a, b) for a, b in zip(loaded._sums(), found._sums()))


class _Wrapper(nn.Module):
    """A module of the user's own around a transformers model: no `.config` of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        return self.inner(**batch)


def test_a_wrapped_encoder_decoder_keeps_its_masks_apart():
    batch = T5.batch(rows=4, length=5)
    bare, wrapped = (
        calibrated(T5.model(), [batch]),
        calibrated(_Wrapper(T5.model()), [batch], SMALL.replace(exclude_modules=r".*lm_head")),
    )
    for name in bare.layers:
        assert bare.layer_tokens(name) == wrapped.layer_tokens(f"inner.{name}")


def test_a_subclass_of_a_causal_model_counts_its_terms_as_it_does():
    class Mine(type(LLAMA.model())):
        pass

    mine = Mine(LLAMA.config).double().eval()
    mine.load_state_dict(LLAMA.model().state_dict())
    assert_same_sums(calibrated(mine, LLAMA.batches()), calibrated(LLAMA.model(dtype=torch.float64), LLAMA.batches()))


def test_unreduced_terms_of_ignored_labels_do_not_count():
    model, batches = LLAMA.model(dtype=torch.float64), LLAMA.batches()

    def loss(model, batch):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")

    # the model computes its loss from float32 logits
    assert_same_sums(calibrated(model, batches, loss=loss), calibrated(model, batches), rtol=1e-5)


def test_rows_that_are_not_tokens_are_refused_with_or_without_padding():
    class Positions(_Wrapper):
        def forward(self, **batch):
            self.inner.bert.encoder.layer[0].attention.self.query(torch.randn(1, 9, 16))
            return self.inner(**batch)

    batch = BERT.batch()
    for mask in (batch["attention_mask"], torch.ones_like(batch["attention_mask"])):
        with pytest.raises(
            jactus.JactusError, match=r"query .*(was called 2 times.*depends on 1|cannot be told from padding)"
        ):
            calibrated(Positions(BERT.model()), [{**batch, "attention_mask": mask}])
    with pytest.raises(jactus.JactusError, match="2-D"):
        calibrated(BERT.model(), [{**batch, "attention_mask": batch["attention_mask"][:, None, None]}])


def test_a_half_precision_loss_does_not_overflow():
    model = BERT.model()

    def loss(model, batch):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return (1e4 * nn.functional.cross_entropy(logits, batch["labels"], reduction="none")).half()

    assert torch.isfinite(
        calibrated(model, BERT.batches(rows=16), SMALL, loss=loss).output_covariance("bert.pooler.dense")
    ).all()
