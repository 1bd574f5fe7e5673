"""Mutated adapter folders: none crashes, hangs or is loaded half; each ends with findings or a clean pass."""

import json
import random
import resource
import shutil
import struct
import time

import pytest

from fedllm_sec.audit import audit_adapters
from tests.audit.corpus import CONFIG, WEIGHTS, config, state, write

SECONDS = 5.0  # for one folder of 200 kB, on a busy machine
NASTY = ["null", "-1", "1e999", '"x"', "[]", "{}", "true", "9" * 400, '"' + "\\u0000" * 50 + '"', "[[[[[]]]]]"]


def flip(data, draw):
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def flip_header(data, draw):
    (length,) = struct.unpack("<Q", data[:8])
    return flip(data[: 8 + length], draw) + data[8 + length :]


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def paste(data, draw):
    at, other = draw.randrange(len(data)), draw.randrange(len(data))
    return data[:at] + data[other : other + draw.randrange(200)] + data[at:]


def length(data, draw):
    return (
        struct.pack("<Q", draw.choice([0, 1, 7, 2**20 + 1, 2**31, 2**63, 2**64 - 1, draw.randrange(5000)])) + data[8:]
    )


def rewrite(data, draw):
    """One field of one tensor of the header becomes something else."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = draw.choice([key for key in header if key != "__metadata__"])
    field = draw.choice(["dtype", "shape", "data_offsets", "name", "all"])
    text = json.dumps(header)
    if field == "name":
        new = draw.choice(
            ["", "lm_head.weight", "a" * 10_000, "\x00", "../../x", name + "x", "\ud800", "base_model.model."]
        )
        header[new] = header.pop(name)
        text = json.dumps(header)
    elif field == "all":
        text = text.replace(json.dumps(header[name]), draw.choice(NASTY), 1)
    else:
        text = text.replace(json.dumps(header[name][field]), draw.choice(NASTY), 1)
    return struct.pack("<Q", len(text)) + text.encode() + data[8 + size :]


def nasty_config(data, draw):
    fields = json.loads(data)
    text = json.dumps(fields)
    key = draw.choice(list(fields))
    return text.replace(
        f"{json.dumps(key)}: {json.dumps(fields[key])}", f"{json.dumps(key)}: {draw.choice(NASTY)}"
    ).encode()


OF_WEIGHTS = (flip, flip_header, flip_header, cut, paste, length, rewrite, rewrite, rewrite)
OF_CONFIG = (flip, cut, paste, nasty_config, nasty_config, nasty_config)


def mutate(folder, draw):
    for name, ways in ((WEIGHTS, OF_WEIGHTS), (CONFIG, OF_CONFIG)):
        if draw.random() < 0.7:
            path = folder / name
            path.write_bytes(draw.choice(ways)(path.read_bytes(), draw))
    if draw.random() < 0.1:
        shutil.copy(folder / draw.choice([WEIGHTS, CONFIG]), folder / draw.choice(["x.pt", "x.json", "y.bin", "z.npz"]))


def check(tmp_path, seeds):
    good = write(tmp_path / "good", state(1), config())
    assert audit_adapters([good]).exit_code == 0
    before, kinds, slowest = peak(), {}, 0.0
    for seed in seeds:
        folder = tmp_path / f"mutant_{seed}"
        shutil.copytree(good, folder)
        mutate(folder, random.Random(seed))
        began = time.perf_counter()
        audit = audit_adapters([folder], reference=good if seed % 2 else None)
        slowest = max(slowest, time.perf_counter() - began)
        assert slowest < SECONDS, seed
        assert audit.exit_code in (0, 1)
        assert all(finding.message for finding in audit.findings)
        for finding in audit.findings:
            kinds[finding.rule.id] = kinds.get(finding.rule.id, 0) + 1
        shutil.rmtree(folder)
    assert peak() - before < 200 * 2**20
    return kinds, slowest


def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_mutants_end_with_findings_or_pass(tmp_path):
    kinds, _ = check(tmp_path, range(500))
    assert len(kinds) > 12


@pytest.mark.slow
def test_ten_thousand_mutants(tmp_path):
    kinds, slowest = check(tmp_path, range(1000, 11_000))
    print(kinds, f"slowest {slowest:.2f} s")
    assert len(kinds) > 20
