"""A population with known truth, written as hospital tables (docs/synthetic.md)."""

from cafemed.synthetic.config import SyntheticConfig
from cafemed.synthetic.generator import Population, generate
from cafemed.synthetic.tables import write_tables
from cafemed.synthetic.truth import Truth

__all__ = ["Population", "SyntheticConfig", "Truth", "generate", "write_tables"]
