"""Invented molecules of synthetic medications: chains of common groups, valid as SMILES."""

import numpy as np
import pyarrow as pa

from cafemed.synthetic.generator import MOLECULE_STREAM, Population, stream

#: Any of these may follow any other: each begins and ends with an atom that takes a bond.
_GROUPS = ("C", "CC", "C(C)C", "C(=O)N", "CO", "NC", "c1ccccc1", "C1CCCCC1", "C(O)C", "C(F)C", "CS")
_ENDS = ("C", "O", "N", "C(=O)O", "Cl")
_MOST_GROUPS, _MOST_MOLECULES = 6, 3


def table(population: Population) -> pa.Table:
    """Draws drugs/atc3_smiles.csv: one to three molecules a medication, some of them shared."""
    rng = stream(population.seed, MOLECULE_STREAM)
    names = [name.split(":")[1] for name in population.model.medications]
    pool = [_molecule(rng) for _ in range(2 * len(names))]
    chosen = [
        rng.choice(len(pool), rng.integers(1, _MOST_MOLECULES + 1), replace=False).tolist()
        for _ in names
    ]
    return pa.table(
        {
            "atc3": [name for name, of_one in zip(names, chosen, strict=True) for _ in of_one],
            "smiles": [pool[i] for of_one in chosen for i in of_one],
        }
    )


def _molecule(rng: np.random.Generator) -> str:
    groups = rng.choice(_GROUPS, rng.integers(2, _MOST_GROUPS + 1)).tolist()
    return "C" + "".join(groups) + str(rng.choice(_ENDS))
