"""Finds the sizes that determine a model's FLOPs by running the model's text part on tensors without values.

The text part is built on PyTorch's device `meta`, where tensors have shapes but no values. PyTorch's own FLOP counter
counts the matrix products of a few short forward passes. In each layer, the cost that grows linearly with the number of
tokens belongs to the body, and the cost that grows quadratically belongs to attention. The peculiarities of a model
family (low-rank projections, heads of several sizes, layers that share keys and values, shared experts) thus come from
transformers' own code, and a model's image part is never run. How far back a layer attends (for example, within a
sliding window) is read from the config. If the costs do not grow linearly or quadratically as
described here, the sizes are unknown, and the exception gives the reason.

The module also measures the size of a cache by adding up its tensors. It knows nothing about engines.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from lem.workload.flops import Architecture, Attention, UnknownArchitecture

# The lengths of the forward passes; three are needed to separate constant, linear and quadratic parts.
LENGTHS = (2, 3, 5)
# The part of a pass's cost that does not depend on the pass's length may be at most this share of a token's cost.
CONSTANT_SHARE = 0.002
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# GPT-Neo's names for its kinds of layers.
KINDS = {"global": FULL, "local": SLIDING}
# The config keys about windows whose meaning is known. Any other such key may limit how far back layers attend.
WINDOWS = frozenset([
    "sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern",
])  # fmt: skip
# Keys under which configs give the number of experts, and the number of experts to which a token is routed.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")
# Config keys to remove: transformers would act on them, although no weights are loaded here.
LOADING = ("quantization_config", "distributed_config", "device_map")


def architecture_of(model: Any) -> Architecture:
    """Return the sizes of a transformers model, with or without weights, including any loaded LoRA adapter's matrices.

    Raises:
        UnknownArchitecture: the sizes cannot be determined; the message is the reason.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hollow = _text_model(inner)
    head = hollow.get_output_embeddings()
    if head is None:
        raise UnknownArchitecture("the model has no output projection")
    found = (hollow.get_decoder(), hollow.base_model, getattr(hollow, "model", None))
    decoder = next((each for each in found if each is not hollow), None)
    if decoder is None:
        raise UnknownArchitecture("the model's layers cannot be told apart from its output projection")
    _check_nothing_else(hollow, decoder, head)
    layers, body = _costs(decoder, hollow.config)
    of_body, of_head = _adapter_weights(model) if inner is not model else (0, 0)
    return Architecture(
        body_weights=round(body / 2) + of_body,
        head_weights=sum(int(p.numel()) for p in head.parameters() if p.ndim == 2) + of_head,
        attention=_grouped(layers, hollow.config),
    )


# ------------------------------------------------------------------ the model without values
def _text_model(model: Any) -> Any:
    """Return a model's text part on device `meta`, in eval mode, with kernels that PyTorch's FLOP counter supports."""
    import torch
    import transformers

    of_text = model.config.get_text_config()
    config = copy.deepcopy(of_text)
    for name in LOADING:
        if hasattr(config, name):
            delattr(config, name)
    try:
        with torch.device("meta"):
            if of_text is model.config:
                hollow = type(model)._from_config(config, attn_implementation="eager")
            else:
                hollow = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:  # the model's own code may fail on tensors without values
        raise UnknownArchitecture(f"the text model cannot be built without weights ({_brief(error)})") from error
    hollow.eval()
    # With this implementation, the experts need no values. Models without experts reject the option.
    with suppress(Exception):
        hollow.set_experts_implementation("batched_mm")
    return hollow


def _check_nothing_else(hollow: Any, decoder: Any, head: Any) -> None:
    """Reject a model, such as BERT, with linear layers outside its transformer layers and output projection."""
    import torch

    known = {*decoder.modules(), *head.modules()}
    for module in hollow.modules():
        if module not in known and isinstance(module, torch.nn.Linear):
            outside = "outside its transformer layers and output projection"
            raise UnknownArchitecture(f"the model has linear layers {outside}")


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _adapter_weights(model: Any) -> tuple[int, int]:
    """Return how many of a LoRA adapter's weights belong to the model's body, and how many to its output projection."""
    of_body = of_head = 0
    for name, weight in model.named_parameters():
        if ".lora_" in name and weight.ndim == 2 and "embedding" not in name:
            if "lm_head" in name:
                of_head += int(weight.numel())
            else:
                of_body += int(weight.numel())
    return of_body, of_head


