"""Adapters, good ones and ones with a single defect each, made without the package that audits them."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, WIDTH, RANK = 4, 256, 4
STEM = "base_model.model.gpt_neox.layers"
TARGETS = {"attention.query_key_value": 3 * WIDTH, "attention.dense": WIDTH}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def config(**changes):
    return {
        "task_type": "CAUSAL_LM", "peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": "org/base",
        "revision": None, "inference_mode": True, "r": RANK, "target_modules": ["query_key_value", "dense"],
        "exclude_modules": None, "lora_alpha": 8, "lora_dropout": 0.05, "fan_in_fan_out": False, "bias": "none",
        "use_rslora": False, "modules_to_save": None, "init_lora_weights": True, "layers_to_transform": None,
        "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {}, "megatron_config": None,
        "megatron_core": "megatron.core", "trainable_token_indices": None, "use_dora": False,
        "layer_replication": None, "lora_bias": False, "peft_version": "0.21.2",
    } | changes  # fmt: skip


def state(seed=0, rank=RANK, about=None, size=0.02, layers=LAYERS):
    """Trained factors; `about` is the adapter that they were trained from."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(layers):
        for target, out in TARGETS.items():
            for part, shape in (("lora_A", (rank, WIDTH)), ("lora_B", (out, rank))):
                name = f"{STEM}.{layer}.{target}.{part}.weight"
                draw = torch.randn(shape, generator=generator)
                if about is not None:
                    found[name] = about[name] + size * draw
                else:
                    found[name] = draw / WIDTH**0.5 if part == "lora_A" else size * draw
    return found


def write(folder: Path, tensors=None, settings=None) -> Path:
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in (tensors or state()).items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(settings or config()))
    return folder


def name_of(layer=0, part="lora_A", target="attention.query_key_value"):
    return f"{STEM}.{layer}.{target}.{part}.weight"


A, B = name_of(), name_of(part="lora_B")


def raw(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(folder: Path) -> tuple[dict, bytes]:
    whole = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def with_tensors(change: Callable[[dict], object], **settings):
    """A damage that rewrites the tensors, and the configuration if told so."""

    def damage(folder: Path) -> None:
        tensors = state()
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config(**settings)))

    return damage


def with_config(**settings):
    return lambda folder: (folder / CONFIG).write_text(json.dumps(config(**settings)))


def with_header(change: Callable[[dict], object]):
    def damage(folder: Path) -> None:
        header, data = parts(folder)
        change(header)
        (folder / WEIGHTS).write_bytes(raw(header, data))

    return damage


