"""The search space of DARTS: published sizes, a mix against its parts, and derivation against all alternatives."""

import itertools
import json
import runpy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.special import softmax
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from fedllm_sec import InputError
from fedllm_sec.models import Shape, model
from fedllm_sec.models.genotype import Genotype, derive, genotype_of, read_genotype
from fedllm_sec.models.search import COLUMNS, OPERATIONS, Mixed, Searched, all_edges, operation, places
from tests.launch import ROOT
from tests.models.test_shapes import CIFAR10, MNIST, TEXT, examples, made, size

SMALL = {"channels": 3, "cells": 3, "nodes": 2}
TINY = Shape((1, 8, 8), 4, None)
# The paper's second architecture (Liu et al. 2019, figures 4 and 5), edges by source.
PUBLISHED = {
    "normal": [
        [["sep_conv_3x3", 0], ["sep_conv_3x3", 1]], [["sep_conv_3x3", 0], ["sep_conv_3x3", 1]],
        [["skip_connect", 0], ["sep_conv_3x3", 1]], [["skip_connect", 0], ["dil_conv_3x3", 2]],
    ],
    "reduce": [
        [["max_pool_3x3", 0], ["max_pool_3x3", 1]], [["max_pool_3x3", 1], ["skip_connect", 2]],
        [["max_pool_3x3", 0], ["skip_connect", 2]], [["max_pool_3x3", 1], ["skip_connect", 2]],
    ],
}  # fmt: skip
PLAIN = {
    "normal": [[["sep_conv_5x5", 0], ["skip_connect", 1]]],
    "reduce": [[["skip_connect", 0], ["dil_conv_3x3", 1]]],
}


def written(folder, genotype=PLAIN, name="genotype.json"):
    path = folder / name
    path.write_text(json.dumps(genotype))
    return path


def test_the_networks_of_the_paper_have_their_published_sizes(tmp_path):
    """The authors' logs: 1.930618MB while searching (without alphas), 3.349342MB trained (without auxiliary head)."""
    supernet = made("darts", CIFAR10, channels=16, cells=8, nodes=4)
    alphas = supernet.alphas()
    assert [tuple(alpha.shape) for alpha in alphas] == [(14, 8), (14, 8)]
    assert size(supernet) - sum(alpha.numel() for alpha in alphas) == 1_930_618
    path = str(written(tmp_path, PUBLISHED))
    assert size(made("darts_network", CIFAR10, genotype=path, channels=36, cells=20)) == 3_349_342


def test_a_derived_network_has_the_weights_that_can_be_counted_by_hand(tmp_path):
    """Four channels, three cells of one node: normal, reduce, reduce; a normalisation of c channels has 2c weights."""
    module = made("darts_network", MNIST, genotype=str(written(tmp_path)), channels=4, cells=3)

    def pointwise(before, channels):
        return before * channels + 2 * channels

    def separable(channels, kernel):
        return 2 * (channels * kernel**2 + pointwise(channels, channels))

    def dilated(channels, kernel):
        return channels * kernel**2 + pointwise(channels, channels)

    stem = 1 * 12 * 9 + 24
    first = 2 * pointwise(12, 4) + separable(4, 5)  # the first cell: both inputs are the stem's 12 channels
    first_is_reduced = pointwise(12, 8) + pointwise(4, 8) + pointwise(8, 8) + dilated(8, 3)
    second_is_reduced = pointwise(4, 16) + pointwise(8, 16) + pointwise(16, 16) + dilated(16, 3)
    assert size(module) == stem + first + first_is_reduced + second_is_reduced + 16 * 10 + 10


