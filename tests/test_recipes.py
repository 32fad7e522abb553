"""The recipes for the paper's two settings, run as a user would on tiny models: they learn, reload, and refuse early."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import jactus
from jactus import JactusError


def script(name):
    """An example as a module: what `python examples/name.py` would run, with its functions in reach."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vit, llama = script("vit_classification"), script("llama_commonsense")


def options(**values):
    """Keyword arguments as a command line; True is a flag, None leaves the option out."""
    line = []
    for key, value in values.items():
        if value is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            line += [f"--{key.replace('_', '-')}", *map(str, values)]
    return line


def draw(path, rng, kind):
    """A 16×16 picture of noise with a little more of one colour."""
    picture = rng.integers(0, 190, (16, 16, 3))
    picture[..., kind] += 60
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A pretrained ViT (random) with its processor, and two data sets as folders."""
    root, rng = tmp_path_factory.mktemp("vit"), np.random.default_rng(0)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96, image_size=16, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(root / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "model")
    for name in ("colours", "again"):
        for split, count in (("train", 60), ("test", 30)):
            for i in range(count):
                draw(root / name / split / ("red", "green", "blue")[i % 3] / f"{i}.png", rng, i % 3)
    return root


def vit_options(root, **changed):
    values = {
        "model": root / "model",
        "data": [root / "colours", root / "again"],
        "output": root / "out",
        "epochs": 5,
        "batch_size": 8,
        "calibration_rows": 32,
        "workers": 0,
        "head_rows": 1,  # one class only: the dense model is at chance, and all that is learnt is learnt in training
        "learning_rate": 1e-2,
    }
    return options(**{**values, **changed})


@pytest.fixture(scope="module")
def vit_results(images):
    """Every option of cost at once on two data sets."""
    return vit.main(vit_options(images, bf16=True, gradient_checkpointing=True, memory_limit=2e5, max_test=28))


def test_vit_learns_each_data_set_and_writes_what_it_found(images, vit_results):
    written = json.loads((images / "out/results.json").read_text())
    assert written["datasets"] == vit_results["datasets"]
    assert written["settings"]["seed"] == 0
    assert written["config"]["budget"]["fraction"] == 0.8
    assert written["versions"]["torch"] == torch.__version__
    assert list(written["datasets"]) == ["colours", "again"]
    for found in written["datasets"].values():
        # a third is chance; 28 guesses do not come near 0.9
        assert found["accuracy"]["folded"] >= 0.9 > found["accuracy"]["dense"]
        assert np.mean(found["loss"][-3:]) < np.mean(found["loss"][:3])
        assert found["rows"] == {"train": 60, "test": 28, "classes": 3}
        size = found["size"]
        assert size["folded"]["stored"] == size["compressed"]["folded"] < size["dense"]["stored"]
    each = [found["accuracy"]["folded"] for found in written["datasets"].values()]
    assert written["average"]["folded"] == pytest.approx(np.mean(each))


def test_vit_reloads_with_the_same_predictions(images, vit_results):
    args = vit.parse(vit_options(images, data=[images / "again"], max_test=28))
    folder = images / "out/again"
    model = AutoModelForImageClassification.from_pretrained(folder / "folded")
    processor = vit.AutoImageProcessor.from_pretrained(folder / "folded")
    _, test, _ = vit.load(args.data[0], args, processor)
    assert vit.predict(model, test, args) == json.loads((folder / "predictions.json").read_text())
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    trained = AutoModelForImageClassification.from_pretrained(folder / "trained")
    assert jactus.size(trained).folded == jactus.size(model).stored


def test_vit_takes_the_rate_that_the_model_asks_for_unless_told(images, vit_results, tmp_path):
    data = [images / "again"]
    found = vit.main(vit_options(images, data=data, output=tmp_path, epochs=0, max_test=3, learning_rate=None))
    trained = AutoModelForImageClassification.from_pretrained(tmp_path / "again/trained")
    rates = [result["datasets"]["again"]["learning_rate"] for result in (found, vit_results)]
    assert rates == [jactus.learning_rate(trained), 1e-2]


def test_vit_may_keep_everything_and_then_trains_cores_of_full_rank(images, tmp_path):
    data = [images / "again"]
    found = vit.main(vit_options(images, data=data, output=tmp_path, budget=1, max_test=3))["datasets"]["again"]
    sizes = found["size"]
    assert sizes["folded"]["stored"] == sizes["compressed"]["folded"] == sizes["dense"]["stored"]
    # a core of full rank has as many numbers as the shorter side squared: 64², six times, and the head trains beside them
    assert sizes["compressed"]["trainable"] == 6 * 64**2 + 3 * 65
    assert np.mean(found["loss"][-3:]) < np.mean(found["loss"][:3])


def test_vit_rows_are_drawn_from_all_classes_by_the_seed(images):
    def drawn(seed):
        train, _, _ = vit.load(str(images / "colours"), vit.parse(vit_options(images, max_train=12, seed=seed)), None)
        return train.rows

    assert len(drawn(0)) == 12
    assert {label for _, label in drawn(0)} == {0, 1, 2}  # in the folder's order the first 20 are all blue
    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize("share", [0, 0.1])
def test_vit_says_what_calibration_will_hold(share, images, capsys):
    args = vit.parse(vit_options(images, output=images / "new", union_share=share))
    vit.prepare(args, vit.check(args))
    # a block: q, k, v, o and the two layers of the MLP with two squares of the shorter side each, or q, k, v and o with 3·64² and
    # the others with 64² + 96² + 64·96; float32
    total = 4 * (4 * 3 * 64**2 + 2 * (64**2 + 96**2 + 64 * 96)) if share else 4 * 6 * 2 * 64**2
    assert f"at most {total / 1e9:.4g} GB of sums at a time, {total / 1e9:.4g} GB in 1 pass" in capsys.readouterr().out


def test_vit_refuses_what_the_memory_can_never_hold(images, monkeypatch, no_weights):
    monkeypatch.setattr(vit.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 1e5}))
    if not torch.cuda.is_available():
        with pytest.raises(JactusError, match=r"calibration needs .* GB on cpu, which has 0\.0001 GB"):
            vit.main(vit_options(images, output=images / "new"))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"budget": 1.5}, "fraction = 1.5"),
        ({"max_train": 0}, "--max-train is 0"),
        ({"learning_rate": "nan"}, "--learning-rate is nan"),
        ({"epochs": -1}, "--epochs is -1"),
        ({"memory_limit": 10}, "memory_limit=10 bytes is too small"),
        ({"statistics_device": "cuda:0"}, "--statistics-device is cuda:0"),
        ({"statistics_device": "gpu"}, "statistics_device='gpu'"),
        ({"union": ["gradient"]}, "union = "),
        ({"model": "nowhere/at-all"}, "--model nowhere/at-all is neither"),
        ({"data": ["nowhere"]}, "--data nowhere"),
        ({"data": ["a/pets", "b/pets"]}, "two data sets of one name"),
        ({"test_split": "exam"}, "exam holds no image"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_vit_refuses_before_it_loads(changed, message, images, tmp_path, no_weights):
    if torch.cuda.is_available() and "cuda" in str(changed):
        pytest.skip("there is a GPU")
    with pytest.raises(JactusError, match=message.replace("(", r"\(")):
        vit.main(vit_options(images, **{"output": tmp_path, **changed}))


def test_vit_refuses_a_folder_with_results(images, vit_results, no_weights):
    with pytest.raises(JactusError, match=r"results\.json exists"):
        vit.main(vit_options(images))


def test_vit_names_what_is_wrong_with_a_data_set(images, tmp_path, no_weights):
    rng = np.random.default_rng(0)
    draw(tmp_path / "odd/train/red/0.png", rng, 0)
    draw(tmp_path / "odd/test/red/0.png", rng, 0)
    args = vit.parse(vit_options(images))
    with pytest.raises(JactusError, match="at least two"):
        vit.load(str(tmp_path / "odd"), args, None)
    draw(tmp_path / "odd/test/green/0.png", rng, 1)
    with pytest.raises(JactusError, match="green"):
        vit.load(str(tmp_path / "odd"), args, None)
    (tmp_path / "odd/train/green").mkdir()
    (tmp_path / "odd/train/green/torn.png").write_bytes(b"not a picture")
    train, _, _ = vit.load(str(tmp_path / "odd"), args, None)
    torn = [source.name for source, _ in train.rows].index("torn.png")
    with pytest.raises(JactusError, match=r"torn\.png"):
        train[torn]


@pytest.fixture
def no_weights(monkeypatch):
    """A recipe that loads weights fails the test."""

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    for auto in (AutoModelForImageClassification, AutoModelForCausalLM):
        monkeypatch.setattr(auto, "from_pretrained", load)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


WORDS = ["ant", "bat", "bee", "cat", "elk", "fox"]
TEMPLATE = (
    "Below is an instruction that describes a task . Write a response that appropriately completes the request . \
### Instruction : Response Input please answer the following question with true or false , is a mammal ? Answer format \
/ option1 option2 correct"
)


def row(word, kind="truth"):
    """A question whose answer is fixed by the word, in LLM-Adapters' format."""
    known = WORDS.index(word) % 2
    options = ("true", "false") if kind == "truth" else ("option1", "option2")
    return {
        "instruction": f"please answer the following question with true or false, is {' '.join([word] * (6 + WORDS.index(word)))} a mammal?\n\n"
        f"Answer format: {'/'.join(options)}",
        "input": "",
        "output": f"the correct answer is {options[known]}",
        "answer": options[known],
    }


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A pretrained Llama (random) with a tokenizer like Llama-2's (a first token, no padding token), and the JSON files."""
    root = tmp_path_factory.mktemp("llama")
    words = ["<unk>", "<s>", "</s>", *dict.fromkeys(TEMPLATE.split()), *WORDS, *("the", "answer", "###")]
    base = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    base.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(root / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=160,
        max_position_embeddings=128,
        initializer_range=0.2,  # its frozen output embedding must be able to tell tokens apart
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    rng = random.Random(0)
    train = [row(rng.choice(WORDS), kind) for _ in range(80) for kind in ("truth", "option")]
    (root / "train.json").write_text(json.dumps(train))
    for task, kind in (("boolq", "truth"), ("winogrande", "option")):
        (root / "tests" / task).mkdir(parents=True)
        (root / "tests" / task / "test.json").write_text(json.dumps([row(word, kind) for word in WORDS]))
    return root


def llama_options(root, **changed):
    values = {
        "model": root / "model",
        "train": root / "train.json",
        "test": root / "tests",
        "tasks": ["boolq", "winogrande"],
        "output": root / "out",
        "dtype": "float32",
        "epochs": 10,
        "learning_rate": 1e-2,
        "warmup": 0.05,
    }
    return options(**{**values, **changed})


@pytest.fixture(scope="module")
def llama_results(questions):
    return llama.main(llama_options(questions))


def test_llama_learns_each_task_and_writes_what_it_found(questions, llama_results):
    written = json.loads((questions / "out/results.json").read_text())
    assert written["accuracy"] == llama_results["accuracy"]
    assert list(written["accuracy"]) == ["boolq", "winogrande"]
    assert {found["folded"] for found in written["accuracy"].values()} == {1.0}  # by chance once in 4096 times
    assert written["average"]["folded"] == 1.0 > written["average"]["dense"]
    assert np.mean(written["loss"][-3:]) < 0.5 * np.mean(written["loss"][:3])
    assert written["rows"] == {"train": 160, "boolq": 6, "winogrande": 6}
    size = written["size"]
    assert size["folded"]["stored"] == size["compressed"]["folded"] < size["dense"]["stored"]


def test_llama_reloads_with_the_same_predictions(questions, llama_results):
    folder = questions / "out"
    model = AutoModelForCausalLM.from_pretrained(folder / "folded")
    tokenizer = AutoTokenizer.from_pretrained(folder / "folded")
    written = json.loads((folder / "predictions.json").read_text())
    for task in ("boolq", "winogrande"):
        rows = llama.read(questions / "tests" / task / "test.json", None, seed=0, test=True)
        assert llama.by_likelihood(model, tokenizer, rows, 16) == written[task]
        # a batch of one has no padding; a trained model writes what it finds likeliest
        assert llama.by_likelihood(model, tokenizer, rows, 1) == written[task]
        assert llama.by_generation(model, tokenizer, rows, 4) == written[task]
    trained = AutoModelForCausalLM.from_pretrained(folder / "trained")
    assert jactus.size(trained).folded == jactus.size(model).stored


def test_a_plan_saves_the_calibration_and_a_checkpoint_the_training(questions, llama_results, tmp_path, monkeypatch):
    monkeypatch.setattr(jactus, "calibrate", None)
    plan = questions / "out/plan.safetensors"
    fewer = {"tasks": ["boolq"], "plan": plan, "output": tmp_path / "fewer", "epochs": 0}
    small = llama.main(llama_options(questions, **fewer, budget=0.5, learning_rate=None))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer/trained")
    assert small["learning_rate"] == jactus.learning_rate(trained) != 1e-2 == llama_results["learning_rate"]
    assert small["size"]["folded"]["stored"] < llama_results["size"]["folded"]["stored"]
    (tmp_path / "on").mkdir()
    (tmp_path / "on/trainer").symlink_to(questions / "out/trainer")
    resumed = llama.main(llama_options(questions, **{**fewer, "output": tmp_path / "on", "epochs": 10}, resume=True))
    assert resumed["accuracy"]["boolq"]["folded"] == 1.0
    assert resumed["loss"] == llama_results["loss"]  # the finished run's own record: no step was taken again
    with pytest.raises(JactusError, match="accounting='compact', not 'folded'"):
        llama.main(llama_options(questions, plan=plan, output=tmp_path, accounting="folded"))


@pytest.mark.parametrize("recipe, made", [(vit, vit_options), (llama, llama_options)], ids=["vit", "llama"])
def test_a_budget_is_of_what_is_deployed_unless_told(recipe, made, tmp_path):
    asked = made(tmp_path)
    assert recipe.check(recipe.parse(asked)).budget.accounting == "compact"
    for accounting in ("compact", "folded", "three_factor"):
        assert recipe.check(recipe.parse([*asked, "--accounting", accounting])).budget.accounting == accounting
    with pytest.raises(SystemExit):
        recipe.parse([*asked, "--accounting", "stored"])


def test_labels_are_on_the_answer_only(questions):
    tokenizer = AutoTokenizer.from_pretrained(questions / "model")
    tokenizer.pad_token = tokenizer.eos_token  # as the recipe does: the pad is the token that also ends an answer
    long, short = ({**row("bee"), "input": text} for text in ("a mammal ?", ""))
    encoded = [llama.encode(tokenizer, r, r["output"], 256, end=True) for r in (long, short)]
    for r, e in zip((long, short), encoded):
        learnt = [label for label in e["labels"] if label != -100]
        assert tokenizer.decode(learnt) == f"{r['output']}</s>".replace("</s>", " </s>")
        assert e["input_ids"][-len(learnt) :] == learnt
        assert e["input_ids"][: -len(learnt)] == tokenizer(llama.prompt(r))["input_ids"]
    batch = DataCollatorForSeq2Seq(tokenizer)(encoded)
    padded = batch["attention_mask"][1] == 0
    assert padded.sum() == len(encoded[0]["input_ids"]) - len(encoded[1]["input_ids"]) > 0
    assert (batch["labels"][1][padded] == -100).all()
    assert (batch["labels"] != -100).sum(1).tolist() == [6, 6]  # the correct answer is false </s>


def test_a_prompt_too_long_loses_its_beginning_but_for_the_first_token(questions):
    tokenizer = AutoTokenizer.from_pretrained(questions / "model")
    whole = llama.encode(tokenizer, row("bee"), "the correct answer is false", 256, end=True)
    cut = llama.encode(tokenizer, row("bee"), "the correct answer is false", 20, end=True)
    assert len(cut["input_ids"]) == 20
    assert cut["input_ids"] == whole["input_ids"][:1] + whole["input_ids"][-19:]
    assert cut["labels"][-6:] == cut["input_ids"][-6:]
    with pytest.raises(JactusError, match="--max-length is 6"):
        llama.encode(tokenizer, row("bee"), "the correct answer is false", 6, end=True)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"budget": 0}, "fraction = 0"),
        ({"max_test": -3}, "--max-test is -3"),
        ({"max_length": 3}, "--max-length is 3"),
        ({"snapshot_seconds": 0}, "--snapshot-seconds is 0"),
        ({"memory_limit": "inf"}, "--memory-limit is inf"),
        ({"resume": True}, "--resume needs a checkpoint"),
        ({"plan": "nowhere"}, "nowhere is not a file"),
        ({"tasks": ["boolq", "piqa"]}, "piqa/test.json cannot be read"),
        ({"train": "nowhere.json"}, "nowhere.json cannot be read"),
        ({"model": "nowhere/at-all"}, "--model nowhere/at-all is neither"),
        ({"statistics_device": "cuda"}, "--statistics-device is cuda"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_llama_refuses_before_it_loads(changed, message, questions, tmp_path, no_weights):
    if torch.cuda.is_available() and "cuda" in str(changed):
        pytest.skip("there is a GPU")
    with pytest.raises(JactusError, match=message):
        llama.main(llama_options(questions, **{"output": tmp_path, **changed}))


@pytest.mark.parametrize(
    "rows, message",
    [
        ({}, "holds a dict"),
        ([], "holds a list"),
        ([row("ant"), "text"], "row 1 has no text"),
        ([{**row("ant"), "answer": 3}], r"row 0 has no text under \['answer'\]"),
        ([{**row("ant"), "instruction": "true or false?"}], r"offered are \[\]"),
        ([{**row("ant"), "answer": "maybe", "output": "maybe"}], r"'maybe' must .* offered are \['true', 'false'\]"),
        ([{**row("ant"), "output": "no idea"}], "must end the output"),
    ],
    ids=["dict", "empty", "text", "number", "no-candidates", "not-offered", "other-output"],
)
def test_llama_names_what_is_wrong_with_the_data(rows, message, tmp_path):
    (tmp_path / "test.json").write_text(json.dumps(rows))
    with pytest.raises(JactusError, match=message):
        llama.read(tmp_path / "test.json", None, 0, test=True)


def test_candidates_are_read_from_every_layout_of_the_eight_tasks():
    endings = {
        "x\n\nAnswer format: true/false": ["true", "false"],
        "Solution2: y \n\nAnswer format: solution1/solution2": ["solution1", "solution2"],
        "Option1: a Option2: b Answer format: option1/option2": ["option1", "option2"],
        "Answer format: answer1/answer2/answer3/answer4/answer5": [f"answer{i}" for i in range(1, 6)],
    }
    assert {text: llama.candidates({"instruction": text}) for text in endings} == endings
