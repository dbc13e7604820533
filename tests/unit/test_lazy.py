import importlib

import pytest

PACKAGES = ["anchorctx", "anchorctx.attention", "anchorctx.integrations", "anchorctx.kvcomm", "anchorctx.models"]


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_found_and_others_are_not(name: str) -> None:
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match=f"'{name}' has no attribute 'nothing'"):
        _ = package.nothing
