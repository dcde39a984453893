import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _each_cell_is_composed_once() -> Iterator[None]:
    """A tenth of a second for each of a recipe's cells, in every test that expands it, would be minutes."""
    from powertrain.scaling import catalog

    compose = catalog.compose

    @functools.cache
    def composed(overrides: tuple[str, ...]):
        return compose(list(overrides))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "compose", lambda overrides: composed(tuple(overrides)))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: at the end one worker would be left with them."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
