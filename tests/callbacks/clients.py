"""A small language model with an adapter, and a `Trainer` for it."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

RATE = 0.05


def model(seed=0, **lora):
    """LoRA on a Llama of two layers; B is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=32, **sizes))
        made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **lora))
        for name, value in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value.data, std=0.1)
    return made


def data(count=16):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (count, 8), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


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
