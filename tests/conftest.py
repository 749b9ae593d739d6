import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        from families import FAMILIES

        metafunc.parametrize("family", FAMILIES, indirect=True)


@pytest.fixture
def family(request):
    """One row of the table of families; a test that takes it runs on every row."""
    from families import load

    return load(request.param)
