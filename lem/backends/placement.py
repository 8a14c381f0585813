"""Places one model on several devices: spreads its layers over GPUs, or splits each layer over processes.

Either kind of plan needs only the model's config and the sizes of its weights, so a model on the meta device is enough.
transformers carries out the plans. This module does not consider the memory or the speed of a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from lem.errors import RunError
from lem.machine.gpu import visible


def spread(model: Any, devices: int) -> dict[str, int]:
    """Return the device (numbered from 0) for each part of a model, dividing the weights about equally.

    The weights, in order, are divided into one equal share per device. A part goes to the device whose share contains
    the middle of the part. Modules that the model declares unsplittable stay whole. Parts that share weights (such as
    the embeddings and a tied output projection) go to the same device.

    Raises:
        RunError: the model does not declare its unsplittable modules, or its parts are too few or too unequal in size.
    """
    whole = frozenset(model._no_split_modules or ())
    if not whole:
        raise RunError(f"transformers does not know which parts of {type(model).__name__} must stay on one GPU.")
    parts = list(_parts(model, "", whole))
    total = sum({id(p): p.nbytes for _, part in parts for p in _weights(part)}.values())
    placed: dict[str, int] = {}
    home: dict[int, int] = {}
    before = 0
    for name, part in parts:
        new = {id(p): p.nbytes for p in _weights(part) if id(p) not in home}
        size = sum(new.values())
        shared = [home[id(p)] for p in _weights(part) if id(p) in home]
        own = min(devices - 1, int((before + size / 2) * devices / total))
        placed[name] = shared[0] if shared else own
        home.update(dict.fromkeys(new, placed[name]))
        before += size
    used = len(set(home.values()))
    if used < devices:
        raise RunError(
            f"The model's layers can be spread over at most {used} of the {devices} GPUs. Lower parallelism.degree."
        )
    return placed


def _parts(module: Any, name: str, whole: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Yield the named parts to place, in order: unsplittable or childless modules, and the tensors outside these."""
    children = list(module.named_children())
    if name and (not children or type(module).__name__ in whole):
        yield name, module
        return
    prefix = f"{name}." if name else ""
    for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield prefix + own, tensor
    for child, inner in children:
        yield from _parts(inner, prefix + child, whole)


def _weights(part: Any) -> list[Any]:
    """Return the parameters of a part; if the part is a tensor, return only that tensor."""
    return list(part.parameters()) if hasattr(part, "parameters") else [part]


def split_over_ranks(config: Any, degree: int) -> Any:
    """Return the configuration with which transformers splits each layer over all processes.

    Raises:
        RunError: transformers has no plan for the model or is too old, or the attention heads cannot be divided evenly.
    """
    from transformers.distributed import DistributedConfig

    text = config.get_text_config()
    plan = getattr(config, "base_model_tp_plan", None) or getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise RunError(f"transformers has no tensor-parallel plan for models of type {config.model_type}.")
    if any("attn" in name for name in plan):
        for name, kind in {"num_attention_heads": "attention", "num_key_value_heads": "key/value"}.items():
            heads = getattr(text, name, None)
            if heads and heads % degree:
                raise RunError(f"the model's {kind} heads ({heads}) cannot be divided evenly among {degree} processes.")
    try:
        return DistributedConfig(tp_size=degree, tp_plan="auto")
    except TypeError:
        raise RunError("tensor_parallel needs a newer transformers: pip install -U transformers.") from None


def show_own_gpus(local_rank: int, count: int) -> None:
    """Make only this process's GPUs visible to CUDA, under names that every engine understands.

    This must be called before the engine is imported. Each process of a node, numbered by `local_rank`, uses `count`
    GPUs.

    Raises:
        RunError: too few GPUs are visible.
    """
    there, end = visible(), (local_rank + 1) * count
    if len(there) < end:
        raise RunError(f"GPUs needed: {end}, visible: {len(there)}. Lower num_processes or parallelism.degree.")
    own = there[end - count : end]
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.mig_uuid or str(gpu.index) for gpu in own)
