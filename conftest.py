"""For all tests, and for the processes that they start."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before PyTorch is imported: with tiny models a second thread only waits
)


@pytest.fixture(scope="session", autouse=True)
def a_cache_of_tokens_that_goes_with_the_session(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
