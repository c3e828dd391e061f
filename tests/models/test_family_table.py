"""The README's table of families is the one that the program prints, and each row is tested with the class it names."""

from pathlib import Path

from transformers import AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dsdistill.models.families import ANY, FAMILIES
from dsdistill.models.family_table import MARKERS, families_table
from dsdistill.objectives.table import with_table
from tests.models.families_under_test import FAMILIES as UNDER_TEST
from tests.models.families_under_test import WITHOUT_ENTRY, tiny_configs

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_table_is_current():
    document = README.read_text(encoding="utf-8")
    assert with_table(document, families_table(), MARKERS) == document, (
        "run: python -m dsdistill.models --update README.md"
    )


def test_every_family_is_tested_with_the_class_that_the_table_names():
    known = {name for name in FAMILIES if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES}  # in this version of transformers
    assert set(UNDER_TEST) == known | {WITHOUT_ENTRY}
    for name, config in tiny_configs().items():
        assert config.model_type == name
        assert type(AutoModelForMaskedLM.from_config(config)).__name__ == FAMILIES.get(name, ANY).tested
