"""Every defect is told by one finding, and good adapters by none."""

import hashlib
import json

import pytest
import torch

from fedllm_sec.audit import RULES, Policy, audit_adapters, make_bank
from fedllm_sec.updates.errors import InputError
from tests.audit import corpus
from tests.audit.corpus import (
    WEIGHTS,
    A,
    B,
    config,
    name_of,
    state,
    with_config,
    with_file,
    with_tensors,
    write,
)

GLOBAL = state(99)
SIZE = 0.004  # of an honest update, beside factors of 0.06 and 0.02


def told(audit):
    return [finding.rule.id for finding in audit.findings]


@pytest.mark.parametrize("name", corpus.ALONE)
def test_a_defect_is_one_finding(tmp_path, name):
    rule, damage = corpus.ALONE[name]
    folder = write(tmp_path / "client")
    damage(folder)
    audit = audit_adapters([folder])
    assert told(audit) == [rule], [f.message for f in audit.findings]
    assert audit.exit_code == (RULES[rule].severity >= audit.fail_on)
    assert audit.findings[0].message


OF_GLOBAL = {
    "a module less": ("KY006", with_tensors(lambda t: [t.pop(name_of(3, part)) for part in ("lora_A", "lora_B")])),
    "a module more": (
        "KY007",
        lambda folder: write_into(folder, state(1, layers=corpus.LAYERS + 1)),
    ),
    "another shape": (
        "SH002",
        with_tensors(lambda t: t.update({B: torch.randn(9, corpus.RANK, generator=torch.Generator().manual_seed(1))})),
    ),
    "half precision": ("SH004", lambda folder: write_into(folder, {k: v.half() for k, v in state(1).items()})),
    "another alpha": ("CF007", with_config(lora_alpha=16)),
    "another rank": ("CF007", lambda folder: write_into(folder, state(1, rank=8), r=8)),
    "rsLoRA": ("CF007", with_config(use_rslora=True)),
    "the global adapter": ("W014", lambda folder: write_into(folder, GLOBAL)),
    "scaled factors": ("W004", lambda folder: write_into(folder, regauged(10.0))),
    "reversed factors": ("W004", lambda folder: write_into(folder, regauged(30.0))),
}


def write_into(folder, tensors, **settings):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    write(folder, tensors, config(**settings))


def regauged(c):
    update = state(1, about=GLOBAL, size=0.002)
    return {name: value / c if "lora_A" in name else value * c for name, value in update.items()}


@pytest.mark.parametrize("name", OF_GLOBAL)
def test_a_departure_from_the_global_adapter_is_one_finding(tmp_path, name):
    rule, damage = OF_GLOBAL[name]
    server = write(tmp_path / "server", GLOBAL)
    folder = write(tmp_path / "client", state(1, about=GLOBAL))
    assert told(audit_adapters([folder], reference=server)) == []
    damage(folder)
    audit = audit_adapters([folder], reference=server)
    assert told(audit) == [rule], [f.message for f in audit.findings]


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


OF_POLICY = {
    "base": ("CF002", {"base_model": "org/other"}),
    "revision": ("CF002", {"base_model": "org/base", "revision": "abc"}),
    "no revision": ("CF002", {"require_revision": True}),
    "too long": ("W001", {"thresholds": {"norm": 1e-3}}),
    "known bad": ("L001", {"known_bad": ["WEIGHTS"]}),
    "not as agreed": ("L002", {"manifest": {"client": "0" * 64}}),
    "hash of the base": ("CF009", {"base_sha256": "0" * 64}),
}


@pytest.mark.parametrize("name", OF_POLICY)
def test_what_the_policy_asks_for_is_looked_at(tmp_path, name):
    rule, fields = OF_POLICY[name]
    folder = write(tmp_path / "client")
    (folder / "client.json").write_text(json.dumps({"base_sha256": "1" * 64}))
    text = json.dumps(fields).replace("WEIGHTS", sha(folder / WEIGHTS))
    assert told(audit_adapters([folder], policy=Policy.model_validate_json(text))) == [rule]
    assert told(audit_adapters([folder])) == []


