"""The names that vramplan promises."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import vramplan


def modules_with_all() -> list[str]:
    names = ["vramplan"]
    for module in pkgutil.iter_modules(vramplan.__path__, "vramplan."):
        if module.name.split(".")[-1] not in ("__main__", "data", "retain", "simulate", "rank", "train", "measure"):
            names.append(module.name)
    return names


@pytest.mark.parametrize("name", modules_with_all())
def test_all_is_sorted_and_every_name_in_it_exists(name: str):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert list(exported) == sorted(exported)
    assert all(hasattr(module, item) for item in exported)


def test_the_package_has_a_version_and_an_all():
    assert vramplan.__version__ in vramplan.__dict__.values()
    assert "__version__" in vramplan.__all__
