import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config):
    import torchvision_ops

    torchvision_ops.declare()


def pytest_generate_tests(metafunc):
    for fixture, table in (
        ("family", "FAMILIES"),
        ("specimen", "KINDS"),
        ("relative", "RELATIVES"),
        ("kin", "KIN"),
    ):
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


@pytest.fixture
def kin(request):
    """One of the further types that the method is held to on a single prompt."""
    return _load(request)


def _load(request):
    from families import load

    return load(request.param)


@pytest.fixture
def llava():
    """The row of the table of families that most tests of one family take."""
    from families import load

    return load("llava")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A small LLaVA with random weights, as a folder."""
    from toy_model import save_toy_llava

    return str(save_toy_llava(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """The same in a folder of a name that can be misspelt."""
    from toy_model import save_toy_llava

    return save_toy_llava(tmp_path_factory.mktemp("toy") / "toy-llava")


@pytest.fixture(scope="session")
def loaded_toy(toy_folder):
    """The same, loaded."""
    from plphp_cli import models

    return models.load(str(toy_folder), device="cpu")


@pytest.fixture
def broken(toy_folder, tmp_path):
    """A copy of the toy's folder, to be changed."""
    import shutil
    from pathlib import Path

    return Path(shutil.copytree(toy_folder, tmp_path / "broken"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Three images of sizes that differ."""
    from PIL import Image

    from plphp_cli.images import load_image

    folder = tmp_path_factory.mktemp("pictures")
    for name, size, colour in [("red", (50, 40), "red"), ("blue", (7, 90), "blue"), ("dot", (1, 1), "green")]:
        Image.new("RGB", size, colour).save(folder / f"{name}.png")
    return [load_image(folder / f"{name}.png") for name in ("red", "blue", "dot")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two images to look at."""
    from PIL import Image

    from plphp_cli.images import load_image

    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    Image.radial_gradient("L").save(folder / "ring.png")
    return tuple(load_image(str(folder / name)) for name in ("red.png", "ring.png"))


@pytest.fixture
def quick(monkeypatch):
    """Profiles without fresh processes and bandwidth, which have tests of their own."""
    from plphp_cli.profiling import session as session_module
    from plphp_cli.profiling.fresh import FreshPeaks
    from plphp_cli.profiling.machine import Machine

    monkeypatch.setattr(
        session_module, "measure_machine", lambda device, dtype: Machine(1e9, 1e9, None, 1 << 30)
    )
    monkeypatch.setattr(session_module, "measure_fresh", lambda job: [FreshPeaks(1, 2, 3)] * len(job.prompts))
