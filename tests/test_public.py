"""Every public name says what it is."""

import importlib
import inspect
import pkgutil

import pytest

import fastsde

MODULES = [fastsde.__name__] + [m.name for m in pkgutil.walk_packages(fastsde.__path__, "fastsde.")]


def documented(obj):
    """Whether the object has its own docstring, and not one that Python or a base class made for it."""
    text = (obj.__doc__ or "").strip()
    # A dataclass without a docstring is given its signature as one.
    return bool(text) and not (inspect.isclass(obj) and text.startswith(f"{obj.__name__}("))


@pytest.mark.parametrize("name", fastsde.__all__)
def test_exported_names_exist_and_are_documented(name):
    obj = getattr(fastsde, name)
    assert documented(type(obj) if isinstance(obj, tuple) else obj)


@pytest.mark.parametrize("module_name", MODULES)
def test_public_functions_classes_and_methods_are_documented(module_name):
    module = importlib.import_module(module_name)
    assert documented(module)
    for name, obj in vars(module).items():
        if name.startswith("_") or getattr(obj, "__module__", None) != module_name:
            continue
        if inspect.isclass(obj) or inspect.isfunction(obj):
            assert documented(obj), name
        if inspect.isclass(obj):
            for method, value in vars(obj).items():
                if not method.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                    # A method that implements a documented abstract method needs no second docstring.
                    assert inspect.getdoc(getattr(obj, method)), f"{name}.{method}"