# ------------------------------------------------------------------ counting
@dataclass
class _Pass:
    """The FLOPs of one forward pass: of each layer, and of everything outside the layers.

    `experts` holds the FLOPs of each module that contains experts; these FLOPs are also part of `layers` or `rest`.
    """

    layers: list[int]
    experts: dict[str, int] = field(default_factory=dict)
    rest: int = 0


def _costs(decoder: Any, config: Any) -> tuple[list[Fraction], Fraction]:
    """Return each layer's FLOPs per attended position, and the other FLOPs per token (without the output head)."""
    layers = _layers(decoder, config)
    experts = _experts(decoder)
    passes = [_counted(decoder, layers, experts, length) for length in LENGTHS]
    body = _linear([each.rest for each in passes])
    attention = []
    for index in range(len(layers)):
        constant, linear, quadratic = _parts([each.layers[index] for each in passes])
        if abs(constant) > CONSTANT_SHARE * linear:
            raise UnknownArchitecture("the work of the model's layers is not proportional to the number of tokens")
        if quadratic <= 0:
            raise UnknownArchitecture("some of the model's layers do not attend to all earlier positions")
        attention.append(quadratic)
        body += linear
    for name, module in experts.items():
        body -= _wasted(module, _linear([each.experts.get(name, 0) for each in passes]), config)
    return attention, body


def _layers(decoder: Any, config: Any) -> Sequence[Any]:
    import torch

    count = getattr(config, "num_hidden_layers", None)
    for module in decoder.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    raise UnknownArchitecture("the model's layers were not found")


def _experts(decoder: Any) -> dict[str, Any]:
    """Return the modules that hold the weights of several experts in one tensor."""
    found = {}
    for name, module in decoder.named_modules():
        if any(p.ndim == 3 for p in module.parameters(recurse=False)) and "conv" not in type(module).__name__.lower():
            found[name] = module
    return found


def _wasted(module: Any, cost: Fraction, config: Any) -> Fraction:
    """Return the FLOPs per token for experts to which the token is not routed; some models run all experts.

    Raises:
        UnknownArchitecture: it is unknown how many experts are chosen, or the cost is neither the cost of the chosen
            experts nor the cost of all experts.
    """
    tensors = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    total, active = _named(config, EXPERTS), _named(config, EXPERTS_PER_TOKEN)
    each = sum(int(p.numel()) // int(p.shape[0]) for p in tensors)
    if total is None or active is None or any(p.shape[0] != total for p in tensors):
        raise UnknownArchitecture("it is unknown to how many of the model's experts a token is routed")
    if cost == 2 * active * each:
        return Fraction(0)
    if cost == 2 * total * each:
        return Fraction(2 * (total - active) * each)
    raise UnknownArchitecture("the work of the model's experts does not match the number of experts per token")


def _named(config: Any, names: Sequence[str]) -> int | None:
    values = [getattr(config, name, None) for name in names]
    return next((value for value in values if isinstance(value, int)), None)


def _counted(decoder: Any, layers: Sequence[Any], experts: Mapping[str, Any], length: int) -> _Pass:
    """Return the counted FLOPs of a forward pass over `length` tokens.

    Raises:
        UnknownArchitecture: the model's code needs values, for example because it loops over the chosen experts.
    """
    import torch

    found = _Pass([0] * len(layers))
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), _counting(found, layers, experts):
            decoder(input_ids=ids, use_cache=True)
    except Exception as error:  # the model's own code may fail on tensors without values
        reason = f"the model's code needs the values of tensors, not only their shapes ({_brief(error)})"
        raise UnknownArchitecture(reason) from error
    return found


@contextmanager
def _counting(into: _Pass, layers: Sequence[Any], experts: Mapping[str, Any]) -> Iterator[None]:
    """Add the FLOPs of each operation in the block to the layer and the experts whose modules are running."""
    running: list[tuple[str, Any]] = []
    with ExitStack() as ending:
        for kind, modules in (("layer", list(enumerate(layers))), ("experts", list(experts.items()))):
            for key, module in modules:
                begin = module.register_forward_pre_hook(lambda *_, at=(kind, key): running.append(at))
                end = module.register_forward_hook(lambda *_: running.pop() and None)
                ending.callback(begin.remove)
                ending.callback(end.remove)

        def add(flops: int) -> None:
            index = next((key for kind, key in running if kind == "layer"), None)
            if index is None:
                into.rest += flops
            else:
                into.layers[index] += flops
            for kind, key in running:
                if kind == "experts":
                    into.experts[key] = into.experts.get(key, 0) + flops

        ending.enter_context(_counter(add))
        yield


