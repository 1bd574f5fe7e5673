"""Clients that train a language model, and what a curious server asks of what they sent."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedllm_sec import Round, Threat, attack, open_updates
from fedllm_sec.victim import Victim

VOCABULARY = 2000
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2_QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TINY = {
    "bert": lambda: BertForSequenceClassification(BertConfig(hidden_size=192, intermediate_size=96, **SIZES, **QUIET)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(hidden_size=96, **SIZES, **GPT2_QUIET)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=96, intermediate_size=96, **SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(hidden_size=96, intermediate_size=96, **SIZES)),
}
TARGETS = {
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "llama": ["q_proj", "v_proj"],
}


class Sent(NamedTuple):
    """What a client left: folders, and the texts that an update can tell of."""

    client: Path
    reference: Path
    base: Path
    texts: list[list[int]]

    @property
    def tokens(self) -> set[int]:
        return {token for text in self.texts for token in text}


def tiny_base(kind, folder, seed=0):
    """A random model, with embeddings as uneven in their coordinates as real ones are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TINY[kind]()
        words = model.get_input_embeddings().weight
        words.data *= torch.linspace(0.3, 3, words.shape[1])
        for name, value in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                value.data += 0.1 * torch.randn(value.shape)
    model.save_pretrained(folder)
    return folder


def random_texts(count, longest, seed=0, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 2, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(5, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def adapted(base, r, targets, seed=0, fresh=False, causal=True, saved=None, **lora):
    """The base with an adapter whose B is not zero unless it is fresh."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if causal:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, **QUIET)
        kind = "CAUSAL_LM" if causal else "SEQ_CLS"
        config = LoraConfig(
            task_type=kind, r=r, lora_alpha=2 * r, target_modules=targets, modules_to_save=saved, **lora
        )
        model = get_peft_model(model, config)
        for name, value in model.named_parameters():
            if "lora_B" in name and not fresh:
                torch.nn.init.normal_(value.data, std=0.02)
    return model


def trained(model, texts, *, optimizer="sgd", rate=0.1, steps=1, decay=0.0, causal=True, frozen=""):
    """Train on all texts at once in every step."""
    for name, value in model.named_parameters():
        if frozen and frozen in name:
            value.requires_grad = False
    parameters = [value for value in model.parameters() if value.requires_grad]
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    made = kinds[optimizer](parameters, lr=rate, weight_decay=decay)
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    labels = ids.masked_fill(mask == 0, -100) if causal else torch.arange(len(texts)) % 2
    model.eval()  # dropout is a test of its own
    for _ in range(steps):
        made.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        made.step()


def lora_client(folder, base, texts, *, kind, r=4, targets=None, causal=None, fresh=False, saved=None, **how):
    """A client's adapter and the global one, as PEFT saves them."""
    causal = kind != "bert" if causal is None else causal
    model = adapted(base, r, targets or TARGETS[kind], fresh=fresh, causal=causal, saved=saved)
    model.save_pretrained(folder / "global")
    trained(model, texts, causal=causal, **how)
    model.save_pretrained(folder / "client")
    return Sent(folder / "client", folder / "global", base, [text[:-1] if causal else text for text in texts])


def look(sent, name="lora_tokens", parameters=None, memory="256MiB", **victim):
    """What the attack makes of it."""
    rows = open_updates([sent.client], reference=sent.reference, memory=memory)
    weights = open_updates([sent.reference], memory=memory)
    config = sent.reference / "adapter_config.json"
    known = Victim(
        base=sent.base, **{"steps": 1, "adapter": json.loads(config.read_text()) if config.exists() else None, **victim}
    )
    threat = Threat(Round(), (), (0,), weights, "all", 1, victim=known)
    (found,) = attack.build(name, parameters or {}).reconstruct_data(rows, threat)
    return found


def recall_and_precision(found, sent):
    got = {token.id for token in found.tokens}
    return len(got & sent.tokens) / len(sent.tokens), len(got & sent.tokens) / max(len(got), 1)
