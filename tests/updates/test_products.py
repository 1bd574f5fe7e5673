"""The product space: rows that are LoRA products, never formed, against the dense matrices that they stand for."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedllm_sec import InputError, Round, aggregate, defense, open_updates
from fedllm_sec.updates import UpdateSet
from fedllm_sec.updates.device import Budget
from fedllm_sec.updates.errors import NotFiniteError
from fedllm_sec.updates.refactor import save_as_adapters
from tests.conftest import dense, write_adapter
from tests.oracles import naive_product

ONE, TWO = "model.layers.0.attention.dense", "model.layers.1.mlp.up"
SIZES = {ONE: (7, 11), TWO: (13, 5)}  # (d_out, d_in)
RANKS = {ONE: 2, TWO: 3}
PLAIN = {"base_model.model.score.weight": (3, 4), "base_model.model.score.temperature": ()}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "rank_pattern": {"layers.1.mlp.up": 3}}
CONFIGS = {
    "plain": (LORA, [8 / 2, 8 / 3]),
    "rslora": ({**LORA, "use_rslora": True}, [8 / math.sqrt(2), 8 / math.sqrt(3)]),
    "pattern": ({**LORA, "alpha_pattern": {"mlp.up": 1}}, [8 / 2, 1 / 3]),
    "regular expression": ({**LORA, "alpha_pattern": {r"layers\.[0-3]\..*dense": 5}}, [5 / 2, 8 / 3]),
    "of another module": ({**LORA, "alpha_pattern": {"p": 1, "layers.1": 1}, "use_rslora": None}, [8 / 2, 8 / 3]),
}


def names(module):
    """Of the factors B and A of a module."""
    return f"base_model.model.{module}.lora_B.weight", f"base_model.model.{module}.lora_A.weight"


class World(NamedTuple):
    """Clients' adapters on disk around a global one, and their updates as the dense matrix that they stand for."""

    clients: list[Path]
    server: Path
    states: list
    updates: np.ndarray

    def open(self, **how) -> UpdateSet:
        return open_updates(self.clients, reference=self.server, space="product", **how)

    def base(self, **how) -> UpdateSet:
        return open_updates([self.server], space="product", **how)


def dense_rows(states, reference, scales, ranks=None):
    """(n, D) updates in the order of the product layout: tensors by name, where a pair is called lora_BA."""
    modules = sorted(ranks or RANKS)
    factors = [[[state[name].double().numpy() for name in names(m)] for m in modules] for state in states]
    if reference is None:
        base = [[np.zeros_like(factor) for factor in pair] for pair in factors[0]]
    else:
        base = [[reference[name].double().numpy() for name in names(m)] for m in modules]
    plain = sorted(name for name in states[0] if "lora_" not in name)
    pairs = naive_product.dense_updates(factors, base, scales)
    cuts = np.cumsum([0, *(b.shape[0] * a.shape[1] for b, a in base)])
    columns = {
        names(m)[1].replace("lora_A", "lora_BA"): pairs[:, i:j]
        for m, (i, j) in zip(modules, pairwise(cuts), strict=True)
    }
    for name in plain:
        origin = 0 if reference is None else reference[name].double().numpy()
        columns[name] = np.stack([(state[name].double().numpy() - origin).ravel() for state in states])
    return np.concatenate([columns[name] for name in sorted(columns)], axis=1)


