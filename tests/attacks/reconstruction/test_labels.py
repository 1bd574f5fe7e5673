"""Labels from the last layer: which by the span of its gradient, how many by its bias, and when they are certain."""

import numpy as np
import pytest
import torch
from torch import nn

from fedllm_sec import InputError, attack
from fedllm_sec.attacks.reconstruction.counts import class_counts, rounded
from fedllm_sec.attacks.reconstruction.labels import labels_of
from fedllm_sec.attacks.reconstruction.last_layer import Head, head_name, label_of_one
from fedllm_sec.attacks.reconstruction.span import REVEALED, margin, span_of
from fedllm_sec.updates import stack_updates
from fedllm_sec.updates.layout import Layout
from fedllm_sec.victim import Victim
from tests.attacks.reconstruction.small_clients import (
    gradient_row,
    looked,
    noise_row,
    perceptron,
    threat_on,
    trained_row,
    victim_on,
    weights_of,
)
from tests.oracles import naive_reconstruction as naive

NAME = "revealing_labels"
SHAPE = (1, 8, 8)


class Batch:
    """A head with what it is given, in numpy: softmax regression on non-negative features, of small logits."""

    def __init__(self, classes, features, n, seed, distinct=False, scale=0.1, bias=True):
        rng = np.random.default_rng(seed)
        self.weight = scale * rng.normal(size=(classes, features)) / features**0.5
        self.bias = 0.1 * scale * rng.normal(size=classes) * bias
        self.z = np.maximum(rng.normal(size=(n, features)), 0)
        self.y = rng.permutation(classes)[:n] if distinct else rng.integers(classes, size=n)
        self.slopes = naive.regression_gradient(self.weight, self.bias, self.z, self.y)
        self.p = naive.softmax(self.z @ self.weight.T + self.bias)
        self.with_bias = bias

    def head(self):
        """As float32 tells it."""
        weight, bias = (torch.tensor(part, dtype=torch.float32).double() for part in self.slopes)
        received, offset = torch.tensor(self.weight), torch.tensor(self.bias)
        return Head("head", weight, bias if self.with_bias else None, received, offset if self.with_bias else None, 1.0)

    @property
    def present(self):
        return tuple(sorted(set(self.y.tolist())))

    @property
    def counts(self):
        return tuple(np.bincount(self.y, minlength=len(self.weight)).tolist())


REGIME = [(100, 64, n, False) for n in (5, 20, 40, 60, 80)] + [(20, 64, n, True) for n in (2, 8, 14)]


@pytest.mark.parametrize(("classes", "features", "n", "distinct"), REGIME)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bias", [True, False])
def test_the_set_of_labels_is_exact_in_the_sound_regime(classes, features, n, distinct, seed, bias):
    batch = Batch(classes, features, n, seed, distinct, bias=bias)
    found = labels_of(batch.head(), n, Victim(batch_size=n))
    assert found.present == batch.present
    assert found.certain == (n < features)  # of 80 the rank is full: found, and not vouched for
    if n < features:
        assert found.certificate > 0.99
    else:
        assert found.certificate == 0
        assert "the rank is all that the layer allows" in found.why


@pytest.mark.parametrize("n", [3, 10, 14])
@pytest.mark.parametrize("seed", range(3))
def test_the_linear_programs_agree_with_non_negative_least_squares(n, seed):
    batch = Batch(20, 64, n, seed)
    whole = np.column_stack(batch.slopes)
    space = span_of(batch.head(), n, Victim(batch_size=n))
    rank = np.linalg.matrix_rank(whole)
    assert space.basis.shape[1] == rank
    by_programs = {c for c in range(20) if margin(space, c) > REVEALED}
    assert by_programs == naive.revealed(whole, rank) == set(batch.present)


def test_a_class_that_is_there_reaches_its_margin_and_another_none():
    batch = Batch(50, 64, 20, 0)
    space = span_of(batch.head(), 20, Victim(batch_size=20))
    margins = [margin(space, c) for c in range(50)]
    assert min(margins[c] for c in batch.present) > 2 * REVEALED
    assert max(margins[c] for c in range(50) if c not in batch.present) < 1e-3


