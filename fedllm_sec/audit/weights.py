"""What the values of one adapter say by themselves: dead, constant, concentrated, out of balance, too long."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from fedllm_sec.audit.census import ENOUGH, Census
from fedllm_sec.audit.header import Fault
from fedllm_sec.audit.measure import REST, Measured
from fedllm_sec.audit.policy import Thresholds

LEAST_RANK = 4  # of a product, below which one direction is naturally most of it
LEAST_MODULES = 8  # below which one module is naturally most of it
TURNED = 0.5  # log10 by which A may be longer or shorter than the global adapter's
SMALL = 64  # values: fewer say nothing about copies


def check_values(census: Mapping[str, Census], factors: set[str], thresholds: Thresholds) -> Iterator[Fault]:
    """What single tensors say."""
    bad = [name for name, each in census.items() if each.bad]
    if bad:
        count = census[bad[0]].bad
        yield Fault("FS005", f"holds {count:,} values that are NaN, infinite or above 1e18", bad[0], bad[:20])
    constant = [name for name in sorted(factors) if name in census and census[name].is_constant]
    if constant:
        yield Fault("W010", f"holds {census[constant[0]].lowest:g} everywhere", constant[0], constant[:20])
    yield from repeated({name: each for name, each in census.items() if name in factors and name not in constant})
    denormal = {name: each.denormal / each.count for name, each in census.items() if each.count}
    worst = max(denormal, key=lambda name: denormal[name], default=None)
    if worst is not None and denormal[worst] > thresholds.denormal:
        text = f"is to {denormal[worst]:.1%} of denormal numbers"
        yield Fault("W012", text, worst, denormal[worst], thresholds.denormal)
    yield from rounded(census)


def repeated(census: Mapping[str, Census]) -> Iterator[Fault]:
    """Tensors that hold the same values; zeros are what B begins with."""
    first: dict[str, str] = {}
    for name, each in sorted(census.items()):
        if each.count >= SMALL and not each.is_zero and not each.is_constant and not each.bad:
            if each.sha256 in first:
                yield Fault("W011", f"holds the same values as {first[each.sha256][:200]!r}", name)
            first.setdefault(each.sha256, name)


def rounded(census: Mapping[str, Census]) -> Iterator[Fault]:
    """Values of a coarser format; a finding only where all large tensors are so, or one has very few values."""
    large = {name: each for name, each in census.items() if each.count >= ENOUGH and not each.is_zero and not each.bad}
    coarse = {name: what for name, each in large.items() if (what := each.coarseness)}
    few = [name for name, what in coarse.items() if what.endswith("values")]
    if few or (coarse and len(coarse) == len(large)):
        name = few[0] if few else next(iter(sorted(coarse)))
        yield Fault("W013", f"is stored more finely than its values are: {coarse[name]}", name, coarse[name])


def check_products(
    measured: Measured, row: int, ranks: Mapping[str, int], thresholds: Thresholds, *, is_update: bool
) -> Iterator[Fault]:
    """What the products of one adapter say, module by module and as a whole.

    Args:
        measured: by the pass.
        row: the adapter's.
        ranks: of each module's product.
        thresholds: the policy's.
        is_update: whether a global adapter was subtracted.
    """
    name = measured.names[row]
    if name in measured.unknown:
        module = measured.unknown[name]
        yield Fault("W004", "has factors that cancel so far that their product is not known", module)
        return
    norms = measured.measures["norm"][row]
    length = float(np.sqrt(np.square(norms).sum()))
    if not length > 0:
        yield (
            Fault("W014", "changes nothing: its products are those of the global adapter", None, 0.0)
            if is_update
            else Fault("W009", "does nothing: all its products are zero", None, 0.0)
        )
        return
    if thresholds.norm is not None and length > thresholds.norm:
        yield Fault("W001", f"is {length:.4g} long", None, length, thresholds.norm)
    yield from concentrated(measured, row, norms, ranks, thresholds)
    yield from out_of_balance(measured, row, thresholds)


def concentrated(
    measured: Measured, row: int, norms: NDArray[np.float64], ranks: Mapping[str, int], thresholds: Thresholds
) -> Iterator[Fault]:
    """Few directions, few entries, few modules."""
    energy = np.square(norms)
    wide = np.array([ranks.get(module, 0) >= LEAST_RANK for module in measured.modules])
    top1 = measured.measures["top1"][row]
    counted = wide & np.isfinite(top1)
    if counted.any() and energy[counted].sum() > 0:
        share = float((top1[counted] * energy[counted]).sum() / energy[counted].sum())
        if share > thresholds.top1:
            text = f"is to {share:.2%} one direction of each module"
            yield Fault("W002", text, None, share, thresholds.top1)
    kurtosis = measured.measures["kurtosis"][row]
    if np.isfinite(kurtosis).any():
        worst = int(np.nanargmax(kurtosis))
        if kurtosis[worst] > thresholds.kurtosis:
            text = f"has entries with the kurtosis {kurtosis[worst]:.0f} in {measured.modules[worst][:120]}"
            yield Fault("W003", text, measured.modules[worst], float(kurtosis[worst]), thresholds.kurtosis)
    products = [i for i, module in enumerate(measured.modules) if module != REST]
    if len(products) >= LEAST_MODULES and energy[products].sum() > 0:
        most = max(products, key=lambda i: energy[i])
        share = float(energy[most] / energy[products].sum())
        if share > thresholds.few_layers:
            text = f"is to {share:.0%} in {measured.modules[most][:120]}, one of {len(products)} modules"
            yield Fault("W008", text, measured.modules[most], share, thresholds.few_layers)


def out_of_balance(measured: Measured, row: int, thresholds: Thresholds) -> Iterator[Fault]:
    """Factors far apart in length, far from the global adapter's, or that moved far for what their product moved."""
    limit = float(np.log10(thresholds.gauge))
    for key, most, text in (
        ("slack", thresholds.slack, "has factors that moved {:.3g} times as far as their product in {}"),
        (
            "moved",
            TURNED,
            "has a factor A of 10^{:.2f} times the global adapter's length, and a B of the inverse, in {}",
        ),
        ("gauge", limit, "has a factor B of 10^{:.2f} times the length of A in {}"),
    ):
        values = measured.measures[key][row]
        finite = np.isfinite(values) | np.isposinf(values)
        if not finite.any():
            continue
        worst = int(np.argmax(np.where(finite, np.abs(values), -1)))
        if abs(values[worst]) > most:
            module = measured.modules[worst]
            value = float(values[worst]) if np.isfinite(values[worst]) else None
            yield Fault("W004", text.format(values[worst], module[:120]), module, value, most)
            return


def too_long_for_base(
    measured: Measured, row: int, base: Mapping[str, float], thresholds: Thresholds
) -> Iterator[Fault]:
    """Updates beside the norms of the weights that they change."""
    norms = measured.measures["norm"][row]
    shares = {m: float(norms[i]) / base[m] for i, m in enumerate(measured.modules) if base.get(m, 0) > 0}
    worst = max(shares, key=lambda module: shares[module], default=None)
    if worst is not None and shares[worst] > thresholds.of_base:
        text = f"is {shares[worst]:.3g} times as long as the base's weight in {worst[:120]}"
        yield Fault("W005", text, worst, shares[worst], thresholds.of_base)
