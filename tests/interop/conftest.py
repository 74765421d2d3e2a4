import pytest

from tests.helpers.encoders import untrained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """The folder of a run that has learned nothing."""
    folder = str(tmp_path_factory.mktemp("run"))
    untrained_run(folder)
    return folder