@pytest.mark.parametrize(("classes", "n"), [(20, 16), (20, 32), (10, 40), (3, 9)])
def test_beyond_it_the_span_is_not_believed(classes, n):
    batch = Batch(classes, 64, n, 1)
    found = labels_of(batch.head(), n, Victim(batch_size=n))
    assert "too high to tell" in found.why
    assert found.present == batch.present
    if found.certain:
        assert found.counts == batch.counts


def test_the_linear_program_alone_would_be_wrong_there():
    """The measured bound: with 32 examples of 20 classes, absent ones have a vector of their own."""
    wrong = 0
    for seed in range(5):
        batch = Batch(20, 64, 32, seed)
        space = span_of(batch.head(), 32, Victim(batch_size=32))
        wrong += sum(margin(space, c) > REVEALED for c in range(20) if c not in batch.present)
    assert wrong > 5


@pytest.mark.parametrize(("classes", "n"), [(10, 8), (10, 32), (20, 32), (20, 64), (100, 20)])
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_exact_where_logits_are_small(classes, n, seed):
    batch = Batch(classes, 64, n, seed)
    np.testing.assert_allclose(naive.counts(batch.p, batch.slopes[1]), batch.counts, atol=1e-9)
    found = labels_of(batch.head(), n, Victim(batch_size=n))
    assert found.counts == batch.counts


def test_counts_of_a_head_that_knows_its_examples_are_not_vouched_for():
    batch = Batch(10, 64, 32, 0, scale=10.0)
    found = labels_of(batch.head(), 32, Victim(batch_size=32))
    assert not found.certain
    counts = class_counts(batch.head(), 32)
    assert not counts.certain
    assert sum(counts.each) == 32


def test_counts_without_a_bias_need_a_class_that_is_absent():
    batch = Batch(20, 64, 8, 0, bias=False)
    found = labels_of(batch.head(), 8, Victim(batch_size=8))
    assert found.present == batch.present
    assert found.counts == batch.counts
    assert class_counts(batch.head(), 8) is None
    crowded = Batch(5, 64, 20, 0, bias=False)
    assert labels_of(crowded.head(), 20, Victim(batch_size=20)).counts is None


@pytest.mark.parametrize(
    ("estimate", "total", "least", "most", "wanted"),
    [
        ([1.1, 1.9, 0.0], 3, 0, 3, (1, 2, 0)),
        ([1.5, 1.4, 0.1], 3, 0, 3, (2, 1, 0)),
        ([-0.6, 2.0, 1.9], 3, 0, 3, (0, 2, 1)),
        ([0.2, 0.2, 2.6], 3, 1, 3, (1, 1, 1)),
        ([5.0, 0.0, 0.0], 3, 0, 2, (2, 1, 0)),
    ],
)
def test_counts_are_rounded_within_bounds_to_their_total(estimate, total, least, most, wanted):
    bounds = [torch.full((3,), bound, dtype=torch.int64) for bound in (least, most)]
    assert rounded(torch.tensor(estimate), total, *bounds) == wanted


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("bias", [True, False])
def test_the_label_of_one_example(classes, bias):
    for seed in range(10):
        batch = Batch(classes, 16, 1, seed, scale=1.0, bias=bias)
        assert (label_of_one(batch.head()),) == batch.present
        if bias:
            found = labels_of(batch.head(), 1, Victim())
            assert found.certain
            assert found.counts == batch.counts


def client(classes, n, seed=0, **known):
    generator = torch.Generator().manual_seed(seed)
    net = perceptron(seed, hidden=64, classes=classes, **known)
    return net, torch.rand(n, *SHAPE, generator=generator), torch.randint(classes, (n,), generator=generator)


CLIENTS = [(100, 5), (100, 12), (20, 8), (20, 13), (10, 5), (10, 24)]


