"""What a model costs: parameters, FLOPs, latency and peak memory."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from penstock.gates import GateNotFoundError, named_gates
from penstock.nn.conditional import evaluate_everything
from penstock.tasks.base import Task


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the fused attention on the CPU, which PyTorch's counter leaves out; as for its other kernels, a causal mask saves nothing."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


_COUNTED_TOO = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def flops(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Floating-point operations of one forward pass, as PyTorch's counter sees them (matrix products and convolutions)."""
    with FlopCounterMode(display=False, custom_mapping=_COUNTED_TOO) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


def latency_ms(model: nn.Module, inputs: tuple[Any, ...], *, repeats: int = 7) -> float:
    """Median time of a forward pass in milliseconds, after one to warm up."""
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            _synchronise()
            start = time.perf_counter()
            model(*inputs)
            _synchronise()
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def peak_memory_mb(task: Task, batch: Any) -> float:
    """Most memory that tensors held at once during a training step (forward and backward), in MiB, above the weights."""
    task.zero_grad(set_to_none=True)
    if torch.cuda.is_available() and next(task.parameters()).is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        task.step(batch)[0].backward()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            task.step(batch)[0].backward()
        held = peak = 0
        events = profile.profiler.kineto_results.events()
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    task.zero_grad(set_to_none=True)
    return peak / 2**20


def cost(task: Task, batch: Any) -> dict[str, float]:
    """The cost of a trained arm on one batch.

    Returns a dictionary with: parameters (gate_parameters: of its gates); flops, one forward pass of one sample with
    nothing left out, and flops_spent, what was really executed in evaluation (they differ when computation is
    conditional); latency_ms of the batch's forward pass; peak_memory_mb of a training step.
    """
    model = task.model
    count = task.size(batch)
    inputs = task.inputs(batch)
    training = task.training
    # A training step moves running statistics and counters; a measurement must not.
    state = copy.deepcopy(task.state_dict())
    task.train()
    peak = peak_memory_mb(task, batch)
    task.eval()
    task.load_state_dict(state)
    with evaluate_everything():
        dense = flops(model, inputs) / count
    spent = flops(model, inputs) / count
    latency = latency_ms(model, inputs)
    task.train(training)
    try:
        gates: set[nn.Parameter] = {p for gate in named_gates(model).values() for p in gate.parameters()}
    except GateNotFoundError:
        gates = set()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gate_parameters": sum(p.numel() for p in gates),
        "flops": dense,
        "flops_spent": spent,
        "latency_ms": latency,
        "batch": count,
        "peak_memory_mb": peak,
    }


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
