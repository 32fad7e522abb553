"""Every step of the method on every family of models: what trains, what stays, and that all forms compute the same."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import jactus
from jactus import JactusError
from jactus.model.lowrank import CoreLinear, FoldedLinear, compressed_layers
from tests.models import BERT, BY_NAME, EVERY, FAMILIES, FULL, GPT2, LLAMA, SMALL, T5, WIDE, cast, compressed, planned

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
HEADS = {"bert": {"classifier.weight", "classifier.bias"}, "vit": {"classifier.weight", "classifier.bias"}}


@torch.no_grad()
def logits(model, family, dtype=None):
    batch = family.batch()
    return model(**(batch if dtype is None else cast(batch, dtype))).logits


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def aligned(model):
    """Its tensors where an allocator puts them: a file's lie as they do in it, and MKL sums otherwise at another alignment."""
    for t in (*model.parameters(), *model.buffers()):
        t.data = t.data.clone()
    return model


def saved_and_reloaded(model, family, path):
    jactus.save_pretrained(model, path)
    return family.auto.from_pretrained(path).eval()


@families
@pytest.mark.parametrize("config", [EVERY, WIDE, FULL], ids=["square", "wide", "full rank"])
def test_exactly_cores_and_extras_train_and_one_step_lowers_the_loss(family, config):
    model = compressed(family, config)
    layers = compressed_layers(model)
    assert set(layers) == set(planned(family.name, config).layers)
    wider = {name for name, layer in layers.items() if layer.width > layer.rank}
    full = {name for name, layer in layers.items() if layer.rank == min(layer.in_features, layer.out_features)}
    assert wider == (set(layers) - full if config is WIDE else set())
    # of both kinds there are some, and under each configuration more of the one that it is for
    assert 0 < len(full) < len(layers)
    assert (2 * len(full) >= len(layers)) == (config is FULL)
    cores = {f"{name}.core" for name in layers}
    biases = {f"{name}.bias" for name, layer in layers.items() if layer.bias is not None}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == cores | biases | HEADS.get(family.name, set())

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = family.batch(seed=5)
    loss = model(**batch).loss
    loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    optimizer.step()
    # a step of length ε down the gradient lowers the loss by ε‖g‖² to first order
    assert model(**batch).loss < loss
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= set(trainable)
    assert all(layer.core.grad.any() for layer in layers.values())


@families
def test_what_is_not_planned_is_bit_identical_after_compress(family):
    dense, model = family.model(), compressed(family)
    layers = compressed_layers(model)
    assert layers
    kept = model.state_dict()
    for name, value in dense.state_dict().items():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(kept[name], value), name
    assert any("embed" in n or n.endswith(("wte.weight", "shared.weight")) for n in kept)