def random_factors(generator, sizes=SIZES, ranks=RANKS, plain=PLAIN, spread=1.0, around=None):
    """The tensors of an adapter; with `around`, that adapter plus noise."""
    shapes = dict(plain)
    for module, (d_out, d_in) in sizes.items():
        b, a = names(module)
        shapes |= {b: (d_out, ranks[module]), a: (ranks[module], d_in)}
    noise = {name: spread * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return noise if around is None else {name: around[name] + value for name, value in noise.items()}


def world(folder, n=5, config="plain", seed=0, spread=1.0, plain=PLAIN, sizes=SIZES, ranks=RANKS):
    """n random clients at a distance of `spread` from a random global adapter."""
    generator = torch.Generator().manual_seed(seed)
    server = random_factors(generator, sizes, ranks, plain)
    states = [random_factors(generator, sizes, ranks, plain, spread, server) for _ in range(n)]
    return written(folder, states, server, config, ranks)


def written(folder, states, server, config="plain", ranks=RANKS):
    settings, scales = CONFIGS[config]
    scales = scales if ranks is RANKS else [settings["lora_alpha"] / ranks[module] for module in sorted(ranks)]
    clients = [write_adapter(folder / f"client_{i:02d}", state, settings) for i, state in enumerate(states)]
    rows = dense_rows(states, server, scales, ranks)
    return World(clients, write_adapter(folder / "global", server, settings), [*states, server], rows)


def close(found, expected, tolerance):
    """To a tolerance relative to the largest value."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("plain", [PLAIN, {}], ids=["head", "bare"])
def test_blocks_and_gram_are_those_of_the_dense_matrices(tmp_path, config, plain):
    made = world(tmp_path, config=config, plain=plain)
    updates = made.open()
    assert updates.layout.columns == made.updates.shape[1]
    close(dense(updates), made.updates, 1e-6)
    close(updates.gram.numpy(), naive_product.gram(made.updates), 1e-7 if plain else 1e-13)


@pytest.mark.parametrize("config", CONFIGS)
def test_without_a_reference_files_hold_updates_and_the_clients_config_counts(tmp_path, config):
    made = world(tmp_path, config=config)
    updates = open_updates(made.clients, space="product")
    rows = dense_rows(made.states[:-1], None, CONFIGS[config][1])
    close(dense(updates), rows, 1e-6)
    close(updates.gram.numpy(), rows @ rows.T, 1e-12)


def test_without_any_config_products_are_not_scaled_and_that_is_said(tmp_path, caplog):
    made = world(tmp_path)
    for folder in (*made.clients, made.server):
        (folder / "adapter_config.json").unlink()
    rows = dense_rows(made.states[:-1], made.states[-1], [1.0, 1.0])
    close(made.open().gram.numpy(), rows @ rows.T, 1e-7)
    assert "lora_alpha" in caplog.text


def test_the_servers_scaling_counts_whatever_clients_claim(tmp_path):
    made = world(tmp_path)
    (made.clients[0] / "adapter_config.json").write_text(json.dumps({**LORA, "lora_alpha": 10**6}))
    close(dense(made.open()), made.updates, 1e-6)


@pytest.mark.parametrize("memory", [1, 3000, 20_000, 100_000])
def test_gram_of_groups_of_clients_is_the_same(tmp_path, memory):
    made = world(tmp_path, n=9, plain={})
    updates = made.open()
    products = updates.products
    budget = Budget(memory)
    assert len(products.groups(products.pairs[0], budget)) > 1 or memory == 100_000
    close(products.gram(budget).numpy(), naive_product.gram(made.updates), 1e-13)
    mixed = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).double()
    mixed[:, 3:6] = 0  # these are not read
    close(products.mix(mixed).gram(budget).numpy(), naive_product.gram(mixed.numpy() @ made.updates), 1e-13)
    both = products.concat(made.base().products)  # an anchored row beside one that is not
    rows = np.vstack(
        [made.updates, dense_rows(made.states[-1:], None, CONFIGS["plain"][1])[:, : made.updates.shape[1]]]
    )
    close(both.gram(budget).numpy(), naive_product.gram(rows), 1e-13)


@given(st.integers(1, 20), st.integers(1, 200_000))
def test_every_two_clients_meet_in_some_group_and_groups_fit_where_they_can(n, memory):
    class Ranks:
        anchor = None

        def rank(self, pair):
            return 2

    from fedllm_sec.updates.layout import Pair
    from fedllm_sec.updates.products import Products

    products, pair = Products.of([], [Ranks()] * n), Pair("p", "a", "b", 30, 20, 2, 1.0)
    groups = products.groups(pair, Budget(memory))
    for i in range(n):
        for j in range(i + 1):
            assert any({i, j} <= set(group) for group in groups), (i, j)
    assert all(len(set(group)) == len(group) for group in groups)


def test_the_algebra_of_rows_stays_exact(tmp_path):
    """mix, rows, concat, add, replace and mean, one after another: dense algebra, and never a product formed for it."""
    made = world(tmp_path, n=4)
    updates, base, rows = made.open(), made.base(), made.updates
    server = dense_rows(made.states[-1:], None, CONFIGS["plain"][1])
    matrix = np.random.default_rng(0).normal(size=(3, 4))
    mixed = updates.mix(torch.tensor(matrix))
    cases = {
        "mix": (mixed, matrix @ rows),
        "rows": (updates.rows([3, 1, 1]), rows[[3, 1, 1]]),
        "concat": (updates.concat(base), np.vstack([rows, server])),
        "add one to all": (updates.add(base), rows + server),
        "add row by row": (updates.rows([0, 1, 2]).add(mixed), rows[:3] + matrix @ rows),
        "replace": (
            updates.replace([2, 0], mixed.rows([1, 2])),
            np.vstack([matrix[2] @ rows, rows[1], matrix[1] @ rows, rows[3]]),
        ),
        "mean": (updates.mean(), rows.mean(axis=0, keepdims=True)),
        "of all": (
            updates.concat(mixed).mix(torch.ones(2, 7)).add(base).rows([1]).concat(updates).mean(),
            (rows.sum(axis=0) + (matrix @ rows).sum(axis=0) + server + rows.sum(axis=0)) / 5,
        ),
        "itself taken away": (updates.concat(updates).mix(torch.tensor([[1.0, 0, 0, 0, -1, 0, 0, 0]])), 0 * rows[:1]),
    }
    scale = np.abs(rows).max()
    for name, (found, expected) in cases.items():
        assert found.products is not None, name
        np.testing.assert_allclose(dense(found), expected, rtol=0, atol=1e-5 * scale, err_msg=name)
        gram = naive_product.gram(expected)
        np.testing.assert_allclose(found.gram.numpy(), gram, rtol=0, atol=1e-6 * scale**2 * rows.shape[1], err_msg=name)


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_nothing_cancels_where_updates_are_small_beside_the_adapter(tmp_path, spread):
    """The Gram matrix of updates a ten-thousandth of the adapter's size is right to ten digits; blocks to float32's."""
    made = world(tmp_path, n=4, spread=spread, plain={})
    updates = made.open()
    close(updates.gram.numpy(), naive_product.gram(made.updates), 1e-10)
    close(dense(updates), made.updates, 1e-6)
    close(updates.add(made.base()).mix(torch.eye(4)).gram.numpy(), updates.add(made.base()).gram.numpy(), 1e-12)


def test_near_copies_are_told_apart(tmp_path):
    """Two clients a hundred-thousandth apart: their distance, off the Gram matrix, to one in a thousand."""
    generator = torch.Generator().manual_seed(3)
    server = random_factors(generator, plain={})
    one = random_factors(generator, plain={}, spread=0.1, around=server)
    near = random_factors(generator, plain={}, spread=1e-6, around=one)
    made = written(tmp_path, [one, near, one], server)
    gram = made.open().gram
    distance = float(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1])
    expected = float(np.square(made.updates[0] - made.updates[1]).sum())
    assert expected < 1e-8 * float(gram[0, 0])
    assert distance == pytest.approx(expected, rel=1e-3)
    assert abs(float(gram[0, 0] + gram[2, 2] - 2 * gram[0, 2])) < 1e-13 * float(gram[0, 0])


def adapter_product(file, modules, scales):
    """The dense product of a saved adapter, and its plain tensors."""
    state = load_file(file)
    return dense_rows([state], None, scales, dict.fromkeys(modules))[0]


def nearest(row, sizes, ranks):
    """The nearest row whose matrices have the given ranks, and the energy that is lost; without plain tensors."""
    parts, lost, start = [], 0.0, 0
    for module in sorted(sizes):
        d_out, d_in = sizes[module]
        b, a, energy = naive_product.best_factors(row[start : start + d_out * d_in].reshape(d_out, d_in), ranks[module])
        parts.append((b @ a).ravel())
        lost, start = lost + energy, start + d_out * d_in
    return np.concatenate(parts), lost


LARGE = {ONE: (90, 70), TWO: (60, 110)}
MEDIAN, FEDAVG = [("median", {})], []


@pytest.mark.parametrize("chain", [FEDAVG, MEDIAN], ids=["linear", "median"])
@pytest.mark.parametrize("memory", ["1GiB", "kept not", "tiny"])
def test_what_is_saved_is_the_best_of_its_rank_and_what_is_lost_is_known(tmp_path, chain, memory):
    """Rows that are sums of factors by their small SVD; others from slabs, kept or formed again. Spectra that fall."""
    generator = torch.Generator().manual_seed(5)
    server = random_factors(generator, LARGE, RANKS, {})
    common = random_factors(generator, LARGE, RANKS, {}, 2.0, server)
    states = [random_factors(generator, LARGE, RANKS, {}, 0.03, common) for _ in range(5)]
    made = written(tmp_path, states, server)
    limit = {"1GiB": 2**30, "kept not": 2**17, "tiny": 2**12}[memory]
    how = {"memory": max(limit, 2**20)}
    updates, base = made.open(**how), made.base(**how)
    budget = replace(updates.budget, memory=limit)
    updates, base = replace(updates, budget=budget), replace(base, budget=budget)
    result = aggregate(updates, Round(reference=base), [defense.build(*link) for link in chain])
    ((lost, _),) = save_as_adapters(result, [tmp_path / "out.safetensors"], base)
    whole = np.median(made.updates, axis=0) if chain else made.updates.mean(axis=0)
    whole = whole + dense_rows([server], None, CONFIGS["plain"][1])[0]
    best, energy = nearest(whole, LARGE, RANKS)
    assert lost == pytest.approx(energy, rel=1e-3)
    saved = adapter_product(tmp_path / "out.safetensors", LARGE, CONFIGS["plain"][1])
    assert np.linalg.norm(saved - best) < 1e-2 * math.sqrt(energy)
    assert np.linalg.norm(saved - whole) == pytest.approx(math.sqrt(energy), rel=1e-4)


def test_what_has_the_rank_is_saved_exactly_in_a_gauge_of_its_own(tmp_path):
    made = world(tmp_path)
    save_as_adapters(made.base(), [tmp_path / "out.safetensors"])
    expected = dense_rows(made.states[-1:], None, CONFIGS["plain"][1])[0]
    close(adapter_product(tmp_path / "out.safetensors", SIZES, CONFIGS["plain"][1]), expected, 1e-6)
    saved = load_file(tmp_path / "out.safetensors")
    for module, rank in RANKS.items():
        a = saved[names(module)[1]].double()
        np.testing.assert_allclose((a @ a.T).numpy(), np.eye(rank) / 3, atol=1e-6)  # the length that PEFT begins with
    for name in PLAIN:
        torch.testing.assert_close(saved[name], made.states[-1][name])


@pytest.mark.parametrize("chain", [FEDAVG, MEDIAN], ids=["linear", "median"])
@pytest.mark.parametrize("still", [True, False], ids=["zero updates", "B stays zero"])
def test_an_adapter_that_stays_zero_can_still_learn(tmp_path, chain, still):
    """B = 0, as every adapter begins: A must not become zero with it, or no gradient would ever move either."""
    generator = torch.Generator().manual_seed(1)
    server = random_factors(generator)
    states = [server if still else random_factors(generator) for _ in range(3)]
    for state in (server, *states):
        state |= {names(module)[0]: torch.zeros(SIZES[module][0], RANKS[module]) for module in SIZES}
    made = written(tmp_path, states, server)
    result = aggregate(made.open(), Round(), [defense.build(*link) for link in chain])
    ((lost, _),) = save_as_adapters(result, [tmp_path / "out.safetensors"], made.base())
    assert lost == pytest.approx(0, abs=1e-12)
    saved = load_file(tmp_path / "out.safetensors")
    for module, rank in RANKS.items():
        b, a = (saved[name].double() for name in names(module))
        assert not (b @ a).any()
        assert float(torch.linalg.svdvals(a)[rank - 1]) == pytest.approx(1 / math.sqrt(3), rel=1e-5)


@pytest.mark.parametrize("chain", [FEDAVG, MEDIAN], ids=["linear", "median"])
@pytest.mark.parametrize("size", [(2, 9), (9, 2), (1, 5)])
def test_a_rank_above_that_of_the_matrix_is_kept(tmp_path, chain, size):
    """LoRA of rank 4 on a head with two labels: the adapter keeps its shapes, and holds the sum exactly."""
    ranks = {ONE: 4}
    made = world(tmp_path, sizes={ONE: size}, ranks=ranks, plain={})
    result = aggregate(made.open(), Round(), [defense.build(*link) for link in chain])
    save_as_adapters(result, [tmp_path / "out.safetensors"], made.base())
    saved = load_file(tmp_path / "out.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == {k: v.shape for k, v in made.states[0].items()}
    update = np.median(made.updates, axis=0) if chain else made.updates.mean(axis=0)
    whole = update + dense_rows(made.states[-1:], None, [2.0], ranks)[0]
    close(dense_rows([saved], None, [2.0], ranks)[0], whole, 1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("chain", [FEDAVG, MEDIAN], ids=["linear", "median"])
def test_peft_loads_what_is_saved_and_merges_the_right_weights(tmp_path, rslora, chain):
    """Real PEFT adapters of a GPT-NeoX: the merged model is the base plus the mean (or median) of the products."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from fedllm_sec.federation.run_folder import fill_folder

    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    GPTNeoXForCausalLM(shape).save_pretrained(tmp_path / "base")

    def fresh():
        return GPTNeoXForCausalLM.from_pretrained(tmp_path / "base")

    def merged(folder):
        model = PeftModel.from_pretrained(fresh(), folder).merge_and_unload()
        return {name: value.double() for name, value in model.state_dict().items()}

    settings = LoraConfig(
        r=4, lora_alpha=12, target_modules=["query_key_value", "dense_h_to_4h"], use_rslora=rslora,
        alpha_pattern={"layers.1.attention.query_key_value": 3}, rank_pattern={"dense_h_to_4h": 6},
    )  # fmt: skip
    folders = []
    for i in range(4):
        model = get_peft_model(fresh(), settings)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.05)
        model.save_pretrained(tmp_path / f"adapter_{i}")
        folders.append(tmp_path / f"adapter_{i}")
    server, clients = folders[3], folders[:3]
    base = open_updates([server], space="product")
    updates = open_updates(clients, reference=server, space="product")
    result = aggregate(updates, Round(reference=base), [defense.build(*link) for link in chain])
    out = tmp_path / "out"
    out.mkdir()
    (discarded,) = fill_folder(result, base, server, [out])
    found, origin, states = merged(out), fresh().state_dict(), [merged(folder) for folder in clients]
    lost, energy_of_update, moved, before = 0.0, 0.0, 0, merged(server)
    for name, start in origin.items():
        if name.endswith(("query_key_value.weight", "dense_h_to_4h.weight")):
            moved += 1
            all_of_them = torch.stack([state[name] for state in states])
            middle = np.median(all_of_them, axis=0) if chain else all_of_them.numpy().mean(axis=0)
            wanted, got = middle - start.double().numpy(), found[name].numpy() - start.double().numpy()
            b, a, energy = naive_product.best_factors(wanted, 6 if "dense" in name else 4)
            lost += energy
            energy_of_update += np.square(middle - before[name].numpy()).sum()
            # Half of the spectrum is flat: a little of the best subspace is lost to the randomised finder, no energy.
            assert np.linalg.norm(got - b @ a) < (5e-3 if chain else 1e-5) * np.linalg.norm(b @ a)
            assert np.square(got - wanted).sum() == pytest.approx(energy, rel=1e-4)
        else:
            torch.testing.assert_close(found[name], start.double())
    assert moved == 4
    assert discarded == pytest.approx(lost / energy_of_update, rel=1e-3)