def _counter(add: Any) -> Any:
    """Return a dispatch mode that calls `add` with the FLOPs of each matrix product, as counted by PyTorch."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):  # type: ignore[misc]  # torch is untyped here
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            packet = func._overloadpacket
            if packet in flop_registry and not _is_outer_product(packet, args):
                add(int(flop_registry[packet](*args, **(kwargs or {}), out_val=out)))
            return out

    def _is_outer_product(packet: Any, args: Any) -> bool:
        """Return whether this is the outer product of positions and frequencies in rotary embeddings.

        Such products are not counted.
        """
        return packet is torch.ops.aten.bmm and args[0].shape[-1] == 1

    return Counter()


# ------------------------------------------------------------------ evaluating the passes
def _parts(costs: Sequence[int]) -> tuple[Fraction, Fraction, Fraction]:
    """Return the constant, linear and quadratic coefficients of the parabola through the costs at lengths `LENGTHS`."""
    (a, b, c), (fa, fb, fc) = LENGTHS, costs
    slope_ab, slope_bc = Fraction(fb - fa, b - a), Fraction(fc - fb, c - b)
    quadratic = (slope_bc - slope_ab) / (c - a)
    linear = slope_ab - quadratic * (a + b)
    return fa - linear * a - quadratic * a * a, linear, quadratic


def _linear(costs: Sequence[int]) -> Fraction:
    """Return the cost per token.

    Raises:
        UnknownArchitecture: the costs are not proportional to the number of tokens.
    """
    constant, linear, quadratic = _parts(costs)
    if quadratic or abs(constant) > CONSTANT_SHARE * linear:
        raise UnknownArchitecture("the model's work outside its layers is not proportional to the number of tokens")
    return linear


def _grouped(costs: Sequence[Fraction], config: Any) -> tuple[Attention, ...]:
    """Return the attention of all layers; layers that attend equally far back are added up in one entry."""
    widths: dict[tuple[int | None, bool], Fraction] = {}
    for index, cost in enumerate(costs):
        reach = _reach(config, index)
        widths[reach] = widths.get(reach, Fraction(0)) + cost / 4
    return tuple(Attention(round(width), *reach) for reach, width in widths.items())


def _reach(config: Any, layer: int) -> tuple[int | None, bool]:
    """Return how many positions back a layer attends (None means no limit), and whether it attends in chunks.

    Raises:
        UnknownArchitecture: the config does not specify the layer's reach in a known form, or the layer attends only to
            selected positions or keeps a state.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    of_layers = getattr(config, "per_layer_config", None)
    config = of_layers[layer] if of_layers is not None else config
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    by_window = SLIDING if window is not None else CHUNKED if chunk is not None else FULL
    kind = KINDS.get(kinds[layer], kinds[layer]) if kinds else by_window
    if kind == SLIDING and window is None:
        window = getattr(config, "window_size", None)
    elif not kinds and (unknown := _unknown_windows(config)):
        raise UnknownArchitecture(f"how far back the model's layers attend is unknown ({', '.join(unknown)})")
    if getattr(config, "index_topk", None) is not None or kind not in (FULL, SLIDING, CHUNKED):
        raise UnknownArchitecture("the model has layers that attend only to selected positions or keep a state")
    reach = {FULL: None, SLIDING: window, CHUNKED: chunk}[kind]
    if kind != FULL and not isinstance(reach, int):
        raise UnknownArchitecture("it is unknown how far back the model's layers attend")
    return reach, kind == CHUNKED


def _unknown_windows(config: Any) -> list[str]:
    """Return the keys of a config that may limit how far back layers attend, but whose meaning is unknown."""
    values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return [key for key, value in values.items() if "window" in key and value and key not in WINDOWS]


# ------------------------------------------------------------------ caches
def cache_bytes(cache: Any) -> int | None:
    """Return the size in bytes of a transformers cache; None if the cache contains no tensors.

    Each storage is counted once and in full. A tensor may be a view of only a part of a storage (such as the last
    tokens of a sequence), but it keeps the whole storage in memory.
    """
    import torch

    sizes: dict[int, int] = {}
    seen: set[int] = set()
    left = [cache]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, (torch.nn.Module, str, type)):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            # Scalars are counters, not part of the cache.
            if each.ndim > 1 and each.numel():
                storage = _own_part(each).untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(each, Mapping):
            left += each.values()
        elif isinstance(each, (list, tuple)):
            left += each
        else:
            left += vars(each).values() if hasattr(each, "__dict__") else ()
    return sum(sizes.values()) or None


def _own_part(tensor: Any) -> Any:
    """Return this process's part of a tensor that is split over several processes."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
