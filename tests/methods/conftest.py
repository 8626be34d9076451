"""Fixtures of the methods' tests, as words of a command: a teacher and a Stage II model or a ranking."""

import pytest
from helpers import BLOCKS
from method_cases import ranked_models, write_hunyuan, write_models


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> list[str]:
    return write_models(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory) -> list[str]:
    return write_hunyuan(tmp_path_factory.mktemp("hunyuan"))


@pytest.fixture(scope="module")
def ranked_wan(tmp_path_factory) -> list[str]:
    return ranked_models(tmp_path_factory.mktemp("wan"), write_models, [1, 2], BLOCKS)


@pytest.fixture(scope="module")
def ranked_hunyuan(tmp_path_factory) -> list[str]:
    return ranked_models(tmp_path_factory.mktemp("hunyuan"), write_hunyuan, [1, 4], 5)
