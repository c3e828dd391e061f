"""The fused comparisons inside whole models: documents of a packed row stay apart there too."""

import pytest
import torch

from tests.models.test_documents import FUSED, check_borders


@pytest.mark.skipif(torch.cuda.is_available(), reason="models are on the CPU, where a GPU's Triton does not interpret")
@pytest.mark.parametrize("family", ["modernbert", pytest.param("bert", marks=pytest.mark.slow)])
def test_nothing_crosses_the_border_of_a_document_in_fused_comparisons(family):
    check_borders(family, FUSED, kernel="fused")
