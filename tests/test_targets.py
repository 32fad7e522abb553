"""Which layers are chosen: patterns as PEFT users know them; what cannot be compressed is refused by name."""

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig
from transformers.pytorch_utils import Conv1D

import jactus
from jactus import JactusError
from jactus.model.lowrank import compressed_layers
from jactus.model.targets import find_targets
from tests.models import BERT, FAMILIES, GPT2, LLAMA, SMALL, Family

_moe = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MIXTRAL = Family(
    "mixtral", AutoModelForCausalLM, MixtralConfig(**_moe, num_local_experts=2, num_experts_per_tok=1), "causal"
)
QWEN_MOE = Family(
    "qwen2_moe",
    AutoModelForCausalLM,
    Qwen2MoeConfig(
        **_moe, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
    "causal",
)


def names(model, **config):
    return list(find_targets(model, SMALL.replace(**config)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_all_linear_is_every_linear_of_the_base_model_and_no_head_or_embedding(family):
    model = family.model()
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    found = find_targets(model, SMALL)
    assert set(found) == linear - {"classifier", "lm_head"}
    for name, target in found.items():
        # W is (outputs, inputs) for both kinds: y = W x
        x = torch.randn(3, target.n)
        layer = model.get_submodule(name)
        bias = 0 if layer.bias is None else layer.bias
        assert target.weight.shape == (target.m, target.n)
        assert torch.allclose(layer(x), x @ target.weight.T + bias, atol=1e-6)


@pytest.mark.parametrize(
    "pattern, count",
    [
        (["query", "value"], 4),
        (("attention.output.dense",), 2),
        (["bert.pooler.dense"], 1),
        (r".*\.layer\.1\..*(query|key)", 2),
        (r"bert\.encoder\.layer\.\d+\.output\.dense", 2),
        ("all-linear", 13),
        (["classifier"], 1),
    ],
    ids=str,
)
def test_targets_match_by_ending_or_by_a_whole_regular_expression(pattern, count):
    assert len(names(BERT.model(), target_modules=pattern)) == count


@pytest.mark.parametrize("target_modules", ["all-linear", ["query", "value"]], ids=str)
@pytest.mark.parametrize("exclude", [("query",), ["query"], r".*\.query"], ids=str)
def test_exclusion_takes_away_from_any_choice(target_modules, exclude):
    model = BERT.model()
    every = names(model, target_modules=target_modules)
    left = names(model, target_modules=target_modules, exclude_modules=exclude)
    assert left == [name for name in every if not name.endswith(".query")]
    assert len(left) == len(every) - 2


@pytest.mark.parametrize(
    "config",
    [
        {
            "target_modules": r"bert\.embeddings|classifier.nothing|bert\.pooler",
            "exclude_modules": ["pooler", "embeddings"],
        },
        {"exclude_modules": r".*"},
        {"target_modules": []},
    ],
    ids=str,
)
def test_no_match_says_what_was_asked_and_what_there_is(config):
    with pytest.raises(JactusError, match=r"no module of BertFor\S+ matches .*attention\.self\.query.*14 in all"):
        names(BERT.model(), **config)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"target_modules": ["q_proj"]},
            r"target_modules=\('q_proj',\): 'q_proj' matches no module of Bert.*ending after a dot",
        ),
        ({"target_modules": ["query", "kye"]}, r"'kye' matches no module .*do you mean key\?"),
        (
            {"target_modules": "query"},
            r"'query' matches no module .*regular expression for the whole name.*\['query'\]",
        ),
        ({"exclude_modules": "query"}, r"exclude_modules='query': 'query' matches no module .*do you mean query\?"),
        (
            {"exclude_modules": ["qurey"]},
            r"exclude_modules=\('qurey',\): 'qurey' matches no module .*do you mean query",
        ),
    ],
    ids=str,
)
def test_a_pattern_that_would_change_nothing_is_named(config, message):
    with pytest.raises(JactusError, match=message):
        names(BERT.model(), **config)


def test_a_pattern_that_is_no_regular_expression_is_named():
    with pytest.raises(JactusError, match=r"'\*query' is not a regular expression"):
        names(BERT.model(), target_modules="*query")


def test_a_target_that_is_not_linear_is_refused():
    with pytest.raises(JactusError, match=r"word_embeddings is a .*Embedding .*not a plain Linear"):
        names(BERT.model(), target_modules=["word_embeddings"])
    with pytest.raises(JactusError, match=r"LayerNorm is a .*LayerNorm"):
        names(BERT.model(), target_modules=["attention.output.LayerNorm"])


class Int8Linear(nn.Linear):
    """As quantisation libraries make them: a Linear by type, whole numbers by content."""

    def __init__(self, old):
        super().__init__(old.in_features, old.out_features)
        self.weight = nn.Parameter(torch.zeros(old.weight.shape, dtype=torch.int8), requires_grad=False)


class OwnForward(nn.Linear):
    """Computes something else than W x + b."""

    def forward(self, input):
        return 2 * super().forward(input)