def test_cells_that_halve_stand_at_a_third_and_two_thirds():
    assert [place.reduces for place in places(8, 16, 4)] == [i in (2, 5) for i in range(8)]
    assert [place.channels for place in places(20, 36, 4)] == [36] * 6 + [72] * 7 + [144] * 7
    assert [place.after_reduction for place in places(3, 4, 1)] == [False, False, True]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_an_operation_keeps_channels_and_divides_sides(name, stride):
    x = torch.randn(2, 4, 8, 12)
    assert operation(name, 4, stride, affine=False)(x).shape == (2, 4, 8 // stride, 12 // stride)


@pytest.mark.parametrize(
    ("name", "reach"), [("sep_conv_3x3", 2), ("sep_conv_5x5", 4), ("dil_conv_3x3", 2), ("dil_conv_5x5", 4)]
)
def test_a_convolution_reaches_as_far_as_its_kernels_do(name, reach):
    """3 + 3 - 1 = 5 pixels for two 3x3 in a row, and 5 for a 3x3 dilated by 2, of which it sees every second one."""
    convolution = operation(name, 2, 1, affine=False).eval()
    for weight in convolution.parameters():
        weight.data.abs_()  # so that no ReLU hides a pixel
    x = torch.ones(1, 2, 15, 15, requires_grad=True)
    convolution(x)[0, 0, 7, 7].backward()
    seen = x.grad[0].abs().sum(dim=0).nonzero()
    assert (seen - 7).abs().max() == reach
    assert len(seen) == ((reach + 1) ** 2 if name.startswith("dil") else (2 * reach + 1) ** 2)


def test_an_average_at_the_border_is_of_pixels_that_are_there():
    assert torch.equal(operation("avg_pool_3x3", 1, 1, affine=False)(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


@given(st.lists(st.floats(-4, 4), min_size=8, max_size=8), st.sampled_from([1, 2]), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_mixed_edge_is_the_weighted_sum_of_its_operations(alpha, stride, seed):
    """Equation 2 of the paper, in float64 by numpy."""
    torch.manual_seed(seed)
    edge = Mixed(2, stride).double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    result = edge(x, torch.tensor(alpha, dtype=torch.float64).softmax(dim=0)).detach().numpy()
    odds = np.exp(alpha) / np.exp(alpha).sum()
    expected = np.zeros_like(result)  # of `none`
    for name, share in zip(COLUMNS, odds, strict=True):
        if name != "none":
            expected += share * edge.operations[OPERATIONS.index(name)](x).detach().numpy()
    np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.parametrize("cell_kind", ["normal", "reduce"])
def test_with_one_huge_alpha_an_edge_is_that_operation(cell_kind):
    """The whole network, whose cells are computed anew here from their edges."""
    supernet = made("darts", TINY, **SMALL).eval()
    generator = torch.Generator().manual_seed(4)
    chosen = {kind: torch.randint(1, 8, (5,), generator=generator).tolist() for kind in ("normal", "reduce")}
    chosen[cell_kind][1] = 0  # none
    with torch.no_grad():
        for kind, alpha in zip(("normal", "reduce"), supernet.alphas(), strict=True):
            alpha.zero_()
            alpha[torch.arange(5), chosen[kind]] = 1e4
    network = supernet.network
    x = examples(TINY, 3)
    before = last = network.stem(x)
    for cell in network.cells:
        states = [cell.first(before), cell.second(last)]
        edge = 0
        for node in range(2):
            total = 0
            for source in range(2 + node):
                column = chosen["reduce" if cell.reduces else "normal"][edge]
                if column:
                    total = total + cell.edges[edge].operations[column - 1](states[source])
                edge += 1
            states.append(total)
        before, last = last, torch.cat(states[2:], dim=1)
    expected = network.head[1](last.mean(dim=(2, 3)))
    assert torch.allclose(supernet(x), expected, atol=1e-6)


def test_a_derived_network_is_its_genotype_written_out(tmp_path):
    """The last of three cells, of one node: skip (halving) of the first input, a dilated convolution of the second."""
    module = made("darts_network", TINY, genotype=str(written(tmp_path)), channels=2, cells=3).eval()
    x = examples(TINY, 3)
    stem = module.stem(x)
    zeroth = module.cells[0](stem, stem, None)
    first = module.cells[1](stem, zeroth, None)
    cell = module.cells[2]
    assert (zeroth.shape, first.shape) == ((3, 2, 8, 8), (3, 4, 4, 4))
    one, other = cell.first(zeroth), cell.second(first)
    skip, dilated = cell.edges
    even = nn.functional.conv2d(one.relu()[:, :, ::2, ::2], skip.even.weight)
    odd = nn.functional.conv2d(one.relu()[:, :, 1::2, 1::2], skip.odd.weight)
    depthwise = nn.functional.conv2d(other.relu(), dilated[1].weight, stride=2, padding=2, dilation=2, groups=8)
    node = skip.norm(torch.cat([even, odd], dim=1)) + dilated[3](nn.functional.conv2d(depthwise, dilated[2].weight))
    assert torch.allclose(module(x), module.head[1](node.mean(dim=(2, 3))), atol=1e-6)


def best_cell(alpha):
    """Of all pairs of edges, and operations on them, those with the largest sum of shares."""
    shares, cell, start = softmax(alpha, axis=1), [], 0
    for node in itertools.count():
        if start == len(alpha):
            return cell
        alternatives = [
            (shares[start + a, p] + shares[start + b, q], [[COLUMNS[p], a], [COLUMNS[q], b]])
            for a, b in itertools.combinations(range(2 + node), 2)
            for p, q in itertools.product(range(1, 8), repeat=2)
        ]
        cell.append(max(alternatives)[1])
        start += 2 + node
    return None


@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.01, 5))
@settings(max_examples=40, deadline=None)
def test_derivation_is_the_best_of_all_alternatives(seed, nodes, spread):
    normal, reduce = np.random.default_rng(seed).normal(size=(2, nodes * (nodes + 3) // 2, 8)) * spread
    found = derive(torch.tensor(normal), torch.tensor(reduce)).model_dump(mode="json")
    assert found == {"normal": best_cell(normal), "reduce": best_cell(reduce)}


def planted(genotype, spread=0.0):
    """Alphas in which the edges of a genotype stand out; `none` is the largest of all on every other edge."""
    alphas = []
    for kind in ("normal", "reduce"):
        cell = genotype[kind]
        alpha = spread * torch.randn(sum(map(len, all_edges(len(cell)))), 8)
        alpha[:, 0] = 3.0
        start = 0
        for node, edges in enumerate(cell):
            for name, source in edges:
                alpha[start + source, COLUMNS.index(name)] = 2.0
            start += 2 + node
        alphas.append(alpha)
    return alphas


def test_a_planted_architecture_is_found_although_none_is_stronger():
    assert derive(*planted(PUBLISHED, 0.3)).model_dump(mode="json") == PUBLISHED


def test_of_equals_the_first_wins_even_where_shares_are_too_small_for_floats():
    first = [[["max_pool_3x3", 0], ["max_pool_3x3", 1]]] * 2
    assert derive(torch.zeros(5, 8), torch.zeros(5, 8)).model_dump(mode="json")["normal"] == first
    alpha = torch.zeros(2, 8)
    alpha[:, 0], alpha[1, 5] = 5000.0, 9.0
    assert derive(alpha, alpha).normal == ((("max_pool_3x3", 0), ("sep_conv_5x5", 1)),)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.zeros(5, 7), r"alpha_reduce of shape \[5, 7\] is no alpha of a search"),
        (torch.zeros(4, 8), "it needs 2, 5, 9, 14"),
        (torch.zeros(0, 8), "no alpha"),
        (torch.zeros(8), "no alpha"),
        (torch.full((5, 8), torch.nan), "alpha_reduce holds NaN"),
    ],
)
def test_what_is_no_alpha_is_refused(alpha, message):
    with pytest.raises(InputError, match=message):
        derive(torch.zeros(5, 8), alpha)


def run_script(monkeypatch, *arguments):
    """What the script ends with."""
    script = str(ROOT / "scripts/derive_architecture.py")
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    return end.value.code


def test_the_script_derives_from_a_global_model_and_its_file_is_a_model(tmp_path, monkeypatch, capsys):
    supernet = made("darts", TINY, channels=2, cells=3, nodes=4)
    normal, reduce = planted(PUBLISHED)
    supernet.load_state_dict(supernet.state_dict() | {"alpha_normal": normal, "alpha_reduce": reduce})
    save_file(dict(supernet.named_parameters()), tmp_path / "model.safetensors")
    assert genotype_of(tmp_path) == Genotype.model_validate(PUBLISHED)
    out = tmp_path / "found.json"
    assert not run_script(monkeypatch, tmp_path, out)
    assert "reduce node 3 = max_pool_3x3(1) + skip_connect(2)" in capsys.readouterr().out
    assert json.loads(out.read_text()) == PUBLISHED
    assert made("darts_network", TINY, genotype=str(out), channels=2, cells=3)(examples(TINY, 2)).shape == (2, 4)
    assert run_script(monkeypatch, tmp_path / "none", out) == 2
    assert "none: has no model.safetensors" in capsys.readouterr().err


def test_folders_without_a_search_are_told(tmp_path):
    with pytest.raises(InputError, match=r"has no model.safetensors; give a global model of a run"):
        genotype_of(tmp_path)
    save_file({"weight": torch.zeros(3), "alpha_reduce": torch.zeros(2, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"has no alpha_normal; only a run with model.name=darts searches"):
        genotype_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12")
    with pytest.raises(InputError, match="is no readable safetensors file"):
        genotype_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normal": [[["sep_conv_3x3", 0], ["sep_conv_7x7", 1]]]}, r"normal\.0\.1\.0: .*'skip_connect'"),
        ({"normal": [[["none", 0], ["skip_connect", 1]]]}, "is no genotype"),
        ({"normal": [[["skip_connect", 1], ["skip_connect", 1]]]}, "node 0: its edges need two different sources"),
        ({"reduce": [[["skip_connect", 0], ["skip_connect", 2]]]}, "reduce, node 0: .* of 0 to 1"),
        ({"normal": [[["skip_connect", 0]]]}, "is no genotype"),
        ({"normal": []}, "is no genotype"),
        ({"normal": PUBLISHED["normal"]}, "normal has 4 nodes and reduce 1"),
        ({"normal_concat": [2]}, "normal_concat: Extra inputs"),
    ],
)
def test_a_wrong_genotype_is_told_before_a_network_is_built(tmp_path, change, message):
    path = written(tmp_path, PLAIN | change)
    with pytest.raises(InputError, match=message) as error:
        model.build("darts_network", {"genotype": str(path)})
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_genotype(tmp_path / "none.json")


def test_supernets_and_derived_networks_are_functions_of_their_weights(tmp_path):
    """As every model: one set of weights, or a stack of clients'."""
    path = str(written(tmp_path, PUBLISHED))
    for name, parameters in (("darts", SMALL), ("darts_network", {"genotype": path, "channels": 2, "cells": 3})):
        clients = [made(name, TINY, seed=seed, **parameters) for seed in range(3)]
        for client in clients:
            client(torch.randn(6, *TINY.input))  # running statistics of its own
            client.eval()
        x = torch.stack([examples(TINY, 4, seed=seed) for seed in range(3)])
        alone = torch.stack([client(rows) for client, rows in zip(clients, x, strict=True)])
        weights, buffers = stack_module_state(clients)
        together = vmap(lambda p, b, rows, one=clients[0]: functional_call(one, (p, b), (rows,)))(weights, buffers, x)
        assert torch.allclose(together, alone, atol=1e-5)
        assert not torch.allclose(alone[0], alone[1])
        assert isinstance(clients[0], Searched) == (name == "darts")
        assert made(name, CIFAR10, **parameters)(examples(CIFAR10, 2)).shape == (2, 10)


def test_every_weight_and_every_alpha_is_used():
    supernet = made("darts", TINY, **SMALL)
    nn.functional.cross_entropy(supernet(examples(TINY, 5)), torch.tensor([0, 1, 2, 3, 0])).backward()
    for name, parameter in supernet.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("alpha"):
            assert (parameter.grad != 0).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [(TEXT, "takes images"), (Shape((1, 4, 4), 9, None), "8 x 8"), (Shape((3, 30, 32), 9, None), "multiples of 4")],
)
def test_a_search_says_what_it_cannot_take(shape, message):
    with pytest.raises(InputError, match=message):
        made("darts", shape)


def test_a_network_needs_a_cell_of_each_kind():
    for name, parameters in (("darts", {}), ("darts_network", {"genotype": "none.json"})):
        with pytest.raises(InputError, match="cells: Input should be greater than or equal to 3"):
            model.build(name, {**parameters, "cells": 2})
