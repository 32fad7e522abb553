"""Commonsense questions: what is trained on, how candidates are scored, and what large models are asked."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import questions
from bench.accuracy.tasks import Case, Task, calibration_batches
from bench.questions import Asked, Question
from bench.training import batches
from examples import llama_commonsense

BLANK = {
    "sentence": "The cup fell off the shelf as the _ was unstable.",
    "option1": "cup",
    "option2": "shelf",
    "answer": "2",
}
CHOICE = {"query": "Question: What is hot?\nAnswer:", "choices": ["ice", "the sun", "snow"], "gold": 1}


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def asked(count: int = 12) -> Asked:
    """Random questions of two sets; contexts with a common beginning, equal, or of different lengths."""
    g = torch.Generator().manual_seed(0)

    def some(most):
        return torch.randint(1, 50, (int(torch.randint(1, most, (), generator=g)),), generator=g).tolist()

    found, rows = [], []
    for i in range(count):
        shared, choices = some(9), 2 + i % 3
        tails = [some(4) if i % 2 else [] for _ in range(choices)]
        rows.append([(shared + tail, some(6)) for tail in tails])
        found.append(Question("ab"[i % 2], "", ("",) * choices, i % choices, ("",) * choices, ("",) * choices))
    return Asked(found, rows, 0)


@torch.no_grad()
def one_by_one(net, rows):
    """The candidate with the highest mean log-probability of a token, each scored in a forward of its own."""
    chosen = []
    for row in rows:
        scores = []
        for context, answer in row:
            logs = net(input_ids=torch.tensor([context + answer])).logits[0].log_softmax(-1)
            scores.append(logs[torch.arange(len(context) - 1, len(context) + len(answer) - 1), answer].mean())
        chosen.append(int(torch.stack(scores).argmax()))
    return chosen


def test_candidates_in_one_row_score_as_each_alone():
    """Branches see what they have in common and themselves: neither each other nor padding."""
    net, some = model(), asked()
    expected = [chosen == q.right for chosen, q in zip(one_by_one(net, some.rows), some.questions)]
    assert {True, False} == set(expected)
    for tokens in (1, 60, 2048):  # one question a batch, several, all
        assert questions.right(net, some, tokens).tolist() == expected


def test_a_score_is_the_mean_over_sets():
    found = torch.tensor([True, True, False, True])
    some = asked(4)
    assert questions.by_set(some, found) == {"a": 0.5, "b": 1.0}
    task = Task("commonsense", "accuracy", None)
    net, all_of_them = model(), asked()
    assert task.score(net, all_of_them) == sum(task.scores(net, all_of_them).values()) / 2


def test_the_right_answers_tokens_alone_are_trained_on():
    some = asked()
    for batch, chosen in zip(whole := batches(some, 5, seed=1), whole.order):
        for row, i in enumerate(chosen):
            context, answer = some.rows[i][some.questions[i].right]
            end = len(context) + len(answer)
            assert batch["input_ids"][row, :end].tolist() == context + answer
            assert batch["labels"][row, len(context) : end].tolist() == answer
            assert int((batch["labels"][row] != -100).sum()) == len(answer)
            assert int(batch["attention_mask"][row].sum()) == end


def test_calibration_sees_the_same_tokens_with_a_loss_on_all_of_them():
    few = asked()
    case = Case(model(), few[:5], few, few)
    (trained,) = batches(few.take(range(5)), 5, seed=0)
    (seen,) = calibration_batches(Task("t", "accuracy", lambda: case, batch_size=5), case, 5, 0)
    rows = {tuple(ids[mask == 1].tolist()) for ids, mask in zip(trained["input_ids"], trained["attention_mask"])}
    assert rows == {tuple(ids[mask == 1].tolist()) for ids, mask in zip(seen["input_ids"], seen["attention_mask"])}
    assert torch.equal(seen["labels"], seen["input_ids"].masked_fill(seen["attention_mask"] == 0, -100))


def test_questions_as_completions():
    q = questions._question("winogrande", BLANK)
    assert q.contexts == ("The cup fell off the shelf as the cup", "The cup fell off the shelf as the shelf")
    assert (q.candidates, q.right) == ((" was unstable.",) * 2, 1)
    q = questions._question("arc-easy", CHOICE)
    assert q.contexts == ("Question: What is hot?\nAnswer:",) * 3
    assert (q.candidates, q.right) == ((" ice", " the sun", " snow"), 1)


def test_the_example_reads_what_is_written_for_large_models():
    q = {"query": "Ice -- Ice is cold.\nQuestion: is ice hot?\nAnswer:", "choices": ["yes", "no"], "gold": 1}
    for name, doc, said in (
        ("winogrande", BLANK, "the _ was unstable.\n\nOption1: cup Option2: shelf"),
        ("arc-easy", CHOICE, "What is hot?\n\nAnswer1: ice Answer2: the sun Answer3: snow"),
        ("boolq", q, "question: is ice hot?"),
    ):
        question = questions._question(name, doc)
        row = questions.instruction(question)
        offered = llama_commonsense.candidates(row)
        assert said in row["instruction"]
        assert len(offered) == len(question.choices)
        assert row["answer"] == offered[question.right]
        assert row["output"].endswith(row["answer"])
