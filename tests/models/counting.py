"""Counting FLOPs on a real model, by the formulas of the ops or by the products inside them."""

import importlib
import pkgutil

import pytest
import torch
from torch._library.custom_ops import CustomOpDef
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import powertrain.ops

aten = torch.ops.aten
# What FlopCounterMode leaves out: products in place, and SDPA's CPU kernel, which takes the formula of the CUDA kernel.
SAME_FORMULA = {
    aten.baddbmm_: aten.baddbmm,
    aten.addmm_: aten.addmm,
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


def flop_counter() -> FlopCounterMode:
    """A counter that leaves out no matrix product."""
    counter = FlopCounterMode(display=False)
    counter.flop_registry |= {op: flop_registry[like] for op, like in SAME_FORMULA.items()}
    return counter


def open_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every custom op of `powertrain.ops` by its Python implementation and autograd, which hide no product."""
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
