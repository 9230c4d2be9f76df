from tests.stage.keys_table import in_docs, table


def test_the_table_of_keys_in_the_docs_is_current() -> None:
    assert in_docs() == table(), "write it anew: python -m tests.stage.keys_table"
