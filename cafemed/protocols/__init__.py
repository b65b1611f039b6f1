"""Protocols: how records become a cohort."""

from cafemed.cohort import Cohort
from cafemed.drugs import DrugKnowledge
from cafemed.protocols.config import CohortConfig
from cafemed.protocols.laboratory import with_laboratory
from cafemed.protocols.protocol_clean import clean
from cafemed.protocols.protocol_published import published
from cafemed.protocols.summary import ddi_rate, summary
from cafemed.records import Dropped, Records

__all__ = ["CohortConfig", "build", "clean", "ddi_rate", "published", "summary", "with_laboratory"]


def build(
    records: Records, drugs: DrugKnowledge, config: CohortConfig
) -> tuple[Cohort, list[Dropped]]:
    """Makes the cohort of the configured protocol, and counts what each filter dropped.

    Raises:
        DataError: if too few patients are left.
    """
    make = clean if config.protocol == "clean" else published
    return make(records, drugs, config)