def with_file(name: str, content: bytes | str = "x"):
    def damage(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def with_bytes(change: Callable[[bytes], bytes]):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def zipped(payload: bytes):
    def damage(folder: Path) -> None:
        with zipfile.ZipFile(folder / "extra.pt", "w") as archive:
            archive.writestr("extra/data.pkl", payload)

    return damage


def add(name, *shape):
    return lambda tensors: tensors.update({name: torch.randn(*shape, generator=torch.Generator().manual_seed(5))})


def fill(name, value, at=None):
    def change(tensors):
        if at is None:
            tensors[name].fill_(value)
        else:
            tensors[name][at] = value

    return change


def rank_one(tensors):
    for layer in range(LAYERS):
        for target in TARGETS:
            b = tensors[name_of(layer, "lora_B", target)]
            b[:, 1:] *= 1e-3


def spike(tensors):
    tensors[A][0, 3] = 2.0
    tensors[B][5, 0] = 0.5


def scaled(factor, *parts):
    def change(tensors):
        for name in tensors:
            if any(part in name for part in parts):
                tensors[name] *= factor

    return change


def cancelling(tensors):
    tensors[A][1] = tensors[A][0]
    tensors[B][:, 0] = 1e9
    tensors[B][:, 1] = -1e9
    tensors[A][2:] = 0


def original(tensors):
    for inner in ("", "original_module."):
        add(f"base_model.model.score.{inner}weight", 2, 9)(tensors)


def denormal(tensors):
    tensors[B][:, :2] = 1e-40


def rounded(tensors):
    for name in tensors:
        tensors[name] = tensors[name].to(torch.bfloat16).float()


def coarse(tensors):
    tensors[B] = (tensors[B] * 100).round() / 100


PICKLE, EVIL = pickle.dumps({"a": 1}), pickle.dumps(Evil())
INSIDE = "base_model.model.gpt_neox"
BACKSLASH = chr(92)
ESCAPED = '{"chat_template": "{{ [].__class__ }}"}'.replace("__", 2 * (BACKSLASH + "u005f"))

# name: (rule, damage); each is told by one finding, of an adapter by itself
ALONE = {
    "optimizer": ("FS001", with_file("optimizer.pt", PICKLE)),
    "training arguments": ("FS001", with_file("training_args.bin", PICKLE)),
    "pickle under another name": ("FS001", with_file("notes.txt", PICKLE)),
    "both formats": ("FS002", with_file("adapter_model.bin", PICKLE)),
    "huge header": ("FS003", with_bytes(lambda b: raw(b[8:-8].ljust(2**21)))),
    "token in metadata": ("FS004", with_header(lambda h: h.update(__metadata__={"by": "hf_" + "a" * 30}))),
    "code in metadata": ("FS004", with_header(lambda h: h.update(__metadata__={"x": "__import__('os')"}))),
    "long metadata": ("FS004", with_header(lambda h: h.update(__metadata__={"x": "y" * 9999}))),
    "NaN": ("FS005", with_tensors(fill(A, float("nan"), (0, 0)))),
    "infinity": ("FS005", with_tensors(fill(B, float("-inf"), (1, 1)))),
    "beyond float32's sums": ("FS005", with_tensors(fill(B, 1e30, (1, 1)))),
    "foreign file": ("FS006", with_file("todo.txt")),
    "evil pickle": ("FS007", with_file("extra.pkl", EVIL)),
    "evil pickle in an archive": ("FS007", zipped(EVIL)),
    "evil adapter_model.bin": ("FS007", with_file("weights/adapter_model.bin", EVIL)),
    "four bytes": ("FS008", with_bytes(lambda b: b[:4])),
    "no bytes": ("FS008", with_bytes(lambda b: b"")),
    "header beyond the file": ("FS008", with_bytes(lambda b: struct.pack("<Q", 2**40) + b[8:])),
    "header cut off": ("FS008", with_bytes(lambda b: b[:200])),
    "header no JSON": ("FS008", with_bytes(lambda b: raw(b"{" * 50))),
    "header deep": ("FS008", with_bytes(lambda b: raw(b"[" * 100_000))),
    "header no object": ("FS008", with_bytes(lambda b: raw(b"[1, 2]"))),
    "header no text": ("FS008", with_bytes(lambda b: raw(b"\xff\xfe\x00"))),
    "metadata no text": ("FS008", with_header(lambda h: h.update(__metadata__={"n": 3}))),
    "negative offset": ("FS008", with_header(lambda h: h[A].update(data_offsets=[-4, 0]))),
    "field too many": ("FS008", with_header(lambda h: h[A].update(more=1))),
    "data cut off": ("FS009", with_bytes(lambda b: b[:-100])),
    "overlap": ("FS009", with_header(lambda h: h[B].update(data_offsets=h[name_of(1, "lora_B")]["data_offsets"]))),
    "hole": ("FS009", lambda folder: (folder / WEIGHTS).write_bytes(hole(folder))),
    "shape and bytes disagree": ("FS009", with_header(lambda h: h[A].update(shape=[4, 255]))),
    "name twice": ("FS010", lambda folder: (folder / WEIGHTS).write_bytes(doubled(folder))),
    "trailing bytes": ("FS011", with_bytes(lambda b: b + b"secret")),
    "link": ("FS012", lambda folder: (folder / "README.md").symlink_to("/etc/passwd")),
    "linked weights": ("FS012", lambda folder: linked(folder)),
    "linked folder": ("FS012", lambda folder: (folder / "docs").symlink_to("/etc")),
    "pipe": ("FS012", lambda folder: os.mkfifo(folder / "README.md")),
    "Python": ("FS013", with_file("modeling.py", "import os")),
    "program": ("FS013", with_file("helper", b"\x7fELF\x02")),
    "script": ("FS013", with_file("setup", "#!/bin/sh\ntrue")),
    "tokenizer": ("FS014", with_file("tokenizer.json", "{}")),
    "no configuration": ("FS015", lambda folder: (folder / CONFIG).unlink()),
    "configuration no JSON": ("FS015", with_file(CONFIG, "{")),
    "configuration no object": ("FS015", with_file(CONFIG, "[]")),
    "key twice": ("FS015", with_file(CONFIG, json.dumps(config())[:-1] + ', "r": 64}')),
    "no number": ("FS015", with_file(CONFIG, json.dumps(config(lora_alpha=float("inf"))))),
    "configuration of 2 MB": ("FS015", with_file(CONFIG, json.dumps(config(x="y" * 2**21)))),
    "whole model": ("FS016", with_file("model.safetensors", raw({}))),
    "GGUF": ("FS016", with_file("adapter.gguf", "GGUF")),
    "integers": ("FS017", with_tensors(lambda t: t.update({A: torch.ones(RANK, WIDTH, dtype=torch.int8)}))),
    "unknown type": ("FS017", with_header(lambda h: h[A].update(dtype="F7"))),
    "deep folders": ("FS018", with_file("a/b/c/d/e/f/g/h.md")),
    "no weights": ("FS019", lambda folder: (folder / WEIGHTS).unlink()),
    "hostile template": ("FS020", with_file("chat_template.jinja", "{{ ''.__class__.__mro__ }}")),
    "template by filter": ("FS020", with_file("chat_template.jinja", "{{ x|attr('__class__') }}")),
    "head of the base": ("KY001", with_tensors(add("base_model.model.embed_out.weight", 16, WIDTH))),
    "norm": ("KY001", with_tensors(add(f"{INSIDE}.layers.0.input_layernorm.weight", WIDTH))),
    "embeddings": ("KY001", with_tensors(add(f"{INSIDE}.embed_in.weight", 16, WIDTH))),
    "base layer": ("KY001", with_tensors(add(A.replace("lora_A", "base_layer"), WIDTH, WIDTH))),
    "bias of the base": ("KY001", with_tensors(add(f"{INSIDE}.layers.0.attention.dense.bias", WIDTH))),
    "no prefix": ("KY001", with_tensors(add("gpt_neox.layers.0.attention.dense.lora_A.weight", RANK, WIDTH))),
    "head by a short name": (
        "KY003",
        with_tensors(add("base_model.model.embed_out.weight", 9, 9), modules_to_save=["ut"]),
    ),
    "adapter's name": ("KY001", with_tensors(add(A.replace("lora_A", "lora_A.default"), RANK, WIDTH))),
    "A alone": ("KY002", with_tensors(lambda t: t.pop(B))),
    "B alone": ("KY002", with_tensors(lambda t: t.pop(A))),
    "declared embeddings": (
        "KY003",
        with_tensors(add(f"{INSIDE}.embed_in.weight", 16, 9), modules_to_save=["embed_in"]),
    ),
    "declared norm": ("KY009", with_tensors(add(f"{INSIDE}.norm.weight", 16), modules_to_save=["norm"])),
    "not a target": ("KY004", with_config(target_modules=["query_key_value"])),
    "excluded": ("KY004", with_config(exclude_modules=["dense"])),
    "layers left out": ("KY004", with_config(layers_to_transform=[0, 1, 2])),
    "pattern of other modules": ("KY004", with_config(target_modules=r".*\.query_key_value")),
    "magnitude": ("KY005", with_tensors(add(A.replace("lora_A.weight", "lora_magnitude_vector"), WIDTH))),
    "LoRA's bias": ("KY005", with_tensors(add(A.replace("lora_A.weight", "lora_B.bias"), 3 * WIDTH))),
    "tokens": ("KY005", with_tensors(add(f"{INSIDE}.embed_in.trainable_tokens_delta", 2, WIDTH))),
    "a layer too few": ("KY006", with_tensors(lambda t: (t.pop(name_of(2)), t.pop(name_of(2, "lora_B"))))),
    "DoRA promised": ("KY008", with_config(use_dora=True)),
    "head promised": ("KY008", with_config(modules_to_save=["score"])),
    "target without tensors": ("KY010", with_config(target_modules=["query_key_value", "dense", "dense_h_to_4h"])),
    "rank": ("SH001", with_config(r=8, lora_alpha=16)),
    "rank by pattern": ("SH001", with_config(rank_pattern={"layers.0.attention.dense": 2})),
    "empty": ("SH003", with_tensors(lambda t: t.update({A: torch.zeros(0, WIDTH)}))),
    "flat": ("SH003", with_tensors(lambda t: t.update({A: t[A].flatten()}))),
    "no tensors": ("SH003", with_bytes(lambda b: raw({"__metadata__": {"format": "pt"}}))),
    "mixed types": ("SH004", with_tensors(lambda t: t.update({A: t[A].half()}))),
    "foreign library": ("CF001", with_config(auto_mapping={"base_model_class": "X", "parent_library": "evil.module"})),
    "megatron": ("CF001", with_config(megatron_core="evil.core")),
    "auto_map": ("CF001", with_config(auto_map={"AutoModel": "modeling.X"})),
    "alpha": ("CF003", with_config(lora_alpha=1_000_000)),
    "alpha by alternatives": ("CF003", with_config(alpha_pattern={"(layers.1|layers.2).attention.dense": 1e5})),
    "alpha by pattern": ("CF003", with_config(alpha_pattern={"layers.1.attention.dense": 1e5})),
    "PiSSA": ("CF004", with_config(init_lora_weights="pissa")),
    "PiSSA, fast": ("CF004", with_config(init_lora_weights="pissa_niter_4")),
    "OLoRA": ("CF004", with_config(init_lora_weights="olora")),
    "aLoRA": ("CF005", with_config(alora_invocation_tokens=[1, 2])),
    "repeated layers": ("CF005", with_config(layer_replication=[[0, 4], [2, 4]])),
    "tokens' embeddings": (
        "CF005",
        with_tensors(add(f"{INSIDE}.embed_in.trainable_tokens_delta", 2, WIDTH), trainable_token_indices=[3, 4]),
    ),
    "unknown field": ("CF006", with_config(future=True)),
    "rank zero": ("CF008", with_config(r=0)),
    "alpha as text": ("CF008", with_config(lora_alpha="8")),
    "targets as a number": ("CF008", with_config(target_modules=5)),
    "endless pattern": ("CF008", with_config(target_modules="(query_key_value|dense|" + "x?" * 5000 + ")")),
    "no pattern": ("CF008", with_config(alpha_pattern={"(": 8})),
    "switch as text": ("CF008", with_config(use_rslora="yes")),
    "another kind": ("CF010", with_config(peft_type="IA3")),
    "a model of its own": ("CF010", with_config(auto_mapping={"parent_library": "__main__"})),
    "KaSA": ("CF004", with_config(kasa_config={})),
    "random factors": ("CF004", with_config(init_lora_weights=False)),
    "random targets": (
        "KY008",
        with_config(init_lora_weights="orthogonal", target_modules=["query_key_value", "dense", "mlp"]),
    ),
    "MonteCLoRA": ("CF011", with_config(monteclora_config={"x": 1})),
    "escaping pattern": ("CF008", with_config(alpha_pattern={"layers.1)|(zzz": 1e6})),
    "tokens of none": ("CF008", with_config(trainable_token_indices=[])),
    "patterns without end": ("CF008", with_config(alpha_pattern={f"z{i}": 8 for i in range(9000)})),
    "original module": ("KY001", with_tensors(original, modules_to_save=["score"])),
    "foreign bias": ("KY001", with_tensors(add(f"{INSIDE}.final_layer_norm.bias", WIDTH), bias="lora_only")),
    "all biases": ("KY003", with_tensors(add(f"{INSIDE}.final_layer_norm.bias", WIDTH), bias="all")),
    "licence that is a pickle": ("FS007", with_file("LICENSE.pt", EVIL)),
    "pickle in a licence's folder": ("FS007", with_file("LICENSE.d/adapter_model.bin", EVIL)),
    "escaped template": (
        "FS020",
        with_file("tokenizer_config.json", ESCAPED),
    ),
    "template without end": ("FS018", with_file("chat_template.json", '"' + " " * 2**22 + '"')),
    "one direction": ("W002", with_tensors(rank_one)),
    "spike": ("W003", with_tensors(spike)),
    "out of balance": ("W004", with_tensors(lambda t: (scaled(1e7, "lora_B")(t), scaled(1e-7, "lora_A")(t)))),
    "cancelling": ("W004", with_tensors(cancelling)),
    "one module": ("W008", with_tensors(lambda t: t[B].mul_(50))),
    "dead": ("W009", with_tensors(scaled(0.0, "lora_B"))),
    "constant": ("W010", with_tensors(fill(A, 0.05))),
    "repeated": ("W011", with_tensors(lambda t: t.update({A: t[name_of(1)].clone()}))),
    "denormal": ("W012", with_tensors(denormal)),
    "rounded": ("W013", with_tensors(rounded)),
    "few values": ("W013", with_tensors(coarse)),
}


def hole(folder: Path) -> bytes:
    header, data = parts(folder)
    start = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    last = next(n for n, e in header.items() if n != "__metadata__" and e["data_offsets"][1] == start)
    header[last]["data_offsets"] = [offset + 8 for offset in header[last]["data_offsets"]]
    return raw(header, data + b"12345678")


def doubled(folder: Path) -> bytes:
    header, data = parts(folder)
    text = json.dumps(header)[:-1] + f", {json.dumps(A)}: {json.dumps(header[A])}}}"
    return raw(text.encode(), data)


def linked(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")
