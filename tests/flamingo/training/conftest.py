import pytest

from tests.helpers import tiny_run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of shards."""
    folder = tmp_path_factory.mktemp("data")
    tiny_run.write(folder)
    return folder
