"""What is to be learned is told from the columns, with the reason, or it is refused with what to say instead."""

import pytest

from jactus import JactusError
from jactus.app.guess import guess

SOME = ["a good film to see", "a bad one it was", "quite a fine plot", "so very dull a cast"] * 5
TEXTS = [f"{text} {i}" for i, text in enumerate(SOME)]
CLASSES = ["good", "bad"] * 10
WHOLE = list(range(20))

TABLES = [
    ({"text": TEXTS, "label": CLASSES}, ("classification", ("text",), "label")),
    ({"Review": TEXTS, "Sentiment": CLASSES}, ("classification", ("Review",), "Sentiment")),
    ({"id": WHOLE, "review": TEXTS, "rating": [1, 5] * 10}, ("classification", ("review",), "rating")),
    ({"what": TEXTS, "mood": CLASSES}, ("classification", ("what",), "mood")),
    (
        {"premise": TEXTS, "hypothesis": TEXTS[::-1], "label": [0, 1] * 10},
        ("pairs", ("premise", "hypothesis"), "label"),
    ),
    ({"idx": WHOLE, "one": TEXTS, "two": TEXTS[::-1], "same": [0, 1] * 10}, ("pairs", ("one", "two"), "same")),
    ({"question": TEXTS, "sentence": TEXTS, "label": CLASSES}, ("pairs", ("question", "sentence"), "label")),
    ({"text": TEXTS}, ("language", ("text",), None)),
    ({"anything": TEXTS}, ("language", ("anything",), None)),
    ({"prompt": TEXTS, "completion": TEXTS}, ("instructions", ("prompt",), "completion")),
    ({"question": TEXTS, "answer": CLASSES}, ("instructions", ("question",), "answer")),
    (
        {"instruction": TEXTS, "input": [None] * 20, "output": TEXTS, "answer": CLASSES},
        ("instructions", ("instruction", "input"), "output"),
    ),
]


@pytest.mark.parametrize("columns, wanted", TABLES, ids=lambda x: x[0] if isinstance(x, tuple) else "-".join(x))
def test_the_task_of_a_table(columns, wanted):
    found = guess(columns)
    assert (found.task, found.text, found.label) == wanted
    assert all(name in found.why for name in (*found.text[:1], *((found.label,) if found.label else ())))


@pytest.mark.parametrize("columns, wanted", TABLES, ids=lambda x: x[0] if isinstance(x, tuple) else "-".join(x))
def test_columns_may_come_in_any_order_and_by_any_other_name(columns, wanted):
    assert guess(dict(reversed(columns.items()))).task == wanted[0]
    task, text, label = wanted
    renamed = {f"x{list(columns).index(name)}": values for name, values in columns.items()}
    called = {name: f"x{list(columns).index(name)}" for name in columns}
    found = guess(renamed, task, [called[name] for name in text], called.get(label))
    assert (found.task, found.text, found.label) == (task, tuple(called[n] for n in text), called.get(label))


def test_what_is_said_goes_before_what_is_guessed():
    columns = {"text": TEXTS, "label": CLASSES, "other": TEXTS}
    assert guess(columns, "language", ["text"]).task == "language"
    assert guess(columns, None, ["other"], "label").text == ("other",)
    assert guess(columns, "pairs", ["text", "other"], "label").task == "pairs"
    assert guess(columns, "instructions", ["text"], "label").task == "instructions"


@pytest.mark.parametrize(
    "columns, options, said",
    [
        ({"text": TEXTS, "score": [0.1 * i for i in range(20)]}, {"label": "score"}, "regression is not offered"),
        ({"text": TEXTS, "label": [i / 7 for i in range(20)]}, {}, "'label' is a number to predict"),
        ({"text": TEXTS * 3, "label": list(range(60))}, {}, "60 different values"),
        ({"a": TEXTS, "b": TEXTS, "c": TEXTS}, {}, "3 columns look like text"),
        ({"text": TEXTS, "mood": CLASSES, "genre": CLASSES}, {}, "2 like labels"),
        ({"text": TEXTS, "price": [0.5 * i for i in range(20)]}, {}, "none of the others like a label"),
        ({"n": WHOLE}, {}, "0 columns look like text"),
        ({"text": TEXTS, "label": CLASSES}, {"text": ["texts"]}, "no column 'texts'; the columns are text, label"),
        ({"text": TEXTS, "label": CLASSES}, {"task": "pairs"}, "--task pairs does not go with"),
        ({"text": TEXTS, "label": CLASSES}, {"task": "images"}, "needs a folder of images"),
        ({"text": TEXTS, "label": CLASSES}, {"text": ["text"]}, "'label' may be its label"),
    ],
)
def test_what_cannot_be_told_is_refused_with_what_to_say(columns, options, said):
    with pytest.raises(JactusError, match=said):
        guess(columns, **options)
