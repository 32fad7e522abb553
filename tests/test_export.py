"""A model that goes out computes what it computed here, without jactus; and what cannot go out is refused before a file is touched."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import jactus
from jactus import JactusError, can_export, export_model
from jactus.export import load_model
from jactus.model.lowrank import compressed_layers, core_layers
from tests.models import BERT, EVERY, FAMILIES, GPT2, LLAMA, compressed
from tests.plain import plain
from tests.test_damaged_files import little_memory

# Run in a process where jactus cannot be imported; a .pt2 must not need transformers either.
ALONE = """
import sys, torch
for name in ("jactus", "jactus_kernels", *sys.argv[2:]):
    sys.modules[name] = None
try:
    import jactus
    raise SystemExit("jactus can be imported")
except ImportError:
    pass
found = {}
for name, folder, inputs in torch.load(sys.argv[1] + "/cases.pt"):
    found[name] = run(name, folder, inputs)
torch.save(found, sys.argv[1] + "/found.pt")
"""


def alone(run, cases, path, *blocked):
    """What `run(name, folder, inputs)` gives for every case, in a process without jactus."""
    torch.save(cases, path / "cases.pt")
    code = f"{run}\n{ALONE}"
    done = subprocess.run([sys.executable, "-c", code, str(path), *blocked], capture_output=True, text=True, cwd=path)
    assert done.returncode == 0, done.stderr
    return torch.load(path / "found.pt")


def one_block(family, dtype=torch.float32):
    """A compressed model of a family with one block: as good for a graph, and quicker."""
    model = compressed(family, EVERY, dtype)
    for stack in ("bert.encoder.layer", "model.layers"):
        name, _, last = stack.rpartition(".")
        if family.name == {"bert": "bert", "model": "llama"}[stack.split(".")[0]]:
            setattr(model.get_submodule(name), last, model.get_submodule(stack)[:1])
    return model


def inputs_of(family, rows=4, length=7):
    batch = family.batch(rows, length)
    labels = batch.pop("labels")
    return batch | ({"decoder_input_ids": labels.clamp(min=0)} if family.labels == "seq2seq" else {})


def error(found, right):
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm())


def logits(outputs):
    return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state


@torch.no_grad()
def bound(model, *batches):
    """Twice what torch's own float32 is off the same model in float64, in the row that is off most (what one row's few numbers are
    off is a draw), and a rounding of what comes out; and of each batch what is right."""
    double = copy.deepcopy(model).double()
    right = [logits(double(**inputs)) for inputs in batches]
    own = [logits(model(**inputs)) for inputs in batches]
    off = max(error(mine, theirs) for pair in zip(own, right) for mine, theirs in zip(*pair))
    return 2 * off + torch.finfo(torch.float32).eps, right


@pytest.mark.parametrize(
    "kind", ["classifier", *(pytest.param(k, marks=pytest.mark.slow) for k in ("sentence encoder", "language model"))]
)
def test_onnx_is_the_model_to_rounding_at_any_batch_and_length(kind, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    family = LLAMA if kind == "language model" else BERT
    model = one_block(family)
    model = model.bert if kind == "sentence encoder" else model
    example = inputs_of(family)
    file = export_model(model, tmp_path, "onnx", example)
    graph = onnx.load(file)
    assert {node.domain for node in graph.graph.node} | {o.domain for o in graph.opset_import} == {""}
    assert not graph.functions
    numbers = sum(torch.Size(t.dims).numel() for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    tied = LLAMA.config.vocab_size * 16 if family is LLAMA else 0  # so small a tied embedding has a transposed copy
    assert numbers <= 1.02 * jactus.size(model).folded + tied  # and a few constants; pairs of factors would be far more
    session = onnxruntime.InferenceSession(file)
    assert [i.name for i in session.get_inputs()] == list(example)
    batches = [inputs_of(family, rows, length) for rows, length in ((1, 5), (4, 7), (6, 11))]
    most, rights = bound(model, *batches)
    for batch, right in zip(batches, rights):
        found = session.run(None, {name: t.numpy() for name, t in batch.items()})[0]
        assert error(torch.from_numpy(found), right) <= most
    assert core_layers(model)  # the model itself is as it was
    if kind == "classifier":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(str(file), str(tmp_path / "int8.onnx"))
        assert "MatMulInteger" in {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
        found = onnxruntime.InferenceSession(tmp_path / "int8.onnx").run(None, {n: t.numpy() for n, t in batch.items()})
        assert error(torch.from_numpy(found[0]), right) < 0.1  # 1/128 of the largest, a product after the other


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_exported_programs_run_without_jactus_and_without_transformers(dtype, tmp_path):
    model = one_block(BERT, dtype)
    file = export_model(model, tmp_path, "torch.export", inputs_of(BERT))
    cases = [(str(rows), str(file), {k: v[:rows] for k, v in inputs_of(BERT).items()}) for rows in (4, 1)]
    run = "def run(name, file, inputs): return torch.export.load(file).module()(**inputs)['logits'].detach()"
    found = alone(run, cases, tmp_path, "transformers")
    most, rights = bound(model, *(batch for *_, batch in cases))
    if dtype == torch.bfloat16:  # the same folded model, but for products that a graph joins
        folded = jactus.fold(copy.deepcopy(model))
        most, rights = 4 * torch.finfo(dtype).eps, [folded(**batch).logits for *_, batch in cases]
    for (name, *_), right in zip(cases, rights):
        assert error(found[name], right) <= most, name


LOAD = """
import importlib.util
import transformers
def run(name, folder, inputs):
    if name.startswith("dense"):
        config = transformers.AutoConfig.from_pretrained(folder)
        model = getattr(transformers, config.architectures[0]).from_pretrained(folder)
    else:
        spec = importlib.util.spec_from_file_location("load_model", folder + "/load_model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.load(folder)
        assert {p.dtype for p in module.load(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
        if model.can_generate():
            options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
            assert model.generate(inputs["input_ids"][:1], **options).shape[1] >= 3
    assert type(model).__module__.startswith("transformers.")
    return model(**inputs).logits.detach()
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """By name: a model, its folder, its inputs, and the logits of what was read from there in a process without jactus."""
    path, cases = tmp_path_factory.mktemp("elsewhere"), []
    models = {f"torch {f.name}": (compressed(f, EVERY), f) for f in FAMILIES}
    models |= {f"dense {f.name}": (compressed(f, EVERY), f) for f in (BERT, LLAMA, GPT2)}
    models["torch 0.1.0"] = (in_pairs(jactus.fold(compressed(BERT, EVERY))), BERT)
    for name, (model, family) in models.items():
        cases.append((name, str(export_model(model, path / name, name.split()[0])), inputs_of(family)))
    found = alone(LOAD, cases, path)
    return {name: (models[name][0], Path(folder), inputs, found[name]) for name, folder, inputs in cases}


def in_pairs(model):
    """A folded model as 0.1.0 made it: a pair of factors a layer."""
    for name, layer in compressed_layers(model).items():
        old = jactus.FoldedLinear(layer.out_features, layer.in_features, layer.rank, pivoted=False)
        u, s, v = torch.linalg.svd(layer.dense_weight(torch.float64))
        old.left.data.copy_(u[:, : layer.rank] * s[: layer.rank])
        old.right.data.copy_(v[: layer.rank])
        old.bias = layer.bias
        model.set_submodule(name, old)
    return model


def test_what_others_load_computes_what_the_model_did(elsewhere):
    for name, (model, _, inputs, found) in elsewhere.items():
        most, (right,) = bound(model, inputs)
        assert error(found, right) <= most, name


def test_the_torch_form_has_the_folded_size_and_is_a_checkpoint_besides(elsewhere):
    for family in FAMILIES:
        model, folder, *_ = elsewhere[f"torch {family.name}"]
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            kept = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        assert sum(t.numel() for t in kept if t.is_floating_point()) <= jactus.size(model).folded
        assert compressed_layers(family.auto.from_pretrained(folder))
        assert core_layers(model)  # which is as it was


def test_the_dense_form_is_an_ordinary_checkpoint(elsewhere):
    for name in ("bert", "llama", "gpt2"):
        model, folder, *_ = elsewhere[f"dense {name}"]
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        assert core_layers(model)


def claims(folder, key, value, of):
    """What config.json says of every layer whose `key` is `of` (None: of all), and of the model where it has such a size."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for kept in config["quantization_config"]["layers"].values():
        for each in ("m", "n") if key == "size" else (key,):
            if of in (None, kept[each]):
                kept[each] = value
    if key == "size":
        config["intermediate_size"] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "key, value, of, said",
    [
        ("rank", 10**9, None, "claims of bert.* what cannot be"),
        ("m", 10**30, None, "claims of bert.* what cannot be"),
        ("rank", "7", None, "claims of bert.* what cannot be"),
        ("size", 10**8, 24, "claims of bert.* what cannot be or is not there"),
        ("size", 1000, 24, r"claims layers of [\d,]+ numbers, and the weight files hold"),
        ("n", 23, 24, "no layer of 16×23 in this model"),
    ],
)
def test_the_loader_allocates_nothing_for_what_is_not_there(key, value, of, said, tmp_path):
    export_model(compressed(BERT, EVERY), tmp_path, "torch")
    claims(tmp_path, key, value, of)
    with little_memory(), pytest.raises(ValueError, match=said):
        load_model.load(tmp_path)


def test_the_loader_refuses_ten_terabytes_in_a_header(tmp_path):
    export_model(compressed(BERT, EVERY), tmp_path, "torch")
    claim = json.dumps({"x": {"dtype": "F32", "shape": [2500, 10**9], "data_offsets": [0, 10**13]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(claim).to_bytes(8, "little") + claim + b"\0" * 64)
    with little_memory(), pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupted"):
        load_model.load(tmp_path)


def refused(model, to, why, path, example=None):
    answer = can_export(model, to, example)
    assert not answer
    assert why in answer.reason
    with pytest.raises(JactusError, match="cannot export") as e:
        export_model(model, path / "out", to, example)
    assert answer.reason in str(e.value)
    assert not (path / "out").exists()


class OwnClass(type(BERT.model())):
    pass


@pytest.mark.parametrize("to", ["torch", "onnx", "torch.export", "dense"])
def test_what_cannot_go_out_is_refused_before_a_file_is_touched(to, tmp_path):
    model = compressed(BERT, EVERY)
    assert can_export(model, to)
    refused(compressed(BERT, EVERY).train(), to, "training mode", tmp_path)
    broken = compressed(BERT, EVERY)
    next(iter(core_layers(broken).values())).core.data[0, 0] = float("nan")
    refused(broken, to, "not finite", tmp_path)
    if to in ("torch", "dense"):
        refused(plain().eval(), to, "no transformers model", tmp_path)
        refused(BERT.model(), to, "dense already", tmp_path)
    else:
        refused(plain().eval().float(), to, "example=", tmp_path)
        refused(model, to, "labels", tmp_path, BERT.batch())
        refused(model, to, "tensors by name", tmp_path, {"input_ids": [1, 2]})
    if to == "torch":
        own = compressed(BERT, EVERY)
        own.__class__ = OwnClass
        refused(own, to, "class of your own", tmp_path)
    if to == "onnx":
        refused(compressed(BERT, EVERY, torch.bfloat16), to, "bfloat16", tmp_path)
    with pytest.raises(JactusError, match="no form"):
        export_model(model, tmp_path, "gguf")


def test_packages_that_are_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    refused(compressed(BERT, EVERY), "onnx", "onnxscript", tmp_path)


class Counts(nn.Module):
    """Computes something else on every call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.view(2, -1).sum(1)


def test_a_graph_that_computes_something_else_is_not_written(tmp_path):
    with pytest.raises(JactusError, match="gives another output than the model"):
        export_model(
            nn.Sequential(nn.Linear(3, 3), Counts()).eval(), tmp_path, "torch.export", {"input": torch.ones(2, 3)}
        )
    assert not list(tmp_path.iterdir())


def test_an_axis_that_cannot_stay_open_is_named(tmp_path):
    with pytest.raises(JactusError, match=r"batch of 2|does not run on input \(3, 3\)"):
        export_model(
            nn.Sequential(nn.Linear(3, 3), FixedBatch()).eval(), tmp_path, "torch.export", {"input": torch.ones(2, 3)}
        )
    assert not list(tmp_path.iterdir())


def test_files_of_yours_stay_and_a_full_disk_leaves_what_was_there(monkeypatch, tmp_path):
    model, example = nn.Linear(3, 3).eval(), {"input": torch.ones(2, 3)}
    (tmp_path / "mine").write_text("mine")
    export_model(model, tmp_path, "torch.export", example)
    before = (tmp_path / "model.pt2").read_bytes()

    def full(program, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.export.save", full)
    with pytest.raises(JactusError, match="No space left"):
        export_model(model, tmp_path, "torch.export", example)
    assert {file.name for file in tmp_path.iterdir()} == {"mine", "model.pt2"}
    assert (tmp_path / "model.pt2").read_bytes() == before
