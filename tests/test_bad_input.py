"""What a user can do wrong, each refused by a message that says where and what to do, and leaves the model as it was."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoModel

import jactus
from jactus import JactusConfig, JactusError
from jactus.config import FLAT, GROUPS
from tests.models import BERT, EVERY, FAMILIES, LLAMA, SMALL, compressed, planned
from tests.unchanged import assert_same, state

LAYER0, LAYER1 = "bert.encoder.layer.0", "bert.encoder.layer.1"


def calibrate(model, batches, config=SMALL, **kwargs):
    return jactus.calibrate(model, batches, config, progress=False, **kwargs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0},
        {"budget": -0.5},
        {"budget": 1.01},
        {"budget": 80},
        {"budget": float("nan")},
        {"budget_unit": "params"},
        {"budget_unit": "latency", "accounting": "folded"},  # what was measured is deployed, and that is compact
        {"budget_unit": "latency", "accounting": "three_factor"},
        {"latency_tokens": 0},
        {"accounting": "stored"},
        {"scope": "layers"},
        {"metric": "kfac"},
        {"damping": 0},
        {"damping": -1},
        {"union": ("gradient",)},
        {"union": ("weight", "hessian")},
        {"union_share": 1.0},
        {"union_share": -0.1},
        {"allocation": "best"},
        {"rank_floor": -1},
        {"rank_floor": 1.5},
        {"rank_multiple": 0},
        {"uniform_part": 1.5},
        {"dtype": "int8"},
        {"dtype": "floaty"},
        {"core_dtype": "bf16"},
        {"trainable_rank": 0},
        {"core_width": 2.0, "accounting": "three_factor"},  # stored size counted with square cores
        {"core_width": 0.5},
        {"core_width": 2.0, "trainable_rank": 8},
        {"core_width": 2.0, "accounting": "folded", "trainable_rank": 8},
        {"budget": "0.8"},
        {"budget": True},
        {"rank_multiple": 1.5},
        {"rank_multiple": "16"},
        {"union": ("weight", "weight")},
        {"union": None},
        {"target_modules": None},
        {"trainable_rank": 2.5},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named_with_its_value_and_meaning(wrong):
    name = next(iter(wrong))  # others only set the scene
    group, key = FLAT.get(name, ("", name))
    kind = GROUPS[group] if group else JactusConfig
    with pytest.raises(JactusError) as error:
        JactusConfig().replace(**wrong)
    assert f"{kind.__name__}.{key} = " in str(error.value)
    assert str(error.value).count(" ") > 8  # says what the field means, not only that it is wrong


def test_a_wrong_budget_is_refused_wherever_it_is_given():
    with pytest.raises(JactusError, match=r"Budget\.fraction = 1\.5"):
        jactus.adapt(BERT.model(), BERT.batches(), budget=1.5)
    with pytest.raises(JactusError, match=r"Budget\.fraction = 0"):
        planned("bert").at(0)


def test_a_field_of_a_newer_version_is_named():
    with pytest.raises(JactusError, match=r"'flux'.*newer version: upgrade"):
        JactusConfig.from_dict({**SMALL.to_dict(), "flux": 1})


def without(key):
    return [{k: v for k, v in batch.items() if k != key} for batch in BERT.batches()]


def ignored(batches, at):
    batches[at]["labels"] = torch.full_like(batches[at]["labels"], -100)
    return batches


BATCHES = [
    (lambda: (BERT, [], {}), "no batch came out"),
    (
        lambda: (BERT, without("labels"), {}),
        r"batch 0 with keys \['attention_mask', 'input_ids'\] gives no loss; add labels",
    ),
    (lambda: (BERT, [(1, 2)], {}), "batch 0 is a tuple: pass a list or loader of dicts"),
    (lambda: (LLAMA, ignored(LLAMA.batches(), 1), {}), "batch 1 has no loss term.*-100"),
    (lambda: (BERT, BERT.batches(), {"loss": lambda m, b: None}), "batch 0: the loss is a NoneType"),
    (lambda: (BERT, BERT.batches(), {"loss": lambda m, b: m(**b).loss * float("nan")}), "batch 0: the loss is nan"),
]


@pytest.mark.parametrize("case, message", BATCHES)
def test_a_batch_without_a_usable_loss_is_named_and_the_model_left_alone(case, message):
    family, batches, kwargs = case()
    model = family.model()
    before = state(model)
    with pytest.raises(JactusError, match=message):
        calibrate(model, batches, **kwargs)
    assert_same(before, state(model))


def poison(model, name, at_batch, value, what):
    """Another tool's hook that spoils a module's output, or the gradient there, in one batch."""
    calls = iter(range(100))

    def hook(module, args, output):
        if not torch.is_grad_enabled() or next(calls) != at_batch:  # without gradients a batch is only looked into
            return None
        if what == "gradient":
            output.register_hook(lambda g: g * value)
            return None
        spoilt = output.clone()
        spoilt[0, 0, 0] = value
        return spoilt

    return model.get_submodule(name).register_forward_hook(hook)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("metric", ["identity", "input", "gradient", "fisher"])
@pytest.mark.parametrize(
    "what, at, culprit",
    [
        ("activation", f"{LAYER0}.output.LayerNorm", f"inputs? of {LAYER1}.attention.self.query"),
        ("activation", f"{LAYER1}.intermediate", f"inputs? of {LAYER1}.output.dense"),
        ("gradient", f"{LAYER0}.intermediate.dense", f"gradients.* of {LAYER0}.intermediate.dense"),
        ("gradient", f"{LAYER1}.output.LayerNorm", f"gradients.* of {LAYER1}.output.dense"),
    ],
)
def test_a_value_that_is_not_finite_names_the_layer_where_it_began_and_the_batch(what, at, culprit, metric, value):
    model = BERT.model()
    poison(model, at, 2, value, what)
    before = state(model)
    with pytest.raises(JactusError, match=rf"NaN or Inf in the {culprit} \(Linear.* in batch 2; check"):
        calibrate(model, BERT.batches(4), SMALL.replace(metric=metric, union=("weight", "gradient")))
    assert_same(before, state(model))


@torch.no_grad()
def spoil(model, name):
    model.get_parameter(name).view(-1)[5] = float("nan")


@pytest.mark.parametrize(
    "weight, message",
    [
        (
            f"{LAYER1}.output.dense.weight",
            f"{LAYER1}.output.dense .*16×24.* weights that are not finite.*checkpoint is broken",
        ),
        ("bert.embeddings.LayerNorm.weight", f"inputs of {LAYER0}.attention.self.query .*batch 0"),
        (f"{LAYER0}.attention.output.LayerNorm.bias", f"inputs of {LAYER0}.intermediate.dense .*batch 0"),
    ],
)
def test_weights_that_are_not_finite_are_found_by_name(weight, message):
    model = BERT.model()
    spoil(model, weight)
    before = state(model)
    with pytest.raises(JactusError, match=message):
        calibrate(model, BERT.batches())
    assert_same(before, state(model))


def test_weights_that_broke_after_calibration_are_found_by_plan():
    model = BERT.model()
    spoil(model, f"{LAYER1}.output.dense.weight")
    with pytest.raises(JactusError, match=rf"{LAYER1}.output.dense .*not finite"):
        jactus.plan(model, None, SMALL.replace(metric="identity", union=("weight",)), progress=False)


def test_statistics_of_another_model_are_refused():
    statistics = calibrate(BERT.model(), BERT.batches())
    with pytest.raises(JactusError, match=rf"{LAYER0}.attention.self.query .*other weights.*calibrate this model"):
        jactus.plan(BERT.model(seed=1), statistics, SMALL, progress=False)
    with pytest.raises(JactusError, match=r"model.layers.0.self_attn.q_proj .*not in the statistics"):
        jactus.plan(LLAMA.model(), statistics, SMALL, progress=False)
    with pytest.raises(JactusError, match="do not merge"):
        statistics.merge_([calibrate(BERT.model(seed=1), BERT.batches())])


@pytest.mark.parametrize(
    "made, asked, missing",
    [
        ({"metric": "gradient"}, {"metric": "fisher"}, "no input covariances"),
        ({"metric": "input", "union": ("weight",)}, {"metric": "fisher", "union": ("weight",)}, "no output-gradient"),
        ({"union": ("weight",)}, {"union": ("weight", "gradient")}, "no mean gradients"),
    ],
)
def test_statistics_that_lack_what_the_plan_needs_say_what(made, asked, missing):
    model = BERT.model()
    base = SMALL.replace(union=("weight", "gradient"))
    statistics = calibrate(model, BERT.batches(), base.replace(**made))
    with pytest.raises(JactusError, match=f"{missing}.*calibrate with it"):
        jactus.plan(model, statistics, base.replace(**asked), progress=False)
    with pytest.raises(JactusError, match=r"needs statistics.*calibrate first"):
        jactus.plan(model, None, SMALL, progress=False)


@pytest.mark.parametrize("family, seed", [(BERT, 1), (LLAMA, 0)], ids=["weights", "family"])
def test_a_plan_of_another_model_is_refused_before_anything_changes(family, seed):
    model = family.model(seed)
    before = state(model)
    with pytest.raises(JactusError, match=f"plan is of another model: {LAYER0}.*plan this model"):
        jactus.compress(model, planned("bert"))
    assert_same(before, state(model))


def test_a_plan_that_differs_in_its_last_layer_changes_nothing():
    model = BERT.model()
    with torch.no_grad():
        model.bert.pooler.dense.weight += 1
    before = state(model)
    with pytest.raises(JactusError, match=r"another model: bert\.pooler\.dense"):
        jactus.compress(model, planned("bert"))
    assert_same(before, state(model))


COMPRESSED_ALREADY = {
    "compress": lambda model: jactus.compress(model, planned("bert", EVERY)),
    "calibrate": lambda model: calibrate(model, BERT.batches()),
    "plan": lambda model: jactus.plan(model, None, SMALL),
    "adapt": lambda model: jactus.adapt(model, BERT.batches(), 0.5, progress=False),
}


@pytest.mark.parametrize("step", COMPRESSED_ALREADY)
@pytest.mark.parametrize("folded", [False, True])
def test_a_compressed_model_is_not_compressed_again(step, folded):
    model = compressed(BERT, EVERY)
    model = jactus.fold(model) if folded else model
    before = state(model)
    with pytest.raises(JactusError, match=rf"compressed already .*{LAYER0}.*jactus\.merge\(model\)"):
        COMPRESSED_ALREADY[step](model)
    assert_same(before, state(model))
    calibrate(jactus.merge(model), BERT.batches())  # the advice works


def test_fold_while_training_is_refused():
    model = compressed(BERT, EVERY).train()
    before = state(model)
    with pytest.raises(JactusError, match=r"training mode.*model\.eval\(\)"):
        jactus.fold(model)
    assert_same(before, state(model))
    jactus.fold(model.eval())
    with pytest.raises(JactusError, match="no three-factor layer to fold"):
        jactus.fold(model)


def test_a_dense_model_has_nothing_to_fold_or_merge():
    with pytest.raises(JactusError, match=r"BertFor.* no three-factor layer to fold; compress it first"):
        jactus.fold(BERT.model())
    with pytest.raises(JactusError, match="no low-rank layer to merge; it is dense already"):
        jactus.merge(BERT.model())


def test_a_layer_that_is_never_called_is_named():
    model = BERT.model()
    model.bert.encoder.spare = nn.Linear(4, 4)
    before = state(model)
    with pytest.raises(
        JactusError, match=r"bert\.encoder\.spare .*4×4.*never called in batch 0.*exclude_modules=\('enc"
    ):
        calibrate(model, BERT.batches())
    assert_same(before, state(model))
    calibrate(model, BERT.batches(), SMALL.replace(exclude_modules=("encoder.spare",)))  # the advice works


def test_a_layer_that_no_gradient_reaches_is_named():
    model = AutoModel.from_config(BERT.model().config).eval()
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in BERT.batches()]

    def loss(model, batch):
        return model(**batch).last_hidden_state.square().sum(-1)

    before = state(model)
    with pytest.raises(JactusError, match=r"no gradient reached pooler\.dense .*batch 0.*exclude_modules"):
        calibrate(model, batches, loss=loss)
    assert_same(before, state(model))
    assert calibrate(model, batches, SMALL.replace(exclude_modules=("pooler.dense",)), loss=loss).layers


def test_an_iterator_is_refused_where_two_passes_are_needed():
    model = BERT.model()
    before = state(model)
    with pytest.raises(JactusError, match=r"memory_limit=5000 needs \d+ passes.*iterator.*pass a list"):
        calibrate(model, iter(BERT.batches()), SMALL, memory_limit=5000)
    with pytest.raises(JactusError, match=r"fit_head reads the batches twice.*pass a list"):
        jactus.adapt(model, iter(BERT.batches()), 0.8, SMALL, fit_head=True, progress=False)
    assert_same(before, state(model))
    assert calibrate(model, iter(BERT.batches())).terms == 12  # one pass needs no more


def test_a_memory_limit_below_one_layers_sums_names_the_layer():
    with pytest.raises(
        JactusError, match=rf"memory_limit=10 bytes is too small for {LAYER0}.*whose sums take \d+ bytes"
    ):
        calibrate(BERT.model(), BERT.batches(), SMALL, memory_limit=10)


def test_a_language_model_has_no_head_to_fit():
    with pytest.raises(JactusError, match="LlamaForCausalLM has no task head"):
        jactus.fit_head(LLAMA.model(), LLAMA.batches(), progress=False)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("training", [False, True])
def test_a_good_calibration_leaves_the_model_as_it_was_too(family, training):
    model = family.model().train(training)
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    calibrate(model, family.batches())
    assert_same(before, state(model))


def test_fit_head_touches_the_head_alone_even_on_an_error():
    model = BERT.model().train()
    patched = model.bert.forward
    model.bert.forward = lambda *args, **kwargs: patched(*args, **kwargs)  # as accelerate does
    before = state(model)
    kept = model.bert.forward

    calls = iter(range(100))

    def failing(model, batch):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return model(**batch).loss

    with pytest.raises(KeyboardInterrupt):
        jactus.fit_head(model, BERT.batches(), loss=failing, progress=False)
    assert model.bert.forward is kept
    assert_same(before, state(model))
    jactus.fit_head(model, BERT.batches(), progress=False)
    assert model.bert.forward is kept
    after = state(model)
    for each in (before, after):
        for name in ("classifier.weight", "classifier.bias"):
            each[2].pop(name)
    assert_same(before, after)


def test_another_tools_hooks_survive_every_step():
    model = BERT.model()
    watched = ("bert", f"{LAYER0}.attention", f"{LAYER0}.attention.self.query", "classifier")
    calls = []
    handles = [
        register(lambda module, *args, name=name: calls.append(name))
        for name in watched
        for register in (
            model.get_submodule(name).register_forward_hook,
            model.get_submodule(name).register_forward_pre_hook,
        )
    ]

    def works(times=2):
        calls.clear()
        model(**BERT.batch())
        assert sorted(calls) == sorted(watched * times)

    works()
    jactus.fit_head(model, BERT.batches(), progress=False)
    works()
    jactus.adapt(model, BERT.batches(), 0.7, EVERY, progress=False)
    works()
    jactus.fold(model)
    works()
    jactus.merge(model)
    works()
    for handle in handles:
        handle.remove()  # and their owner can still take them away
    works(times=0)


def test_one_string_and_a_torch_dtype_are_understood():
    config = JactusConfig(trainable_extras="bias", dtype=torch.bfloat16, union=["weight"])
    assert (config.trainable_extras, config.dtype, config.union) == (("bias",), "bfloat16", ("weight",))


def test_an_extra_that_no_module_has_is_refused():
    with pytest.raises(JactusError, match="haed"):
        jactus.mark_trainable(BERT.model(), ("haed",))


def test_calibration_under_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(JactusError, match="inference_mode"):
        jactus.calibrate(BERT.model(), BERT.batches(), SMALL, progress=False)


def test_arguments_of_another_kind_are_named():
    model = BERT.model()
    with pytest.raises(JactusError, match=r"plan\.at\(0\.6\)"):
        jactus.compress(model, 0.6)
    with pytest.raises(JactusError, match=r"got \(Statistics, BertForSequenceClassification"):
        jactus.plan(jactus.Statistics(), model)
    with pytest.raises(JactusError, match="config="):
        jactus.adapt(model, BERT.batches(), SMALL)
    with pytest.raises(JactusError, match=r"\[batch\]"):
        jactus.calibrate(model, BERT.batch(), SMALL, progress=False)


def test_every_setting_is_explained_where_help_looks():
    assert all(f.metadata["help"] in JactusConfig.__doc__ for f in dataclasses.fields(JactusConfig))
