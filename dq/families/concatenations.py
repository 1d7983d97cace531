"""Where a layer's input is a concatenation of unlike halves, each of which deserves scales of its own.

    y = W[:, :c] Q(x[:, :c]) + W[:, c:] Q(x[:, c:]) + bias        x (..., in) = cat(h (..., c), skip (..., in - c))

Q-Diffusion (arXiv 2302.04304) found it at the shortcut convolutions of U-Net up-blocks, whose halves differ by up to
200 times in range. The same holds for the long skips of Hunyuan-DiT and for FLUX-like single-stream blocks, which
concatenate attention and MLP. The cut is read off the modules: nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from dq.families import Family
from dq.layers import naming
from dq.plan import Plan


def found(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Layer name -> input channels at which its input is cut, for every concatenated input this model is known by."""
    cuts = dict(_shortcuts(model))
    for name, module in naming.named(model):
        for key, cut in _inside(module):
            cuts[f"{name}.{key}".lstrip(".")] = (cut,)
    return cuts


def apply(plan: Plan, model: nn.Module, family: Family) -> Plan:
    """The plan with `splits` set on every layer inside the family's blocks whose input is a known concatenation.

    Layers whose activations stay in floating point are cut as well: the halves of the weight then have own scales.
    """
    cuts = {name: cut for name, cut in found(model).items() if name in plan.layers}
    inside = {name for name in cuts if any(name.startswith(f"{block}.") for block in family.blocks)}
    layers = {n: replace(row, splits=cuts[n]) if n in inside else row for n, row in plan.layers.items()}
    return replace(plan, layers=layers)


def _inside(module: nn.Module) -> Iterator[tuple[str, int]]:
    """(child, cut) for the concatenations that a block makes in front of one of its own linears."""
    skip, out, to_out, mlp = (_child(module, key) for key in ("skip_linear", "proj_out", "to_out", "proj_mlp"))
    if isinstance(skip, nn.Linear) and skip.in_features == 2 * skip.out_features:  # Hunyuan-DiT: hidden | long skip
        yield "skip_linear", skip.out_features
    attention_first = isinstance(out, nn.Linear) and isinstance(mlp, nn.Linear)
    if attention_first and out.in_features > out.out_features:  # FLUX, Chroma, HunyuanVideo ...: attention | mlp  # pyright: ignore[reportOperatorIssue]
        yield "proj_out", out.out_features  # pyright: ignore[reportReturnType]
    if isinstance(to_out, nn.Linear) and hasattr(module, "to_qkv_mlp_proj"):  # FLUX.2: the same inside its attention
        yield "to_out", module.inner_dim


def _child(module: nn.Module, key: str) -> nn.Module | None:
    """A child, or the layer within the adapters on it."""
    child = module._modules.get(key)
    return None if child is None else naming.inner(child)


def _shortcuts(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """U-Nets: each resnet of an up-block reads cat(output of the module before it, skip); conv1 sees it normalised."""
    blocks = getattr(model, "up_blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        return
    below = getattr(model, "mid_block", None) or getattr(model, "down_blocks", None)
    hidden = _width(below) if below is not None else 0
    for i, block in enumerate(blocks):
        for j, resnet in enumerate(getattr(block, "resnets", None) or ()):
            for name, module in naming.named(resnet):
                shortcut = _child(module, "conv_shortcut")
                if isinstance(shortcut, nn.Module) and 0 < hidden < getattr(shortcut, "in_channels", 0):
                    yield f"up_blocks.{i}.resnets.{j}.{name}.conv_shortcut".replace("..", "."), (hidden,)
            hidden = _width(resnet) or hidden


def _width(module: nn.Module) -> int:
    """Output channels of the last residual block inside `module`, 0 without one."""
    blocks = [part for part in module.modules() if hasattr(part, "conv_shortcut") and hasattr(part, "out_channels")]
    return blocks[-1].out_channels if blocks else 0
