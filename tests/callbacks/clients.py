"""A small language model with an adapter, and a `Trainer` for it."""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from fedllm_sec.training.base_model import keep_trainable_on_cpu

RATE = 0.05


def model(seed=0, *, load_in_4bit=False, hidden=32, **lora):
    """LoRA on a Llama of two layers; B is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=32, **sizes))
        base = in_4_bits(base) if load_in_4bit else base
        made = get_peft_model(
            base, LoraConfig(task_type="CAUSAL_LM", **{"r": 2, **lora}, target_modules=["q_proj", "v_proj"])
        )
        for name, value in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value.data, std=0.1)
    return made


def in_4_bits(base):
    """The same, saved and loaded as QLoRA does."""
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        loaded = LlamaForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.float32)
    keep_trainable_on_cpu(loaded)
    return loaded


def data(count=16):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (count, 8), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def classifier(seed=0, **sizes):
    """LoRA on a BERT of one layer that tells three classes apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, **sizes}
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        base = BertForSequenceClassification(
            BertConfig(vocab_size=50, max_position_embeddings=32, num_labels=3, **sizes, **quiet)
        )
        return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


def labelled(count=16):
    """Texts for it."""
    return data(count).remove_columns("labels").add_column("labels", [i % 3 for i in range(count)])


def arguments(folder, **how):
    usual = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": RATE, "optim": "sgd", "seed": 0}
    usual |= {"lr_scheduler_type": "constant", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    usual |= {"max_grad_norm": 0.0, "report_to": []}
    return TrainingArguments(output_dir=str(folder), **{**usual, **how})


def trained(folder, callbacks, made=None, **how):
    """The weights before and after, by their names in the model."""
    made = made or model()
    before = {name: value.detach().clone() for name, value in made.named_parameters() if "lora" in name}
    trainer = Trainer(model=made, args=arguments(folder, **how), train_dataset=data(), callbacks=callbacks)
    trainer.train()
    after = {name: value.detach().clone() for name, value in made.named_parameters() if "lora" in name}
    return before, after


def length(before, after):
    return float(torch.cat([(after[name] - before[name]).flatten() for name in before]).double().norm())
