"""FedAttacker: the papers' names, our attacks, and none of FedML's defects."""

import inspect

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fedllm_sec import Attack, InputError, attack
from fedllm_sec.fedml import FedAttacker, FedDefender, FedMLAttacker
from fedllm_sec.registry import Entry
from fedllm_sec.victim import Victim
from tests.fedml.models import BUFFERS, args, assert_same, copied, model, sent, updates, vector

BYZANTINE = {"enable_attack": True, "attack_type": "byzantine", "byzantine_client_num": 3, "attack_mode": "zero"}
FLIPPING = {
    "enable_attack": True,
    "attack_type": "label_flipping",
    "original_class_list": [3, 2],
    "target_class_list": [9, 1],
    "ratio_of_poisoned_client": 0.2,
}
REFERENCE = model(0)


def attacker(**keys):
    made = FedAttacker()
    made.init(args(**{**BYZANTINE, **keys}))
    return made


def changed(raw, poisoned):
    """The places whose models are others."""
    return [i for i, ((_, a), (_, b)) in enumerate(zip(raw, poisoned, strict=True)) if a is not b]


def test_code_written_against_the_papers_runs():
    FedMLAttacker._instance = None
    FedMLAttacker.get_instance().init(args(**BYZANTINE))
    theirs = FedMLAttacker.get_instance()
    assert theirs is FedAttacker.get_instance()
    assert theirs.is_attack_enabled()
    assert theirs.is_model_attack()
    assert theirs.is_model_poisoning_attack()
    assert not theirs.is_data_poisoning_attack()
    assert not theirs.is_data_reconstruction_attack()
    assert theirs.get_attack_types() == "byzantine"
    raw = sent(10, REFERENCE)
    poisoned = theirs.attack_model(raw_client_grad_list=raw, extra_auxiliary_info=REFERENCE)
    assert len(changed(raw, poisoned)) == 3
    FedMLAttacker._instance = None


def test_without_an_attack_nothing_is_one():
    for keys in ({"enable_attack": False, "attack_type": "nonsense"}, {}):
        made = FedAttacker()
        made.init(args(**keys))
        assert not made.is_attack_enabled()
        assert not made.is_to_poison_data()
        with pytest.raises(InputError, match="no model poisoning attack is enabled"):
            made.poison_model(sent(3, REFERENCE), REFERENCE)


def test_zero_and_flip_are_what_they_say_of_weights():
    raw = sent(10, REFERENCE)
    for mode, expected in (("zero", lambda w: 0 * w), ("flip", lambda w: 2 * vector(REFERENCE) - w)):
        poisoned = attacker(attack_mode=mode).poison_model(raw, REFERENCE)
        places = changed(raw, poisoned)
        assert len(places) == 3
        for place in places:
            np.testing.assert_allclose(vector(poisoned[place][1]), expected(vector(raw[place][1])), atol=1e-5)
            assert poisoned[place][0] == raw[place][0]


def test_random_lies_between_minus_one_and_one():
    raw = sent(10, REFERENCE)
    poisoned = attacker(attack_mode="random").poison_model(raw, REFERENCE)
    rows = np.stack([vector(poisoned[place][1]) for place in changed(raw, poisoned)])
    assert np.abs(rows).max() <= 1 + 1e-6
    assert rows.std() > 0.4
    assert np.abs(np.corrcoef(rows)).min() < 0.5  # every client has its own


def test_defect_mutation_what_clients_sent_is_left_alone():
    """FedML's attacks write into the victims' own dicts."""
    raw = sent(10, REFERENCE)
    before, reference = copied(raw), copied([(1.0, REFERENCE)])
    for mode in ("zero", "random", "flip"):
        poisoned = attacker(attack_mode=mode).poison_model(raw, REFERENCE)
        for place in changed(raw, poisoned):
            for value in poisoned[place][1].values():
                value.fill_(7)  # nor is what is given back a view of it
    assert_same(raw, before)
    assert_same([(1.0, REFERENCE)], reference)


def test_defect_integers_buffers_keep_value_and_dtype():
    """FedML's attacks turn integer buffers into floats."""
    raw = sent(10, REFERENCE)
    poisoned = attacker(attack_mode="random").poison_model(raw, REFERENCE)
    for place in changed(raw, poisoned):
        for name in BUFFERS:
            assert torch.equal(poisoned[place][1][name], raw[place][1][name])
            assert poisoned[place][1][name].dtype == raw[place][1][name].dtype