@pytest.mark.parametrize(("classes", "n"), CLIENTS)
def test_a_true_gradient_of_a_small_model(classes, n):
    net, x, y = client(classes, n)
    found = looked(NAME, net, gradient_row(net, x, y), victim_on(net, SHAPE, classes, batch_size=n))
    assert found.present == tuple(sorted(set(y.tolist())))
    assert found.counts == tuple(y.bincount(minlength=classes).tolist())
    assert found.certain == (n < 24)  # of so many the rank is too high
    assert (found.client, found.method) == ("client_0", NAME)


@pytest.mark.parametrize(("classes", "n"), CLIENTS)
@pytest.mark.parametrize(
    "known",
    [
        {"learning_rate": 0.1},
        {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.1},
        {"learning_rate": 0.05, "steps": 3},
        {"learning_rate": 0.05, "steps": 3, "momentum": 0.5, "weight_decay": 0.1},
    ],
    ids=["a step", "a decayed step", "three steps", "three decayed steps"],
)
def test_what_the_real_trainer_sends(classes, n, known):
    net, x, y = client(classes, n)
    victim = victim_on(net, SHAPE, classes, batch_size=n, **known)
    found = looked(NAME, net, trained_row(net, x, y, victim), victim)
    assert found.present == tuple(sorted(set(y.tolist())))
    assert sum(found.counts) == n * victim.steps
    if found.certain and "all counts" in found.why:  # an example counts in each epoch
        assert found.counts == tuple((victim.steps * y.bincount(minlength=classes)).tolist())


def test_fresh_batches_in_each_step():
    net, x, y = client(100, 24, seed=2)
    victim = victim_on(net, SHAPE, 100, batch_size=6, steps=4, learning_rate=0.05)
    found = looked(NAME, net, trained_row(net, x, y, victim), victim, samples=24)
    assert found.present == tuple(sorted(set(y.tolist())))
    assert sum(found.counts) == 24


def test_steps_raise_the_rank_and_the_certificate_tells_how_far():
    """Each step adds directions as small as the model moves; signs stay, and the n strongest tell the classes."""
    net, x, y = client(50, 8, seed=1)
    before = 1.0
    for rate in (0.01, 0.1, 1.0):
        victim = victim_on(net, SHAPE, 50, batch_size=8, steps=4, learning_rate=rate)
        row = trained_row(net, x, y, victim)
        whole = torch.cat([row["5.weight"], row["5.bias"][:, None]], dim=1).double()
        values = torch.linalg.svdvals(whole)
        assert int((values > 1e-6 * values[0]).sum()) > 8
        found = looked(NAME, net, row, victim)
        assert found.present == tuple(sorted(set(y.tolist())))
        assert found.certificate <= before + 1e-6
        before = found.certificate


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("steps", [1, 5])
def test_adam_is_a_guess(optimizer, bias, steps):
    net, x, y = client(50, 6, seed=3, bias=bias)
    victim = victim_on(
        net, SHAPE, 50, batch_size=6, steps=steps, learning_rate=1e-3, optimizer=optimizer, weight_decay=0.01
    )
    found = looked(NAME, net, trained_row(net, x, y, victim), victim)
    assert (found.certain, found.certificate, found.counts) == (False, 0.0, None)
    assert found.why == f"a guess: of steps of {optimizer} only signs are read"
    assert found.present == tuple(sorted(set(y.tolist())))


@pytest.mark.parametrize(("classes", "n"), [(100, 1), (100, 20), (10, 4), (10, 32), (3, 8)])
def test_noise_is_not_vouched_for(classes, n):
    net, _, _ = client(classes, n)
    for seed in range(5):
        found = looked(NAME, net, noise_row(net, seed), victim_on(net, SHAPE, classes, batch_size=n))
        assert not found.certain
        assert found.certificate < 0.5
        assert "do not add up to zero" in found.why