def group(tmp_path, n=10, mean=1.0, seed=0):
    """Updates that share a direction, as honest ones do."""
    shared = state(1000 + seed)
    found = []
    for i in range(n):
        own = state(seed + i)
        found.append(
            {k: GLOBAL[k] + mean * SIZE * shared[k] / shared[k].std() + SIZE * own[k] / own[k].std() for k in own}
        )
    return found


def update_of(states, row):
    return {k: states[row][k] - GLOBAL[k] for k in GLOBAL}


def plus(update, factor):
    return {k: GLOBAL[k] + factor * update[k] for k in GLOBAL}


def mean_of(states, but):
    return {k: torch.stack([s[k] - GLOBAL[k] for i, s in enumerate(states) if i != but]).mean(0) for k in GLOBAL}


def near(states, row, of):
    states[row] = {k: states[of][k] + 2e-5 * torch.randn_like(states[of][k]) for k in GLOBAL}


BESIDE = {
    "huge": ({3}, {"P003"}, lambda s: s.__setitem__(3, plus(update_of(s, 3), 10))),
    "tiny": ({3}, {"P003"}, lambda s: s.__setitem__(3, plus(update_of(s, 3), 0.02))),
    "copy": ({3, 5}, {"P002"}, lambda s: s.__setitem__(3, dict(s[5]))),
    "nearly a copy": ({3, 5}, {"P002"}, lambda s: near(s, 3, 5)),
    "reversed mean": ({3}, {"P008"}, lambda s: s.__setitem__(3, plus(mean_of(s, 3), -1.3))),
    "random": (
        {3},
        {"P001", "P005", "P006", "P007"},
        lambda s: s.__setitem__(3, {k: GLOBAL[k] + 1.4 * SIZE * v / v.std() for k, v in state(77).items()}),
    ),
    "NaN": ({3}, {"FS005"}, lambda s: s[3][A].__setitem__((0, 0), float("nan"))),
}


@pytest.mark.parametrize("name", BESIDE)
def test_one_that_is_unlike_the_others_is_told(tmp_path, name):
    who, rules, damage = BESIDE[name]
    server, states = write(tmp_path / "server", GLOBAL), group(tmp_path)
    damage(states)
    folders = [write(tmp_path / f"client_{i}", each) for i, each in enumerate(states)]
    audit = audit_adapters(folders, reference=server)
    assert {f.adapter for f in audit.findings} == {f"client_{i}" for i in who}, [f.message for f in audit.findings]
    assert {f.rule.id for f in audit.findings} <= rules
    assert len(audit.findings) == len(who)


@pytest.mark.parametrize("seed", range(5))
def test_honest_ones_pass_and_order_does_not_matter(tmp_path, seed):
    server, states = write(tmp_path / "server", GLOBAL), group(tmp_path, seed=20 * seed)
    folders = [write(tmp_path / f"client_{i}", each) for i, each in enumerate(states)]
    audit, other = audit_adapters(folders, reference=server), audit_adapters(folders[::-1], reference=server)
    assert told(audit) == told(other) == []
    for name, values in audit.statistics.scores.items():
        assert values == pytest.approx(other.statistics.scores[name][::-1], rel=1e-6, nan_ok=True)


def test_colluders_stand_out_together(tmp_path):
    server, states = write(tmp_path / "server", GLOBAL), group(tmp_path, n=12, mean=0.5)
    for row, seed in ((2, 300), (7, 301)):
        evil, own = state(555), state(seed)
        states[row] = {
            k: GLOBAL[k] + 1.1 * SIZE * evil[k] / evil[k].std() + 0.15 * SIZE * own[k] / own[k].std() for k in GLOBAL
        }
    folders = [write(tmp_path / f"client_{i}", each) for i, each in enumerate(states)]
    found = {(f.adapter, f.rule.id) for f in audit_adapters(folders, reference=server).findings}
    assert {("client_2", "P004"), ("client_7", "P004")} <= found
    assert {adapter for adapter, _ in found} == {"client_2", "client_7"}


def test_too_few_for_z_scores_are_told_so(tmp_path):
    server, states = write(tmp_path / "server", GLOBAL), group(tmp_path, n=5)
    states[2] = plus(update_of(states, 2), 100)
    folders = [write(tmp_path / f"client_{i}", each) for i, each in enumerate(states)]
    audit = audit_adapters(folders, reference=server)
    assert told(audit) == []
    assert any("no z-scores" in note for note in audit.notes)
    assert not audit.statistics.z