def test_defect_unseeded_victims_are_drawn_by_seed_and_round():
    """FedML draws from the global, unseeded generator of `random`."""
    raw = sent(10, REFERENCE)

    def victims(**keys):
        made = attacker(**keys)
        return [changed(raw, made.poison_model(raw, REFERENCE)) for _ in range(20)]

    first = victims()
    assert first == victims()
    assert len({tuple(places) for places in first}) > 5  # drawn anew each round
    assert {place for places in first for place in places} == set(range(10))
    other = FedAttacker()
    other.init({**vars(args(**BYZANTINE)), "random_seed": 1})
    assert [changed(raw, other.poison_model(raw, REFERENCE)) for _ in range(20)] != first


def test_defect_state_lost_the_rounds_go_on_after_another_init():
    """FedML makes a new attacker at each init, and each aggregator and trainer calls it."""
    raw = sent(10, REFERENCE)
    one, two = attacker(), attacker()
    for index in range(10):
        two.init(args(**BYZANTINE))
        two.init(args(**BYZANTINE, model=object(), round_idx=index))
        assert changed(raw, one.poison_model(raw, REFERENCE)) == changed(raw, two.poison_model(raw, REFERENCE))


def test_defect_unknown_attack_types_are_errors():
    """FedML leaves `attacker = None` without a word."""
    with pytest.raises(InputError, match="unknown 'byzantin'; did you mean 'byzantine'"):
        attacker(attack_type="byzantin")


def test_defect_dice_in_predicates_the_coin_falls_once_a_round():
    """FedML throws it at each question, so that one round can be both attacked and not."""
    raw = sent(10, REFERENCE)
    made = attacker(attack_prob=0.5)
    rounds = []
    for _ in range(200):
        assert all(made.is_model_poisoning_attack() for _ in range(5))
        rounds.append(bool(changed(raw, made.poison_model(raw, REFERENCE))))
    assert 70 < sum(rounds) < 130
    assert not any(changed(raw, attacker(attack_prob=0).poison_model(raw, REFERENCE)) for _ in range(3))


def test_defect_no_global_model_is_told():
    """FedML's MPI simulation passes None, and flip crashes there."""
    with pytest.raises(InputError, match="global model's state dict is missing"):
        attacker(attack_mode="flip").poison_model(sent(10, REFERENCE), None)


def test_a_broken_model_among_the_malicious_is_left_for_the_gate():
    raw = sent(3, REFERENCE)
    raw[1][1]["scale"] = torch.tensor(float("nan"))
    made = FedAttacker()
    made.init({**BYZANTINE, "client_num_per_round": 3})
    poisoned = made.poison_model(raw, REFERENCE)
    assert changed(raw, poisoned) == [0, 2]


def test_more_malicious_clients_than_there_are_is_told():
    made = FedAttacker()
    made.init({**BYZANTINE, "byzantine_client_num": 4})
    with pytest.raises(InputError, match="4 malicious clients, but the round has 3"):
        made.poison_model(sent(3, REFERENCE), REFERENCE)
    with pytest.raises(InputError, match="args must hold"):
        made.init(7)


@pytest.fixture
def flipping(monkeypatch):
    """A label flipping attack, whether the registry has one or not."""

    def flip_labels(*, source: list[int], target: list[int]) -> Attack:
        mapping = dict(zip(source, target, strict=True))
        return Attack(poison_data=lambda data, threat: [(x, mapping.get(y, y)) for x, y in data])

    list(attack)  # plug-ins first
    monkeypatch.setitem(attack._entries, "label_flipping", Entry("label_flipping", flip_labels, "arXiv:2007.08432"))
    return FLIPPING


def test_data_is_poisoned_and_the_clean_data_left_alone(flipping):
    made = FedAttacker()
    made.init(args(**flipping))
    data = [("a", 3), ("b", 2), ("c", 1), ("d", 9)]
    assert made.is_data_poisoning_attack()
    assert not made.is_model_poisoning_attack()
    assert made.poison_data(data) == [("a", 9), ("b", 1), ("c", 1), ("d", 9)]
    assert data == [("a", 3), ("b", 2), ("c", 1), ("d", 9)]


