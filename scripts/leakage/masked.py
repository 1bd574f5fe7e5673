"""Tokens from an update of which only the largest coordinates were sent, by an attacker who knows that.

A coordinate that was not sent is unknown, not zero: each row is a combination of atoms in the coordinates that it has.
The pursuit is `lora_tokens`' with each row measured where it is known; rows share their atoms, but no longer a space,
so that their scores are added up instead (simultaneous orthogonal pursuit; Tropp et al. 2006).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm_sec.attacks.reconstruction.dictionary import Dictionary

LEFT = 1e-8  # of a row's squared length: rounding
SPANNED = 1e-4  # of an atom's squared length where a row is known
KNOWN = 8  # coordinates; of a row with fewer nothing is asked


@dataclass(frozen=True)
class Masked:
    """What was found.

    Attributes:
        tokens: in the order in which they were taken.
        explained: the share of the rows' squared lengths.
    """

    tokens: list[int]
    explained: float


def masked_pursuit(rows: Tensor, atoms: Dictionary, length: int, most: int) -> Masked:
    """Take the atoms that explain most of the rows, one after another.

    Args:
        rows: (k, d) float64, zero where a coordinate was not sent.
        atoms: the dictionary.
        length: of the longest text; its positions are taken to be used.
        most: atoms.
    """
    known = [row for row in rows if int(row.count_nonzero()) > KNOWN]
    if not known:
        return Masked([], 0.0)
    table = atoms.kept
    fixed = torch.cat([atoms.constants, atoms.positions[:length]])
    bases, lefts, squares, places, tables = [], [], [], [], []
    for row in known:
        place = row.nonzero().flatten()
        u, values, _ = torch.linalg.svd(fixed[:, place].T, full_matrices=False)
        basis = u[:, values > 1e-9 * values[0]]
        here, unit = table[:, place], row[place] / row.norm()
        left = unit - basis @ (basis.T @ unit)
        bases.append(basis)
        lefts.append(left)
        places.append(place)
        tables.append(here)
        squares.append(here.double().square().sum(dim=1) - (here @ basis.float()).double().square().sum(dim=1))
    wholes = [here.double().square().sum(dim=1) for here in tables]
    tokens: list[int] = []
    while len(tokens) < most and max(float(left.square().sum()) for left in lefts) > LEFT:
        gains = torch.zeros(atoms.size, dtype=torch.float64)
        for left, square, whole, here in zip(lefts, squares, wholes, tables, strict=True):
            energy = left.square().sum()
            if energy > LEFT:
                inner = (here @ left.float()).double().square()
                gains += torch.where(square > SPANNED * whole, inner / square, 0.0) / energy
        gains[tokens] = 0.0
        token = int(gains.argmax())
        tokens.append(token)
        for i, place in enumerate(places):
            vector = atoms.atom(token)[place]
            new = vector - bases[i] @ (bases[i].T @ vector)
            new = new - bases[i] @ (bases[i].T @ new)
            if float(new.norm()) ** 2 <= SPANNED * float(wholes[i][token]) or bases[i].shape[1] >= len(place) - 1:
                continue
            new = new / new.norm()
            bases[i] = torch.cat([bases[i], new[:, None]], dim=1)
            lefts[i] = lefts[i] - new * (new @ lefts[i])
            squares[i] = squares[i] - (tables[i] @ new.float()).double().square()
    left = sum(float(each.square().sum()) for each in lefts) / len(lefts)
    return Masked(tokens, 1 - left)
