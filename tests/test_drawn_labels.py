"""Labels that a language model draws itself: when, which, and that Σ_g of them is the Fisher matrix."""

import types

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import jactus
from jactus import JactusConfig, JactusError, Statistics
from tests.models import BERT, GPT2, LLAMA, T5

DRAWN = JactusConfig().replace(rank_multiple=2)
GIVEN = DRAWN.replace(draws=0)


def calibrated(model, batches, config=DRAWN, **kwargs):
    kwargs = {"statistics_dtype": "float64", "progress": False} | kwargs
    return jactus.calibrate(model, batches, config, **kwargs)


def same(a: Statistics, b: Statistics, rtol=0.0):
    assert (a.terms, a.tokens) == (b.terms, b.tokens)
    return all(torch.allclose(x, y, rtol=rtol, atol=rtol * float(y.abs().max())) for x, y in zip(a._sums(), b._sums()))


def same_side(a, b):
    return a is b if b is None else torch.equal(a, b)


@pytest.fixture
def draws(monkeypatch):
    """What was drawn, in order."""
    kept, real = [], torch.multinomial

    def multinomial(p, n, **kwargs):
        kept.append(real(p, n, **kwargs))
        return kept[-1]

    monkeypatch.setattr(torch, "multinomial", multinomial)
    return kept


@pytest.mark.parametrize("family", [LLAMA, GPT2, T5], ids=lambda f: f.name)
def test_sums_are_those_of_the_labels_drawn(family, draws):
    """Put in the place of the data's, the labels that were drawn give the same sums; padding has none."""
    model, batches = family.model(dtype=torch.float64), family.batches(3)
    if family is T5:  # reads its labels, so what it reads must stay as it is
        for b in batches:
            b["decoder_input_ids"] = model._shift_right(b["labels"])
    found = calibrated(model, batches)
    assert found.drawn
    drawn = torch.cat(draws)[:, 0]
    for batch in batches:
        places = batch["labels"] != -100
        if family is not T5:
            places[:, 0] = False
        batch["labels"] = batch["labels"].masked_scatter(places, drawn)
        drawn = drawn[int(places.sum()) :]
    assert not len(drawn)
    given = calibrated(model, batches, GIVEN)
    assert not given.drawn
    assert same(found, given, 1e-12 if family is T5 else 1e-5)  # causal models compute their losses in float32


