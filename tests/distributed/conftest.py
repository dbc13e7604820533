import pytest

from .runs import Launcher


@pytest.fixture(scope="module")  # each file has a folder of its own: a run's name in one is not taken in another
def launcher(tmp_path_factory):
    return Launcher(tmp_path_factory.mktemp("runs"))
