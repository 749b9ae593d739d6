import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config):
    import torchvision_ops

    torchvision_ops.declare()


def pytest_generate_tests(metafunc):
    for fixture, table in (("family", "FAMILIES"), ("specimen", "KINDS"), ("relative", "RELATIVES")):
        if fixture in metafunc.fixturenames:
            import families

            metafunc.parametrize(fixture, getattr(families, table), indirect=True)


@pytest.fixture
def family(request):
    """One row of the table of families; a test that takes it runs on every row."""
    return _load(request)


@pytest.fixture
def specimen(request):
    """One family of each kind; a test that takes it runs on those alone."""
    return _load(request)


@pytest.fixture
def relative(request):
    """One type that shares its parts with a family."""
    return _load(request)


def _load(request):
    from families import load

    return load(request.param)
