"""Ops opened up for `FlopCounterMode`: without their registered formulas it sees the products inside."""

import importlib
import pkgutil

import pytest
import torch
from torch._library.custom_ops import CustomOpDef

import powertrain.ops


def open_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every custom op of `powertrain.ops` by its Python implementation and autograd."""
    names = [module.name for module in pkgutil.iter_modules(powertrain.ops.__path__)]
    modules = [importlib.import_module(f"powertrain.ops.{name}") for name in names]
    opened: dict[int, object] = {}
    for module in modules:
        for attribute, value in list(vars(module).items()):
            if isinstance(value, CustomOpDef):
                if id(value) not in opened:
                    opened[id(value)] = _open(value)
                monkeypatch.setattr(module, attribute, opened[id(value)])
    assert opened


def _open(op: CustomOpDef) -> object:
    if op._backward_fn is None:
        return op._init_fn
    function = type(
        op._qualname.replace("::", "_"),
        (torch.autograd.Function,),
        {
            "forward": staticmethod(op._init_fn),
            "setup_context": staticmethod(lambda ctx, inputs, output: op._setup_context_fn(ctx, inputs, output)),
            "backward": staticmethod(op._backward_fn),
        },
    )
    return function.apply