def test_a_turn_away_from_earlier_rounds_is_told(tmp_path):
    server, history = write(tmp_path / "global_0001", GLOBAL), tmp_path / "arm"
    write(history / "global_0000", GLOBAL)
    first, second = group(tmp_path), group(tmp_path, mean=0.0, seed=500)
    habits = [update_of(second, i) for i in range(10)]  # what is each client's own
    for i in range(10):
        write(history / "round_0001" / f"client_{i}", {k: first[i][k] + habits[i][k] for k in GLOBAL})
    now = [{k: first[i][k] + habits[i][k] + 0.1 * (habits[i - 1][k]) for k in GLOBAL} for i in range(10)]
    now[4] = {k: first[4][k] + habits[9][k] - 2 * habits[4][k] for k in GLOBAL}
    folders = [write(tmp_path / f"client_{i}", each) for i, each in enumerate(now)]
    audit = audit_adapters(folders, reference=server, history=history)
    assert [(f.adapter, f.rule.id) for f in audit.findings if f.rule.id == "P009"] == [("client_4", "P009")]
    assert {f.adapter for f in audit.findings} == {"client_4"}
    with pytest.raises(InputError, match="no such folder"):
        audit_adapters(folders, reference=server, history=tmp_path / "nowhere")


def test_a_bank_of_trusted_adapters_tells_what_is_unlike_them(tmp_path):
    trusted = [write(tmp_path / f"trusted_{i}", state(i)) for i in range(10)]
    bank = make_bank(trusted)
    bank.save(tmp_path / "bank.json")
    same, other = write(tmp_path / "same", state(50)), write(tmp_path / "other", state(51, size=0.2))
    for how in ({"bank": tmp_path / "bank.json"}, {"trusted": trusted}):
        audit = audit_adapters([same, other], **how)
        assert [(f.adapter, f.rule.id) for f in audit.findings] == [("other", "W007")]
    with pytest.raises(InputError, match="not both"):
        audit_adapters([same], bank=bank, trusted=trusted)
    few = audit_adapters([other], trusted=trusted[:5])
    assert told(few) == []
    assert any("baseline is of 5" in note for note in few.notes)
    (tmp_path / "bank.json").write_text("{}")
    with pytest.raises(InputError, match="no baseline"):
        audit_adapters([other], bank=tmp_path / "bank.json")
    with_file("x.pt", corpus.PICKLE)(trusted[0])
    with pytest.raises(InputError, match=r"trusted_0.*FS001"):
        make_bank(trusted)


def test_what_may_pass_for_a_reason_passes_and_says_so(tmp_path):
    folder = write(tmp_path / "client")
    with_file("optimizer.pt", corpus.PICKLE)(folder)
    rule = {"rule": "FS001", "adapter": "cli*", "place": "*.pt", "reason": "our own trainer's"}
    audit = audit_adapters([folder], policy=Policy.model_validate({"suppress": [rule]}))
    assert told(audit) == ["FS001"]
    assert audit.findings[0].suppressed == "our own trainer's"
    assert audit.exit_code == 0
    for other in ({"adapter": "x*"}, {"place": "*.bin"}, {"until": "2020-01-01"}, {"rule": "FS002"}):
        assert audit_adapters([folder], policy=Policy.model_validate({"suppress": [rule | other]})).exit_code == 1
    with pytest.raises(ValueError, match="reason"):
        Policy.model_validate({"suppress": [{"rule": "FS001"}]})
    with pytest.raises(ValueError, match="no rule"):
        Policy.model_validate({"suppress": [rule | {"rule": "FS999"}]})


def test_the_corpus_is_large_enough():
    assert len(corpus.ALONE) + len(OF_GLOBAL) + len(OF_POLICY) + len(BESIDE) >= 60
    rules = {rule for rule, _ in (*corpus.ALONE.values(), *OF_GLOBAL.values(), *OF_POLICY.values())}
    beside = {"P001", "P002", "P003", "P004", "P005", "P006", "P007", "P008", "P009", "W007"}
    elsewhere = {"FS021", "W005", "B001", "B002", "R001"}  # those need a base: test_base.py
    assert rules | beside | elsewhere == RULES.keys()
