"""What vllm's workers are asked, each of them in its own process."""

from __future__ import annotations

from typing import Any

from lem.host import peak_memory_bytes


def attention_backends(worker: Any) -> list[str]:
    """Return the kernels of the model's attention layers."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return sorted({layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")})


def weights(worker: Any) -> tuple[int, int]:
    """Return the number of the model's weights, and their size in bytes."""
    parameters = list(worker.model_runner.get_model().parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def device_uuid(_worker: Any) -> str:
    """Return the GPU that the worker computes on."""
    import torch

    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def synchronize(_worker: Any) -> None:
    """Wait until the worker's GPU has done what it was given."""
    import torch

    torch.cuda.synchronize()


def reset_peak(_worker: Any) -> None:
    """Reset the CUDA allocator's peak."""
    import torch

    torch.cuda.reset_peak_memory_stats()


def peak_on_gpu(_worker: Any) -> int:
    """Return the CUDA allocator's peak since the reset, in bytes."""
    import torch

    return int(torch.cuda.max_memory_allocated())


def peak_of_process(_worker: Any) -> int | None:
    """Return the worker process's own peak, in bytes."""
    return peak_memory_bytes()
