"""Fixtures of the methods' tests: a teacher and a Stage II model of each family, as words of a command."""

import pytest
from method_cases import write_hunyuan, write_models


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> list[str]:
    return write_models(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory) -> list[str]:
    return write_hunyuan(tmp_path_factory.mktemp("hunyuan"))