def quantised_layer(model):
    model.bert.pooler.dense = Int8Linear(model.bert.pooler.dense)


def own_forward(model):
    model.bert.pooler.dense = OwnForward(16, 16)


def dynamically_quantised(model):
    torch.ao.quantization.quantize_dynamic(model.bert.pooler, {nn.Linear}, inplace=True)


def parametrised(model):
    parametrizations.weight_norm(model.bert.pooler.dense)


def with_adapter(model):
    model.bert.pooler = peft.get_peft_model(model.bert.pooler, peft.LoraConfig(target_modules=["dense"], r=2))


UNSUITABLE = [
    (quantised_layer, r"pooler\.dense is a .*Int8Linear with weight dtype torch\.int8.*load the model unquantised"),
    (own_forward, r"pooler\.dense is a .*OwnForward.*not a plain Linear"),
    (dynamically_quantised, r"pooler\.dense is a torch.*quantized\S*\.Linear.*load the model unquantised"),
    (parametrised, r"pooler\.dense is parametrised; call .*remove_parametrizations"),
    (with_adapter, r"pooler\S*\.dense is wrapped by an adapter.*merge_and_unload"),
]


@pytest.mark.parametrize("spoil, message", UNSUITABLE)
@pytest.mark.parametrize("target_modules", ["all-linear", ["dense"], r".*pooler.*\.dense"], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_cannot_be_factored_is_refused_by_name(spoil, message, target_modules):
    model = BERT.model()
    spoil(model)
    with pytest.raises(JactusError, match=message):
        names(model, target_modules=target_modules)
    assert len(names(model, exclude_modules=r".*pooler.*")) == 12  # and the rest can be done without it


def test_a_peft_model_is_refused_until_it_is_merged():
    model = peft.get_peft_model(BERT.model(), peft.LoraConfig(target_modules=["query", "value"], r=2))
    with pytest.raises(
        JactusError, match=r"layer\.0\.attention\.self\.query is wrapped by an adapter.*merge_and_unload"
    ):
        names(model)
    assert names(model.merge_and_unload()) == names(BERT.model())


@pytest.mark.parametrize("family", [LLAMA, GPT2], ids=lambda f: f.name)
def test_tied_weights_are_passed_over_and_refused_when_asked_for(family):
    model = family.model()
    assert "lm_head" not in names(model)
    with pytest.raises(JactusError, match=r"lm_head shares its weight with another module.*untie"):
        names(model, target_modules=["lm_head"])


def test_linear_layers_that_share_a_weight_are_passed_over():
    model = BERT.model()
    first, second = (layer.output.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight
    assert len(names(model)) == 11
    with pytest.raises(JactusError, match=r"layer\.0\.output\.dense shares its weight"):
        names(model, target_modules=r".*\d\.output\.dense")


@pytest.mark.parametrize("family", [MIXTRAL, QWEN_MOE], ids=lambda f: f.name)
def test_fused_experts_are_refused_by_name_and_the_rest_can_be_compressed(family):
    model = family.model()
    with pytest.raises(JactusError, match=r"model\.layers\.0\.mlp\.experts .*fused expert weights.*exclude_modules"):
        names(model)
    with pytest.raises(JactusError, match=r"mlp\.experts .*three-dimensional weight.*exclude_modules"):
        names(model, target_modules=["experts"])
    config = SMALL.replace(exclude_modules=("experts", "shared_expert_gate")[: 1 + (family is QWEN_MOE)], budget=0.7)
    before = {k: v.clone() for k, v in model.state_dict().items() if "experts" in k}
    jactus.adapt(model, family.batches(), config=config, progress=False)
    assert {name.rsplit(".", 1)[-1] for name in compressed_layers(model)} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model(**family.batch()).loss.backward()


def test_a_weight_with_nothing_to_factor_is_passed_over_or_refused():
    model = BERT.model()
    model.bert.encoder.gate = nn.Linear(16, 1)
    assert "bert.encoder.gate" not in names(model)
    with pytest.raises(JactusError, match=r"encoder\.gate has weight \(1, 16\): nothing to factor"):
        names(model, target_modules=["gate"])


def test_any_torch_module_has_targets():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    assert names(model) == ["0", "2"]
    with pytest.raises(JactusError, match="no module of Linear matches"):
        names(nn.Linear(8, 8))


def test_a_layer_under_two_names_is_refused():
    model = torch.nn.Module()
    model.a = torch.nn.Linear(4, 4)
    model.b = model.a
    with pytest.raises(JactusError, match="a is also reachable as b"):
        find_targets(model, SMALL)


def test_a_wrapped_model_is_refused_and_the_one_inside_named():
    model = BERT.model()
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model)):
        with pytest.raises(JactusError, match="BertForSequenceClassification inside it"):
            find_targets(wrapped, SMALL)


def test_the_head_of_a_model_that_is_its_own_base_is_no_target():
    model = torch.nn.Module()
    model.layer, model.classifier = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
    assert list(find_targets(model, SMALL)) == ["layer"]
