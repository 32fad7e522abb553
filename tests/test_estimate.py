"""The estimate from a config alone is what the model, its sums and its plan then take."""

import json

import pytest
import torch

import jactus
from jactus import JactusError
from jactus.app.estimate import estimate, table
from jactus.calibration.passes import by_part
from jactus.calibration.summing import Summing
from tests.models import BERT, LLAMA, SMALL, VIT

SEEN = SMALL.replace(union_share=0.0)


def config_of(family):
    return {**family.config.to_dict(), "architectures": [type(family.model()).__name__]}


@pytest.mark.parametrize("config", [SEEN, SMALL], ids=["smaller sides", "task directions"])
@pytest.mark.parametrize("family", [BERT, LLAMA, VIT], ids=lambda f: f.name)
def test_bytes_and_ranks_are_those_of_the_run(family, config):
    config = config.replace(allocation="uniform", budget=0.7)
    model = family.model()
    found = estimate(config_of(family), config)
    statistics = jactus.calibrate(model, family.batches(), config, progress=False)
    plan = jactus.plan(model, statistics, config, progress=False)
    traces = [t for layer in statistics.layers.values() for t in layer.sums().values() if t.dim() == 0]
    assert found.shared
    assert found.sums == statistics.nbytes - 4 * len(traces)
    assert found.weights == 4 * sum(p.numel() for p in model.parameters())
    assert found.targeted == plan.dense_parameters
    assert sum(k.deployed for k in found.kinds) == plan.folded_parameters
    assert sum(k.count for k in found.kinds) == len(plan.layers)
    kept = [d for layer in plan.layers.values() for d in (layer.directions.left, layer.directions.right)]
    whole = sum(t.numel() * t.element_size() for d in kept for t in (d.weight, d.task, d.cross, d.gram))
    whole += 8 * sum(x.directions.sigma.numel() + x.directions.task_core.numel() for x in plan.layers.values())
    assert found.plan == pytest.approx(whole, rel=0.01 if config is SEEN else 0.1)
    jactus.compress(model, plan)
    size = jactus.size(jactus.fold(model.eval()))
    assert found.deployed == size.stored_bytes


def test_a_folder_a_file_and_a_model_give_the_same(tmp_path):
    values = config_of(LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(values | {"dtype": "bfloat16"}))
    found = estimate(tmp_path, SEEN)
    assert found == estimate(tmp_path / "config.json", SEEN)
    assert found.dtype == "bfloat16"
    with torch.device("meta"):
        model = LLAMA.model(dtype=torch.bfloat16)
    assert estimate(model, SEEN) == found
    loaded = estimate(LLAMA.model(dtype=torch.bfloat16), SEEN)  # which layers share is seen without its weights only
    assert not loaded.shared
    assert loaded.sums >= found.sums
    text = table(found)
    assert "LlamaForCausalLM" in text
    assert "down_proj" in text
    assert all(f"\n{stage} " in text for stage in ("load", "calibrate", "plan", "train", "deploy"))


def test_what_is_no_config_is_named(tmp_path):
    with pytest.raises(JactusError, match=r"no config\.json"):
        estimate(tmp_path)
    with pytest.raises(JactusError, match="NobodysModel, which transformers"):
        estimate(config_of(LLAMA) | {"architectures": ["NobodysModel"]})
    with pytest.raises(JactusError, match=r"the config given is no config\.json"):
        estimate({"hidden_size": 3})


def test_parts_are_those_of_the_run_and_take_less_than_all_at_once():
    model, limit = LLAMA.model(), 5_000
    found, sizes = estimate(config_of(LLAMA), SEEN, memory_limit=limit), []
    for part, *_ in by_part(model, LLAMA.batches(1), SEEN, Summing(memory_limit=limit), verify=False, progress=False):
        traces = [t for layer in part.layers.values() for t in layer.sums().values() if t.dim() == 0]
        sizes.append(part.nbytes - 4 * len(traces))
    assert found.passes == len(sizes) > 2
    assert found.at_a_time == max(sizes) <= limit
    whole = estimate(config_of(LLAMA), SEEN)
    assert (whole.passes, whole.at_a_time) == (1, whole.sums)
    assert found.by_part < whole.by_part < whole.planning