def test_a_little_noise_lowers_the_certificate_and_much_ends_it():
    net, x, y = client(50, 10, seed=1)
    row, noise = gradient_row(net, x, y), noise_row(net, 3, 1.0)
    certificates = []
    for part in (0.0, 0.01, 0.1, 1.0):
        noisy = {name: row[name] + part * row[name].norm() / noise[name].norm() * noise[name] for name in row}
        certificates.append(looked(NAME, net, noisy, victim_on(net, SHAPE, 50, batch_size=10)).certificate)
    assert certificates == sorted(certificates, reverse=True)
    assert certificates[0] > 0.99
    assert certificates[-1] < 0.3


def test_examples_that_are_alike_leave_a_lower_rank_and_are_not_vouched_for():
    net, x, y = client(50, 3, seed=1)
    x, y = x[[0, 0, 1, 2]], y[[0, 0, 1, 2]]
    found = looked(NAME, net, gradient_row(net, x, y), victim_on(net, SHAPE, 50, batch_size=4))
    assert found.present == tuple(sorted(set(y.tolist())))
    assert not found.certain
    assert "4 examples left a rank of 3" in found.why


def test_more_classes_than_examples_are_claimed():
    net, x, y = client(50, 6, seed=1)
    found = looked(NAME, net, gradient_row(net, x, y), victim_on(net, SHAPE, 50, batch_size=2))
    assert not found.certain


def test_an_update_of_zero_tells_nothing():
    net, _, _ = client(10, 2)
    row = {name: 0 * value for name, value in weights_of(net).items()}
    found = looked(NAME, net, row, victim_on(net, SHAPE, batch_size=2))
    assert (found.certificate, found.certain, found.present, found.counts) == (0.0, False, (), None)


PEFT = "base_model.model"


@pytest.mark.parametrize(
    ("head", "bias"), [("classifier", True), ("score", False), ("classifier.out_proj", True)], ids=str
)
def test_the_head_of_an_adapter_is_found_among_loras_tensors(head, bias):
    batch = Batch(30, 16, 6, 0, bias=bias)
    names = {f"{PEFT}.{head}.weight": batch.slopes[0], **({f"{PEFT}.{head}.bias": batch.slopes[1]} if bias else {})}
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"{PEFT}.bert.encoder.layer.{layer}.query.lora_{factor}.weight": torch.randn(shape, generator=generator)
        for layer in (2, 10)
        for factor, shape in (("A", (4, 16)), ("B", (16, 4)))
    }
    row = {**lora, **{name: -torch.tensor(value, dtype=torch.float32) for name, value in names.items()}}
    values = (batch.weight, batch.bias)
    reference = {**lora, **{n: torch.tensor(v, dtype=torch.float32) for n, v in zip(names, values, strict=False)}}
    read = []
    rows = stack_updates([row], [6.0], ["ann"]).map(lambda block, span: read.append(span.tensor) or block)
    threat = threat_on(reference, Victim(batch_size=6))
    (found,) = attack.build(NAME, {}).reconstruct_data(rows, threat)
    assert found.present == batch.present
    assert found.certain
    assert set(read) == set(names)  # of the rest of the adapter nothing is read


def layout(**shapes):
    return Layout.of({name.replace("__", "."): shape for name, shape in shapes.items()})


def test_which_layer_is_the_last():
    plain = layout(
        layer9__weight=(7, 4), layer9__bias=(7,), layer10__weight=(7, 5), layer10__bias=(7,), z__weight=(3, 3)
    )
    assert head_name(plain, Victim(), None, "x") == "layer10.weight"  # z has no bias
    assert head_name(plain, Victim(classes=7), None, "x") == "layer10.weight"
    assert head_name(plain, Victim(), "layer9", "x") == "layer9.weight"
    assert head_name(plain, Victim(), "z.weight", "x") == "z.weight"
    net = nn.ModuleDict({"z": nn.Linear(4, 7), "a": nn.Linear(4, 7), "b": nn.Linear(4, 5)})
    of_net = Layout.of({name: tuple(value.shape) for name, value in net.named_parameters()})
    assert head_name(of_net, Victim(model=net, classes=7), None, "x") == "a.weight"  # in the order of the model