def test_data_loaders_data_sets_and_lists_of_batches_keep_their_form():
    """By the attack of the registry. FedML makes floats of labels."""
    made = FedAttacker()
    made.init(args(**{**FLIPPING, "target_class_list": [2, 1]}))  # 3 -> 2 and 2 -> 1, at once
    x, y = torch.randn(10, 4), torch.arange(10)
    expected = torch.tensor([0, 1, 1, 2, 4, 5, 6, 7, 8, 9])
    for shuffle in (False, True):
        loader = made.poison_data(DataLoader(TensorDataset(x, y), batch_size=3, shuffle=shuffle))
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [3, 3, 3, 1]
        found, labels = torch.cat([batch for batch, _ in batches]), torch.cat([labels for _, labels in batches])
        assert labels.dtype == torch.int64
        order = torch.cdist(found, x).argmin(dim=1)
        assert torch.equal(labels, expected[order])
        assert sorted(order.tolist()) == list(range(10))
        assert torch.equal(order, torch.arange(10)) == (not shuffle)
    data = made.poison_data(TensorDataset(x, y))
    assert [int(label) for _, label in data] == expected.tolist()
    batches = made.poison_data([(x[:7], y[:7].float()), (x[7:], y[7:].float())])
    assert [(tuple(a.shape), b.tolist()) for a, b in batches] == [((7, 4), [0, 1, 1, 2, 4, 5, 6]), ((3, 4), [7, 8, 9])]
    assert all(labels.dtype == torch.int64 for _, labels in batches)
    assert y.tolist() == list(range(10))
    with pytest.raises(InputError, match=r"no pairs \(x, y\)"):
        made.poison_data(TensorDataset(x))


def test_defect_common_coin_each_round_has_its_share_of_poisoned_clients(flipping):
    """FedML's client processes all throw the same coin: 0 of 10 poisoned clients, or 10 of 10."""
    processes = []
    for rank in range(1, 11):
        made = FedAttacker()
        made.init(args(**flipping, rank=rank))
        processes.append(made)
    rounds = [[made.is_to_poison_data() for made in processes] for _ in range(30)]
    assert [sum(poisoned) for poisoned in rounds] == [2] * 30
    assert len({tuple(poisoned) for poisoned in rounds}) > 10

    alone = FedAttacker()  # one process stands for all clients
    alone.init(args(**flipping))
    assert [[alone.is_to_poison_data() for _ in range(10)] for _ in range(30)] == rounds


def test_without_the_number_of_clients_nobody_can_be_drawn(flipping):
    with pytest.raises(InputError, match="client_num_per_round is missing"):
        FedAttacker().init(flipping)


def test_what_is_reconstructed_is_given_back(monkeypatch):
    """FedML throws it away."""

    def dlg() -> Attack:
        return Attack(reconstruct_data=lambda updates, threat: (updates.clients, threat.round.index, threat.victim))

    list(attack)
    monkeypatch.setitem(attack._entries, "dlg", Entry("dlg", dlg, "arXiv:1906.08935"))
    made = FedAttacker()
    made.init(args(enable_attack=True, attack_type="dlg"))
    assert made.is_data_reconstruction_attack()
    raw = sent(2, REFERENCE)
    assert made.reconstruct_data(raw, REFERENCE) == (("client_0", "client_1"), 1, None)
    victim = Victim(learning_rate=0.5, steps=3)
    assert made.reconstruct_data(raw, REFERENCE, clients=["ann", "bob"], victim=victim) == (("ann", "bob"), 2, victim)
    assert updates(raw, REFERENCE).shape == (2, 37)


SIGNATURES = {
    FedAttacker: {
        "init": ["args"],
        "is_attack_enabled": [],
        "get_attack_types": [],
        "is_model_attack": [],
        "is_model_poisoning_attack": [],
        "attack_model": ["raw_client_grad_list", "extra_auxiliary_info"],
        "poison_model": ["raw_client_grad_list", "extra_auxiliary_info"],
        "is_data_poisoning_attack": [],
        "is_to_poison_data": [],
        "poison_data": ["dataset"],
        "is_data_reconstruction_attack": [],
        "reconstruct_data": ["raw_client_grad_list", "extra_auxiliary_info"],
    },
    FedDefender: {
        "init": ["args"],
        "is_defense_enabled": [],
        "defend": ["raw_client_grad_list", "base_aggregation_func", "extra_auxiliary_info"],
        "is_defense_before_aggregation": [],
        "is_defense_on_aggregation": [],
        "is_defense_after_aggregation": [],
        "defend_before_aggregation": ["raw_client_grad_list", "extra_auxiliary_info"],
        "defend_on_aggregation": ["raw_client_grad_list", "base_aggregation_func", "extra_auxiliary_info"],
        "defend_after_aggregation": ["global_model"],
        "get_malicious_client_idxs": [],
        "get_benign_client_idxs": ["client_idxs"],
    },
}


@pytest.mark.parametrize("skin", SIGNATURES)
def test_the_papers_methods_are_there_under_their_arguments_names(skin):
    """FedML calls by keyword."""
    for name, wanted in SIGNATURES[skin].items():
        given = list(inspect.signature(getattr(skin(), name)).parameters)
        assert given[: len(wanted)] == wanted, name
        assert given[len(wanted) :] in ([], ["clients"], ["clients", "victim"])