def test_many_draws_have_the_fisher_matrix():
    """Against Σ_y p(y) g_y g_yᵀ of one prediction, each y's gradient by a backward of its own."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=7, tie_word_embeddings=False, **shape)).double().eval()
    model.lm_head.weight.data *= 40  # so that some tokens are likelier than others
    batch = {"input_ids": torch.tensor([[3, 5]]), "labels": torch.tensor([[3, 5]])}
    exact = fourth = 0
    target = model.model.layers[0].mlp.gate_proj
    kept = []
    hook = target.register_forward_hook(lambda m, args, y: kept.append(y) or y.retain_grad())
    logits = model(batch["input_ids"]).logits
    hook.remove()
    logp = logits[0, 0].log_softmax(-1)
    for y in range(7):
        (g,) = torch.autograd.grad(-logp[y], kept[0], retain_graph=True)
        seen = target.weight.detach().T @ g[0, 0]  # m = 12 > n = 8, so G is summed as the weight sees it
        exact = exact + logp[y].exp().detach() * seen[:, None] * seen
        fourth = fourth + logp[y].exp().detach() * seen.dot(seen) ** 2
    count = 4000
    only = DRAWN.replace(target_modules=("gate_proj",), metric="gradient", union=("weight",))
    sums = calibrated(model, [batch], only.replace(draws=count), verify=False)
    assert sums.terms == count
    name = next(iter(sums.layers))
    spread = float((fourth - exact.square().sum()) / count) ** 0.5  # of a mean of `count` draws, its standard deviation
    assert float((sums.seen_output(name) - exact).norm()) < 4 * spread
    data = calibrated(model, [batch], only.replace(draws=0), verify=False).seen_output(name)
    assert float((data - exact).norm()) > 8 * spread


def test_the_same_rows_draw_the_same_but_in_other_draws(tmp_path):
    model, batches = LLAMA.model(), LLAMA.batches(3)
    whole = calibrated(model, batches)
    assert same(calibrated(model, batches), whole)
    parts = calibrated(model, batches, memory_limit=whole.nbytes // 2)
    for name in whole.layers:
        assert same_side(parts.output_covariance(name), whole.output_covariance(name))
        assert same_side(parts.seen_output(name), whole.seen_output(name))
    doubled = calibrated(model, batches).merge_([whole])
    assert same(calibrated(model, batches * 2), doubled, 1e-6)
    twice = calibrated(model, batches, DRAWN.replace(draws=2))
    assert (twice.terms, twice.tokens) == (doubled.terms, whole.tokens)  # inputs are the same, and summed once
    for name in whole.layers:
        a, b = twice.output_covariance(name), whole.output_covariance(name)
        assert a is None or not torch.allclose(a, b, rtol=1e-3, atol=0)
        assert same_side(twice.seen_input(name), whole.seen_input(name))
    whole.save(tmp_path / "sums")
    assert Statistics.load(tmp_path / "sums").drawn


@pytest.mark.parametrize("family", [LLAMA, GPT2, T5], ids=lambda f: f.name)
def test_an_example_draws_the_same_alone_and_among_others(family, draws):
    model, batch = family.model(dtype=torch.float64), family.batch(rows=8, length=7)
    calibrated(model, [batch])
    together = torch.cat(draws).tolist()
    draws.clear()
    calibrated(model, [{key: t[i : i + 1] for key, t in batch.items()} for i in range(8)])
    assert torch.cat(draws).tolist() == together
    draws.clear()
    longer = {key: torch.nn.functional.pad(t, (0, 3), value=-100 if key == "labels" else 0) for key, t in batch.items()}
    calibrated(model, [longer])
    assert torch.cat(draws).tolist() == together


def test_examples_with_the_same_labels_draw_apart(draws):
    """Answers are few and alike: were a draw of the labels alone, all would have the same."""
    model = LLAMA.model()
    model.lm_head.weight.data.zero_()  # every token as likely as another
    batch = LLAMA.batch(rows=40, length=8)
    batch = {"input_ids": batch["input_ids"], "labels": torch.full((40, 8), -100)}
    batch["labels"][:, -1] = 7
    calibrated(model, [batch])
    assert len(set(torch.cat(draws)[:, 0].tolist())) > 20


def test_a_run_that_goes_on_draws_as_it_did(tmp_path):
    model, batches = LLAMA.model(), LLAMA.batches(4)
    whole = calibrated(model, batches)

    def dies():
        yield from batches[:2]
        raise KeyboardInterrupt

    file = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, dies(), resume=file, resume_every=0)
    with pytest.raises(JactusError, match="another configuration"):
        calibrated(model, batches, GIVEN, resume=file)
    assert same(calibrated(model, batches, resume=file), whole)


class Detached(torch.nn.Module):
    """Returns logits to look at, without their graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        found = self.model(**batch)
        return {"loss": found.loss, "logits": found.logits.detach()}


def smoothed(self, logits, labels, vocab_size, **kwargs):
    flat = logits[:, :-1].reshape(-1, vocab_size)
    return torch.nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), label_smoothing=0.1)


def test_what_is_no_cross_entropy_of_tokens_has_the_labels_given():
    bert, llama = BERT.model(), LLAMA.model()
    assert not calibrated(bert, BERT.batches()).drawn  # one label an example
    assert same(calibrated(bert, BERT.batches()), calibrated(bert, BERT.batches(), GIVEN))
    own = calibrated(llama, LLAMA.batches(), loss=lambda model, batch: (model(**batch).loss * 24, 24))
    assert not own.drawn
    united = DRAWN.replace(union_share=0.5)  # the mean gradient of labels drawn is none
    assert not calibrated(llama, LLAMA.batches(), united).drawn
    detached = calibrated(Detached(llama), LLAMA.batches())
    assert not detached.drawn
    llama.loss_function = types.MethodType(smoothed, llama)
    batches = [{"input_ids": b["input_ids"], "labels": b["input_ids"].clone()} for b in LLAMA.batches()]
    assert not calibrated(llama, batches).drawn
    assert same(calibrated(llama, batches), calibrated(llama, batches, GIVEN))


def test_a_loss_that_becomes_another_is_refused():
    model, batches = LLAMA.model(), LLAMA.batches(3)
    real, factor = model.loss_function, 1.0
    model.loss_function = lambda *args, **kwargs: real(*args, **kwargs) * factor

    def changing():
        nonlocal factor
        yield from batches[:2]
        factor = 1.5
        yield batches[2]

    with pytest.raises(JactusError, match=r"batch 2: labels were drawn.*cross-entropy"):
        calibrated(model, changing())


def test_sums_of_labels_drawn_and_given_do_not_merge():
    model, batches = LLAMA.model(), LLAMA.batches(2)
    with pytest.raises(JactusError, match="labels drawn"):
        calibrated(model, batches).merge_([calibrated(model, batches, GIVEN)])
    with pytest.raises(JactusError, match=r"draws = -1"):
        DRAWN.replace(draws=-1)