@pytest.mark.parametrize(
    ("shapes", "victim", "layer", "message"),
    [
        (
            {"q__lora_A__weight": (4, 8)},
            Victim(),
            None,
            r"has no last layer that is told .*layer=... \(matrices: none\)",
        ),
        ({"a__weight": (4, 8)}, Victim(classes=5), None, "has no last layer with classes=5 rows"),
        ({"a__weight": (4, 8)}, Victim(), None, "matrices: a.weight"),
        ({"a__weight": (4, 8)}, Victim(), "b.weight", r"layer='b.weight'\): no matrix .*did you mean 'a.weight'"),
    ],
)
def test_a_last_layer_that_is_not_there_is_asked_for(shapes, victim, layer, message):
    with pytest.raises(InputError, match=message):
        head_name(layout(**shapes), victim, layer, NAME)


def test_a_vocabulary_is_no_set_of_labels():
    row = {"lm_head.weight": torch.zeros(20_001, 2)}
    with pytest.raises(InputError, match=r"lm_head.weight has 20,001 rows, a vocabulary; name a layer of classes"):
        attack.build(NAME, {}).reconstruct_data(stack_updates([row], [1.0]), threat_on(row, Victim()))


def test_the_same_again_is_the_same_and_each_row_has_its_own():
    net, x, y = client(20, 4)
    rows = stack_updates([gradient_row(net, x[:2], y[:2]), gradient_row(net, x[2:], y[2:])], [2.0, 2.0], ["ann", "bob"])
    threat = threat_on(weights_of(net), victim_on(net, SHAPE, 20, batch_size=2), clients=2)
    one, again = (attack.build(NAME, {}).reconstruct_data(rows, threat) for _ in range(2))
    for i, (first, second) in enumerate(zip(one, again, strict=True)):
        assert first.client == ["ann", "bob"][i]
        assert (first.present, first.counts, first.certificate) == (second.present, second.counts, second.certificate)
        assert first.present == tuple(sorted(set(y[2 * i : 2 * i + 2].tolist())))


def test_the_number_of_examples_can_be_told():
    net, x, y = client(50, 6, seed=1)
    victim = victim_on(net, SHAPE, 50, batch_size=3, steps=2, learning_rate=0.1)
    row = trained_row(net, x, y, victim)
    found = looked(NAME, net, row, victim, examples=6)
    assert found.present == tuple(sorted(set(y.tolist())))
    with pytest.raises(InputError, match=r"revealing_labels\("):
        looked(NAME, net, row, victim, examples=0)


@pytest.mark.slow
def test_what_is_vouched_for_is_right_nearly_always():
    """Random heads, trained or not, of 2 to 50 classes, with and without a bias, noise, momentum, several steps."""
    rng, certain, wrong, trusted, off = np.random.default_rng(1), 0, 0, 0, 0
    for trial in range(600):
        classes, n, steps = (int(rng.choice(some)) for some in ([2, 3, 5, 10, 20, 50], [1, 2, 4, 8, 16], [1, 1, 3]))
        net, x, y = client(classes, n, trial, activation=[nn.ReLU, nn.Sigmoid, nn.GELU][rng.integers(3)])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
        for _ in range(int(rng.choice([0, 30, 100]))):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        victim = victim_on(net, SHAPE, classes, batch_size=n, steps=steps, learning_rate=float(rng.choice([0.01, 0.2])))
        found = looked(NAME, net, trained_row(net, x, y, victim), victim)
        certain += found.certain
        wrong += found.certain and found.present != tuple(sorted(set(y.tolist())))
        vouched = found.certain and "all counts" in found.why
        trusted += vouched
        off += vouched and found.counts != tuple((steps * y.bincount(minlength=classes)).tolist())
    assert certain > 200
    assert wrong <= 0.02 * certain
    assert trusted > 30
    assert off <= 0.03 * trusted