def test_embeddings_have_products_too(tmp_path):
    """PEFT calls the factors of an embedding lora_embedding_A and _B, without `.weight`."""
    b, a = "base_model.model.wte.lora_embedding_B", "base_model.model.wte.lora_embedding_A"
    generator = torch.Generator().manual_seed(0)
    states = [{b: torch.randn(6, 2, generator=generator), a: torch.randn(2, 9, generator=generator)} for _ in range(3)]
    folders = [write_adapter(tmp_path / str(i), state, LORA) for i, state in enumerate(states)]
    expected = np.stack([(4 * (state[b].double() @ state[a].double())).numpy().ravel() for state in states])
    updates = open_updates(folders, space="product")
    close(dense(updates), expected, 1e-6)
    close(updates.gram.numpy(), expected @ expected.T, 1e-13)


B0, A0 = names(ONE)
REFUSED = {
    "no partner": (lambda state: state.pop(B0), LORA, f"'{A0}' has no partner '{B0}'"),
    "no A": (lambda state: state.pop(A0), LORA, f"'{B0}' has no partner"),
    "of two ranks": (lambda state: state.update({B0: torch.ones(7, 3)}), LORA, "of rank 2 and 3"),
    "convolution": (lambda state: state.update({A0: torch.ones(2, 3, 3, 3)}), LORA, r"space='factors'"),
    "DoRA": (lambda state: None, {**LORA, "use_dora": True}, "DoRA"),
    "DoRA's tensors": (
        lambda state: state.update({f"base_model.model.{ONE}.lora_magnitude_vector.weight": torch.ones(7)}),
        LORA,
        "magnitude|DoRA",
    ),
    "AdaLoRA": (
        lambda state: state.update({f"base_model.model.{ONE}.lora_E": torch.ones(2, 1)}),
        {**LORA, "peft_type": "ADALORA"},
        "lora_E|ADALORA|AdaLoRA",
    ),
    "no pair": (lambda state: [state.pop(name) for name in list(state) if "lora_" in name], LORA, "no LoRA pair"),
    "alpha is a word": (lambda state: None, {**LORA, "lora_alpha": "x"}, "lora_alpha"),
    "alpha_pattern is a list": (lambda state: None, {**LORA, "alpha_pattern": ["q"]}, "alpha_pattern"),
    "alpha_pattern is no pattern": (lambda state: None, {**LORA, "alpha_pattern": {"(": 2}}, "alpha_pattern"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_no_products_are_refused_in_one_clear_line(tmp_path, name):
    change, config, message = REFUSED[name]
    state = random_factors(torch.Generator().manual_seed(0))
    change(state)
    folders = [write_adapter(tmp_path / str(i), state, config) for i in range(3)]
    with pytest.raises(InputError, match=message) as caught:
        open_updates(folders[1:], reference=folders[0], space="product")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", [A0, B0, "base_model.model.score.weight", "base_model.model.score.temperature"])
@pytest.mark.parametrize("who", ["client_01", "global"])
@pytest.mark.parametrize("chain", [[("krum", {"f": 0, "m": 2})], MEDIAN, FEDAVG], ids=["gram", "blocks", "saving"])
def test_a_nan_names_whose_it_is(tmp_path, bad, tensor, who, chain):
    """Whatever is done with the rows; the global adapter's is no client's fault."""
    made = world(tmp_path, n=4)
    state = made.states[1 if who == "client_01" else -1]
    state[tensor].view(-1)[0] = bad
    folder = tmp_path / who
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_config.json").unlink()
    folder.rmdir()
    write_adapter(folder, state, LORA)
    updates, base = made.open(), made.base()

    def work():
        result = aggregate(updates, Round(), [defense.build(*link) for link in chain])
        save_as_adapters(result, [tmp_path / "out.safetensors"], base)

    with pytest.raises(InputError, match="NaN or infinite") as caught:
        work()
    text = str(caught.value)
    assert tensor in text
    assert ("the global adapter" in text) == (who == "global")
    assert isinstance(caught.value, NotFiniteError) == (who != "global")
    assert (who in text) or who == "global"
    assert not (tmp_path / "out.safetensors").exists()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("power", [0, 10, 20, 30, 40])
@pytest.mark.parametrize("kind", ["scale", "shear"])
@pytest.mark.parametrize("first", [True, False], ids=["first round", "later"])
def test_a_long_update_cannot_look_short_by_its_factors(tmp_path, kind, power, first):
    """Inner products of factors square what cancels in their product twice: Krum would take the attacker for a twin."""
    generator = torch.Generator().manual_seed(power)
    server = {A0: torch.randn(4, 30, generator=generator) * 0.3, B0: torch.zeros(50, 4)}
    if not first:
        server[B0] = torch.randn(50, 4, generator=generator) * 0.1
    states = [
        {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in server.items()} for _ in range(7)
    ]
    evil = {name: tensor + 20 * torch.randn(tensor.shape, generator=generator) for name, tensor in server.items()}
    c = 2.0**power
    if kind == "scale":
        evil = {A0: evil[A0] / c, B0: evil[B0] * c}
    elif power <= 20:  # beyond it float32 itself no longer holds the product
        shear = torch.eye(4, dtype=torch.float64)
        shear[0, 1] = c
        evil = {A0: (shear @ evil[A0].double()).float(), B0: (evil[B0].double() @ shear.inverse()).float()}
    states[2] = evil
    folders = [write_adapter(tmp_path / f"client_{i}", state, LORA) for i, state in enumerate(states)]
    updates = open_updates(folders, reference=write_adapter(tmp_path / "global", server, LORA), space="product")
    dense_updates = np.stack(
        [(2 * (s[B0].double() @ s[A0].double() - server[B0].double() @ server[A0].double())).numpy() for s in states]
    ).reshape(7, -1)
    truth = dense_updates @ dense_updates.T
    scale = LORA["lora_alpha"] / 4 / 2
    np.testing.assert_allclose(
        updates.gram / scale**2, truth, rtol=1e-5, atol=1e-6 * np.abs(truth).max(initial=0, where=np.eye(7) < 1)
    )
    kept = defense.build("krum", {"f": 1, "m": 6}).before(updates, Round()).clients
    assert "client_2" not in kept
    mean = updates.rows([0, 1, 2]).mean()
    save_as_adapters(mean, [tmp_path / "out.safetensors"], open_updates([tmp_path / "global"], space="product"))
    saved = load_file(tmp_path / "out.safetensors")
    wanted = dense_updates[:3].mean(axis=0) + 2 * (server[B0].double() @ server[A0].double()).numpy().ravel()
    found = 2 * (saved[B0].double() @ saved[A0].double()).numpy().ravel()
    best = naive_product.best_factors(wanted.reshape(50, 30), 4)
    np.testing.assert_allclose(found, (best[0] @ best[1]).ravel(), rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_factors_that_no_product_in_float32_can_hold_are_refused_and_the_round_goes_on(tmp_path):
    made = world(tmp_path, n=4)
    made.states[1][A0].fill_(1e20)
    write_again = tmp_path / "again"
    folders = [write_adapter(write_again / f"client_{i:02d}", state, LORA) for i, state in enumerate(made.states[:4])]
    server = write_adapter(write_again / "global", made.states[-1], LORA)
    from fedllm_sec.updates import admit, scan

    updates, refusals = scan(admit(folders, reference=server, space="product"))
    assert [refusal.client for refusal in refusals] == ["client_01"]
    assert "too large for products" in refusals[0].reason
    assert bool(torch.isfinite(updates.gram).all())
