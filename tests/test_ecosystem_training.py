"""Trained by others' loops: Trainer with everything on, accelerate, PEFT over a folded model, TRL."""

import copy

import pytest
import torch
from transformers import BertConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments

import jactus
from jactus.model.lowrank import core_layers
from tests.models import BERT, EVERY, LLAMA, compressed
from tests.test_trainer import same, trainable, weights


def rows_of(family, count=16, seed=0):
    batch = family.batch(rows=count, seed=seed)
    return [{k: v[i] for k, v in batch.items()} for i in range(count)]


def full_trainer(model, path, **arguments):
    settings = TrainingArguments(
        str(path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        max_steps=8,
        learning_rate=0.05,
        logging_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        seed=0,
        **arguments,
    )
    return Trainer(model=model, args=settings, train_dataset=rows_of(BERT), eval_dataset=rows_of(BERT, seed=1))


def test_trainer_ends_with_the_best_checkpoint_that_evaluation_found(tmp_path):
    model = compressed(BERT, EVERY)
    run = full_trainer(model, tmp_path)
    run.train()
    losses = {log["step"]: log["eval_loss"] for log in run.state.log_history if "eval_loss" in log}
    best = min(losses, key=losses.__getitem__)
    assert len(losses) == 4
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert same(weights(model), weights(BERT.auto.from_pretrained(run.state.best_model_checkpoint)))
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_trainer_resumes_in_the_middle_and_ends_the_same(tmp_path):
    whole, resumed = compressed(BERT, EVERY), compressed(BERT, EVERY)
    full_trainer(whole, tmp_path).train()
    full_trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(weights(whole), weights(resumed))


def test_accelerates_loop_is_the_plain_loop(tmp_path):
    from accelerate import Accelerator

    def batches():
        return torch.utils.data.DataLoader(rows_of(BERT), batch_size=4)

    def optimizer(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    plain, ours = compressed(BERT, EVERY).train(), compressed(BERT, EVERY).train()
    torch.manual_seed(0)
    adam = optimizer(plain)
    for i, batch in enumerate(batches()):
        (plain(**batch).loss / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, adam, loader = accelerator.prepare(ours, optimizer(ours), batches())
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
    ours = accelerator.unwrap_model(model)
    assert trainable(ours) == trainable(plain)
    for name, p in plain.named_parameters():
        assert torch.allclose(ours.get_parameter(name), p, atol=1e-6), name
    jactus.save_pretrained(ours, tmp_path, is_main_process=accelerator.is_main_process)
    assert same(weights(BERT.auto.from_pretrained(tmp_path)), weights(ours))


@pytest.mark.slow
def test_an_8_bit_optimizer_trains_the_cores(tmp_path):
    """bitsandbytes' on the CPU: each moment of a core in a byte a number, and from a checkpoint on as without a stop."""
    config = BertConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=160, num_labels=3
    )

    def made():
        torch.manual_seed(0)
        model = BERT.auto.from_config(copy.deepcopy(config)).eval()
        return jactus.adapt(model, BERT.batches(), 0.7, EVERY, progress=False)

    def run(model):
        settings = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4, max_steps=8,
            save_steps=4, learning_rate=1e-3, logging_steps=1, optim="adamw_bnb_8bit", seed=0,
        )  # fmt: skip
        return Trainer(model=model, args=settings, train_dataset=rows_of(BERT))

    model, resumed = made(), made()
    before = weights(model)
    first = run(model)
    first.train()
    losses = [log["loss"] for log in first.state.log_history if "loss" in log]
    assert sum(losses[4:]) < sum(losses[:4])
    large = [layer.core for layer in core_layers(model).values() if layer.core.numel() >= 4096]  # else it keeps float32
    state = first.optimizer.state
    assert large
    assert all(state[core][moment].dtype == torch.uint8 for core in large for moment in ("state1", "state2"))
    changed = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert {f"{name}.core" for name in core_layers(model)} <= changed <= trainable(model)
    run(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(weights(model), weights(resumed))


def lora_over_folded():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value"], r=2, modules_to_save=["classifier"])
    config._register_custom_module({jactus.FoldedLinear: peft.tuners.lora.Linear})
    return peft, config


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_lora_over_a_folded_model_trains_and_reloads(tmp_path):
    peft, config = lora_over_folded()
    folded = jactus.fold(compressed(BERT, EVERY))
    again, batch = copy.deepcopy(folded), BERT.batch()
    before, base = folded(**batch), weights(folded)
    model = peft.get_peft_model(folded, config)
    assert torch.equal(model(**batch).logits, before.logits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(5):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(**batch).loss < before.loss - 1e-3
    kept = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(kept[name], p) for name, p in base.items() if "classifier" not in name)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(again, tmp_path, config=config)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("safe", [False, True])
def test_lora_is_never_merged_into_a_weight_that_is_not_there(safe):
    peft, config = lora_over_folded()
    model = peft.get_peft_model(jactus.fold(compressed(BERT, EVERY)), config)
    with pytest.raises((RuntimeError, ValueError)):
        model.merge_and_unload(safe_merge=safe)


def test_lora_is_refused_by_the_layers_name_unless_it_is_told_how():
    peft = pytest.importorskip("peft")
    for model, name in (
        (compressed(BERT, EVERY), "CoreLinear"),
        (jactus.fold(compressed(BERT, EVERY)), "FoldedLinear"),
    ):
        with pytest.raises(ValueError, match=f"Target module {name}.* is not supported"):
            peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2))


def test_lora_over_a_merged_model_and_compression_of_a_merged_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
    batch = BERT.batch()
    dense = jactus.merge(compressed(BERT, EVERY))
    before = dense(**batch).logits
    merged = peft.get_peft_model(dense, config).merge_and_unload()
    assert not torch.allclose(merged(**batch).logits, before, atol=1e-4)
    right = copy.deepcopy(merged)(**batch).logits
    jactus.adapt(
        merged, BERT.batches(), 1.0, EVERY, progress=False
    )  # at full rank what is compressed is what was there
    assert core_layers(merged)
    assert torch.allclose(merged.eval()(**batch).logits, right, atol=1e-5)


def test_trl_fine_tunes_a_compressed_language_model(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[BOS]", "[EOS]", *["the", "cat", "sat", "on", "a", "mat", "and", "then", "left"]]
    base = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[PAD]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="[PAD]", eos_token="[EOS]", bos_token="[BOS]")
    model = compressed(LLAMA, EVERY)
    before, trains = weights(model), trainable(model)
    settings = trl.SFTConfig(
        str(tmp_path), use_cpu=True, report_to=[], max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
        bf16=False, gradient_checkpointing=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": ["the cat sat on a mat and then left"] * 8})
    run = trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    run.train()
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    changed = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert {f"{name}.core" for name in core_layers(model)} <= changed <= trains
