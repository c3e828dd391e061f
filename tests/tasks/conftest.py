"""A tokenizer that knows the words of the tests' files."""

import pytest

from tests.conftest import WORDS, train_wordpiece


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = train_wordpiece([" ".join(WORDS)] * 3)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own class has them
    return tokenizer