def assert_same_tensors(model, other):
    """Bit for bit, where the pivots are among them."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) and t.dtype == theirs[name].dtype for name, t in ours.items())
    assert any(name.endswith((".rows", ".columns", ".order")) for name in ours)


@families
@pytest.mark.parametrize("config", [EVERY, WIDE, FULL], ids=["square", "wide", "full rank"])
def test_every_form_and_its_reload_compute_the_same(family, config, tmp_path):
    # in float64, so that only a wrong formula can show: rounding is some 1e-14 over two blocks
    model = compressed(family, config, torch.float64)
    for layer in compressed_layers(model).values():
        torch.nn.init.normal_(layer.core, std=0.3)
    expected = logits(aligned(model), family, torch.float64)
    again = saved_and_reloaded(model, family, tmp_path / "core")
    assert_same_tensors(again, model)
    assert torch.equal(logits(aligned(again), family, torch.float64), expected)

    cores = {f"{name}.core" for name in compressed_layers(model)}
    extras = {name for name, p in model.named_parameters() if p.requires_grad} - cores
    low = {n for n, x in compressed_layers(model).items() if x.rank < min(x.in_features, x.out_features)}
    jactus.fold(model)
    assert set(compressed_layers(model)) == low, "what has its full rank is dense again"
    assert all(isinstance(layer, FoldedLinear) for layer in compressed_layers(model).values())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == extras
    folded = logits(aligned(model), family, torch.float64)
    assert relative(folded, expected) < 1e-12
    again = saved_and_reloaded(model, family, tmp_path / "folded")
    assert_same_tensors(again, model)
    assert torch.equal(logits(aligned(again), family, torch.float64), folded)

    for part in (model, again):
        jactus.merge(part)
        assert not compressed_layers(part)
        assert relative(logits(part, family, torch.float64), expected) < 1e-12


@families
def test_a_merged_model_saves_as_a_plain_checkpoint(family, tmp_path):
    model = jactus.merge(compressed(family, EVERY))
    expected = logits(model, family)
    model.save_pretrained(tmp_path)  # transformers' own
    again = family.auto.from_pretrained(tmp_path).eval()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert again.state_dict().keys() == family.model().state_dict().keys()
    assert torch.equal(logits(again, family), expected)
    assert {type(m) for m in again.modules()} == {type(m) for m in family.model().modules()}


@pytest.mark.parametrize("config", [EVERY, WIDE, FULL], ids=["square", "wide", "full rank"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@families
def test_half_precision_bases_and_float32_cores_survive_a_reload(family, dtype, config, tmp_path):
    # loaded as a user would: transformers keeps some of T5's layers in float32 whatever the dtype asked for
    family.model().save_pretrained(tmp_path / "dense")
    model = family.auto.from_pretrained(tmp_path / "dense", dtype=dtype).eval()
    batches = [cast(b, dtype) for b in family.batches()]
    statistics = jactus.calibrate(model, batches, config, progress=False)
    wanted = {name: p.dtype for name, p in model.named_parameters()}
    jactus.compress(model, jactus.plan(model, statistics, config, progress=False))
    again = saved_and_reloaded(model, family, tmp_path / "small")
    assert torch.equal(logits(again, family, dtype), logits(model, family, dtype))
    for either in (model, again):
        for name, layer in compressed_layers(either).items():
            assert layer.core.dtype == torch.float32
            assert layer.U.dtype == layer.V.dtype == wanted[f"{name}.weight"]


def test_storage_dtypes_can_be_chosen_and_survive_a_reload(tmp_path):
    config = EVERY.replace(dtype="bfloat16", core_dtype="bfloat16")
    model = compressed(BERT, config)
    again = saved_and_reloaded(model, BERT, tmp_path)
    assert {p.dtype for m in compressed_layers(again).values() for p in (m.U, m.V, m.core)} == {torch.bfloat16}
    assert again.bert.embeddings.word_embeddings.weight.dtype == torch.float32
    assert {m.bias.dtype for m in compressed_layers(again).values()} == {torch.float32}
    assert torch.equal(logits(again, BERT), logits(model, BERT))


def test_factors_wider_than_what_they_replace_are_refused():
    model = LLAMA.model().to(torch.bfloat16)
    statistics = jactus.calibrate(model, LLAMA.batches(), EVERY, progress=False)
    with pytest.raises(JactusError, match=r"q_proj.*bfloat16.*dtype = 'float32' would store its factors wider"):
        jactus.plan(model, statistics, EVERY.replace(dtype="float32"), progress=False)
    small = jactus.compress(model, jactus.plan(model, statistics, EVERY.replace(dtype="float16"), progress=False))
    assert torch.isfinite(logits(jactus.merge(small), LLAMA, torch.bfloat16)).all()
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [EVERY, FULL], ids=["low rank", "full rank"])
@families
def test_layers_that_become_dense_take_the_dtype_of_those_they_replaced(family, config, tmp_path):
    """A dense layer does not cast as a low-rank one does: narrow bases in a float32 model must not stay narrow."""
    model = compressed(family, config.replace(dtype="bfloat16"))
    expected = logits(model, family)
    jactus.fold(model)
    for form in (model, saved_and_reloaded(model, family, tmp_path)):
        assert relative(logits(form, family), expected) < 2**-6  # factors are rounded to bfloat16 again
        folded = logits(form, family)
        jactus.merge(form)
        assert relative(logits(form, family), folded) < 2**-8  # T5 itself casts to what `wo.weight` is
        assert {p.dtype for p in form.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", [LLAMA, GPT2, T5], ids=lambda f: f.name)
def test_tied_embeddings_stay_tied_and_untouched(family, tmp_path):
    dense, model = family.model(), compressed(family, EVERY)
    for each in (model, saved_and_reloaded(model, family, tmp_path)):
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
        assert torch.equal(each.get_input_embeddings().weight, dense.get_input_embeddings().weight)


@families
def test_gradient_checkpointing_changes_no_gradient(family):
    def gradients(checkpointing):
        model = compressed(family, EVERY).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # the same dropout
        model(**family.batch()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    for name, g in plain.items():
        assert torch.equal(g, checkpointed[name]), name


def test_a_compressed_model_compiles_whole():
    model = compressed(BERT, EVERY)
    model.bert.encoder.layer = model.bert.encoder.layer[:1]  # one block is as good, and quicker
    batch = BERT.batch()
    expected = torch.autograd.grad(model(**batch).loss, model.classifier.weight)[0]
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = whole(**batch).loss
    assert torch.allclose(loss, model(**batch).loss, atol=1e-6)
    loss.backward()
    assert torch.allclose(model.classifier.weight.grad, expected, atol=1e-6)
    assert all(layer.core.grad is not None for layer in compressed_layers(model).values())


def test_the_base_model_loads_what_was_saved_with_a_head_and_the_other_way_round(tmp_path):
    model = compressed(BERT, EVERY)
    jactus.save_pretrained(model, tmp_path / "with")
    batch = {k: v for k, v in BERT.batch().items() if k != "labels"}
    base = AutoModel.from_pretrained(tmp_path / "with").eval()
    assert len(compressed_layers(base)) == len(compressed_layers(model))
    with torch.no_grad():
        expected = model.bert(**batch).last_hidden_state
        assert torch.equal(base(**batch).last_hidden_state, expected)
        jactus.save_pretrained(base, tmp_path / "without")
        headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "without").eval()
        assert torch.equal(headed.bert(**batch).last_hidden_state, expected)


def test_a_part_of_the_core_can_train_and_all_of_it_reloads(tmp_path):
    model = compressed(BERT, EVERY.replace(trainable_rank=2))
    layers = compressed_layers(model)
    blocks = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith((".core", ".block"))}
    small = {name for name, layer in layers.items() if layer.rank <= 2}
    assert blocks == {f"{name}.core" if name in small else f"{name}.block" for name in layers}
    for layer in layers.values():
        if layer.block is not None:
            torch.nn.init.normal_(layer.block)
    expected = logits(model, BERT)
    assert torch.equal(logits(saved_and_reloaded(model, BERT, tmp_path), BERT), expected)
    # folding multiplies four float32 roundings per layer, over two blocks
    assert relative(logits(jactus.fold(model), BERT), expected) < 1e-5


def test_what_requires_grad_is_remembered_by_the_models_own_save(tmp_path):
    model = compressed(BERT)
    chosen = set(jactus.mark_trainable(model, ("LayerNorm",)))
    assert any("LayerNorm" in name for name in chosen)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == chosen


def test_extras_get_learning_rates_of_their_own_and_the_rest_the_common_one():
    model = compressed(BERT)
    chosen = jactus.mark_trainable(model, ("head", "bias", "word_embeddings"))
    embedding, head = model.get_input_embeddings().weight, model.classifier
    groups = jactus.parameter_groups(model, 2e-3, {"word_embeddings": 1e-4, "head": 1e-3})
    assert [group["lr"] for group in groups] == [2e-3, 1e-4, 1e-3]
    assert [list(map(id, group["params"])) for group in groups[1:]] == [
        [id(embedding)],
        [id(head.weight), id(head.bias)],
    ]
    by_name = dict(model.named_parameters())
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(by_name[name]) for name in chosen)  # each once
    assert [g["lr"] for g in jactus.parameter_groups(model, 1.0, {})] == [1.0]

    before = embedding.detach().clone()
    model(**BERT.batch()).loss.backward()
    torch.optim.SGD(jactus.parameter_groups(model, 0.1, {"word_embeddings": 0.5})).step()
    torch.testing.assert_close(embedding.detach(), before - 0.5 * embedding.grad)


def test_a_rate_for_what_does_not_train_or_has_one_already_is_refused():
    model = compressed(BERT)
    with pytest.raises(JactusError, match=r"word_embeddings.*trainable_extras"):
        jactus.parameter_groups(model, 1e-3, {"word_embeddings": 1e-4})
    with pytest.raises(JactusError, match=r"'haed'.*no module at all"):
        jactus.parameter_groups(model, 1e-3, {"haed": 1e-4})
    with pytest.raises(JactusError, match=r"'encoder'.*inside it"):
        jactus.mark_trainable(model, ("encoder",))
    with pytest.raises(JactusError, match=r"classifier.*another"):
        jactus.parameter_groups(model, 1e-3, {"head": 1e-4, "classifier": 1e-4})


def test_a_tied_weight_trains_under_either_name():
    model = compressed(BY_NAME["gpt2"])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    chosen = [set(jactus.mark_trainable(model, (name,))) for name in ("lm_head", "wte")]
    assert chosen[0] == chosen[1] >= {"transformer.wte.weight"}


def test_a_weight_of_three_names_is_in_its_group_once():
    model = compressed(T5)
    jactus.mark_trainable(model, ("embed_tokens",))
    (group,) = jactus.parameter_groups(model, 1e-3, {"embed_tokens": 1e-4})[1:]
    assert [id(p) for p in group["params"]] == [id(model.shared.weight)]


def test_a_reloaded_model_is_an_ordinary_one_to_cast(tmp_path):
    model = saved_and_reloaded(compressed(BERT, EVERY), BERT, tmp_path)
    for dtype in (torch.float64, torch.float32, torch.float16):
        assert {p.dtype for p in model.to(dtype).parameters()} == {dtype}
    assert {p.dtype for p in model.float().half().parameters()} == {torch.float16}
    read = BERT.auto.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    bases = {p.dtype for m in compressed_layers(read).values() for p in (m.U, m.V)}
    assert bases == {torch.bfloat16}
    for each in (model, read):  # where the pivots are is no number to cast
        found = {name: b.dtype for name, b in each.named_buffers() if name.endswith((".rows", ".columns"))}
        assert set(found.values()) == {torch.int64}
    assert relative(logits(read, BERT), logits(compressed(BERT, EVERY), BERT)) < 5e-2


def test_layers_left_dense_stay_the_very_modules_they_were():
    model = BY_NAME["bert"].model()
    before = dict(model.named_modules())
    chosen = planned("bert", SMALL)
    some = list(chosen.ranks)[::2]
    chosen = dataclasses.replace(chosen, ranks={**chosen.ranks, **dict.fromkeys(some)})
    jactus.compress(model, chosen)
    for name, rank in chosen.ranks.items():
        assert isinstance(model.get_submodule(name), CoreLinear) if rank else model.get_submodule(name) is before[name]
