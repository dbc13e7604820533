import pytest

from .runs import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    return Launcher(tmp_path_factory.mktemp("runs"))
