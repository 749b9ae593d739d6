"""What the tests of `plphp profile` share: a short request, and a profile without a command line."""

import dataclasses

import torch

from plphp_cli.config import PLPHPConfig
from plphp_cli.models.options import LoadOptions
from plphp_cli.profiling.records import PRUNED, STOCK, UNPRUNED
from plphp_cli.profiling.session import ProfileSession
from plphp_cli.profiling.state import ProfileRequest, Question
from plphp_cli.profiling.statistics import MIN_PAIRS

ALL = (PRUNED, UNPRUNED, STOCK)
CPU = torch.device("cpu")
TOKENS = 20


def request(toy, images, **changes):
    base = ProfileRequest(
        questions=(Question(images, "what changed?", answer="the circle is red."),),
        config=PLPHPConfig(),
        arms=ALL,
        model=toy,
        options=LoadOptions(device="cpu"),
        repeats=MIN_PAIRS,
        max_new_tokens=TOKENS,
        command=("plphp", "profile"),
    )
    return dataclasses.replace(base, **changes)


def profiled(asked, clock=None, before=None):
    session = ProfileSession(asked, clock=clock)
    session.load()
    if before is not None:
        before(session)
    session.run()
    return session.record()
