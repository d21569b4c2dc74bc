"""One recorded forward: what every module read and wrote, on a short input made for the model.

The anatomy is derived from this record and nothing else, so that a model is understood by what it does rather than
by what it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mechscope.errors import LoadError
from mechscope.models import attention

PROBE_LENGTH, ENCODER_LENGTH = 7, 5  # unlike each other, and unlike any sane number of experts


@dataclass
class Call:
    """This is one call of one module: when it began and ended, the first tensor it read and the first it returned."""

    name: str
    module: nn.Module
    begin: int
    read: Tensor | None
    end: int = -1
    wrote: Tensor | None = None
    items: tuple[Tensor, ...] = ()  # everything returned, where the module returned a tuple or a list
    attends: int = 0  # how many times this call computed attention
    given: tuple[Tensor, ...] = ()  # everything read, where that is several tensors, one of them of numbers

    @property
    def tupled(self) -> bool:
        return bool(self.items)


@dataclass
class Record:
    """This is a recorded forward: the calls in order of their beginning, and which modules computed attention."""

    calls: list[Call] = field(default_factory=list)
    interface: list[nn.Module] = field(default_factory=list)
    formula: list[nn.Module] = field(default_factory=list)
    twice: list[nn.Module] = field(default_factory=list)  # attention modules that attend more than once per call
    shapes: dict[int, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    logits: Tensor | None = None

    def of(self, module: nn.Module) -> list[Call]:
        return [call for call in self.calls if call.module is module]

    def inside(self, name: str) -> list[Call]:
        """This is the calls of the modules below the module called `name`, itself excluded."""
        return [call for call in self.calls if call.name.startswith(name + ".")]


def tensors(x: object) -> Iterator[Tensor]:
    """This is every tensor in a nest of tuples, lists and model outputs, in order."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for value in x.values():
            yield from tensors(value)
    elif isinstance(x, (tuple, list)):
        for value in x:
            yield from tensors(value)


def _copy(x: Tensor | None) -> Tensor | None:
    """This keeps what was read or written as it was then: some forwards add to it in place afterwards."""
    return None if x is None else x.clone()


def first_read(args: tuple, kwargs: dict) -> Tensor | None:
    """This is the tensor a module reads: its first floating-point argument, or `hidden_states` by name."""
    for x in (*args[:1], kwargs.get("hidden_states"), *args[1:], *kwargs.values()):
        if isinstance(x, Tensor) and (x.is_floating_point() or x is (args[0] if args else None)):
            return x
    return None


def probe_inputs(hf: nn.Module) -> dict[str, Tensor]:
    """This is a short input that the model accepts: random ids, pixels for a vision model, both ends for a seq2seq."""
    config: Any = getattr(hf, "config", None)
    device = next(hf.parameters()).device
    generator = torch.Generator().manual_seed(0)
    main = getattr(hf, "main_input_name", "input_ids")
    if main == "pixel_values":
        dtype = next(hf.parameters()).dtype
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else [config.image_size] * 2
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, *size, generator=generator).to(device, dtype)}
    if main != "input_ids":
        raise LoadError(f"{type(hf).__name__} reads {main!r}; mechscope reads models of input_ids or pixel_values.")
    embedding = input_embedding(hf)
    vocab: int = getattr(embedding, "num_embeddings", None) or getattr(config, "vocab_size", 50)

    def ids(length: int) -> Tensor:
        # Distinct ids where possible; low ids are often special, and a pad id would be masked.
        return torch.randint(min(4, vocab - 1), vocab, (2, length), generator=generator).to(device)

    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids(ENCODER_LENGTH), "decoder_input_ids": ids(PROBE_LENGTH)}
    return {"input_ids": ids(min(PROBE_LENGTH, context_length(config)))}


def context_length(config: object, default: int = PROBE_LENGTH) -> int:
    """This is the most positions that a model says it accepts, `default` where it does not say."""
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    found = [n for name in names if isinstance(n := getattr(config, name, None), int) and n > 0]
    return min(found, default=default)


def input_embedding(hf: nn.Module) -> nn.Module | None:
    try:
        return hf.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return next((m for m in hf.modules() if isinstance(m, nn.Embedding)), None)


def output_embedding(hf: nn.Module) -> nn.Module | None:
    try:
        return hf.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def record(hf: nn.Module, inputs: dict[str, Tensor]) -> Record:
    """This runs the model once on `inputs` and records every module's call."""
    out = Record()
    stack: list[Call] = []
    clock = iter(range(10**9))
    handles = []

    def before(name):
        def hook(module, args, kwargs):
            call = Call(name, module, next(clock), _copy(first_read(args, kwargs)))
            read = tuple(tensors((args, kwargs)))
            if len(read) > 2 and any(not x.is_floating_point() for x in read):
                call.given = tuple(x.clone() for x in read)
            out.calls.append(call)
            stack.append(call)

        return hook

    def after(module, args, kwargs, result):
        call = stack.pop()
        call.end = next(clock)
        found = tuple(tensors(result))
        call.wrote = _copy(found[0]) if found else None
        if isinstance(result, (tuple, list)) and call.wrote is not None:
            call.items = (call.wrote, *(x.clone() for x in found[1:]))

    for name, module in hf.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with torch.no_grad(), _observed(out, stack):
            result = call(hf, inputs)
    except (TypeError, RuntimeError, IndexError) as error:
        names = ", ".join(inputs)
        raise LoadError(
            f"{type(hf).__name__} cannot run on {names}: {error}. Pass a Hugging Face transformer."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(result, "logits", None)
    if logits is None and isinstance(result, Tensor):
        logits = result
    out.logits = logits
    return out


def call(hf: nn.Module, inputs: Mapping[str, Any], **more: Any) -> Any:
    """This calls a module as its plain user would: a bare module, with no configuration, reads ids by position."""
    if not hasattr(hf, "config") and set(inputs) == {"input_ids"} and not _takes(hf, "input_ids"):
        return hf(inputs["input_ids"])
    return hf(**inputs, **{**run_flags(hf), **more})


def run_flags(hf: nn.Module) -> dict[str, bool]:
    """This is what a plain run passes to a Hugging Face model: no key-value cache is built unless one is wanted."""
    return {"use_cache": False} if hasattr(getattr(hf, "config", None), "use_cache") and _takes(hf, "use_cache") else {}


def _takes(hf: nn.Module, name: str) -> bool:
    parameters = forward_parameters(hf)
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def forward_parameters(hf: nn.Module) -> Mapping[str, Any]:
    """This is the parameters of a module's forward, read once: it takes as long as a small model's block."""
    import inspect

    forward = getattr(hf.forward, "__func__", hf.forward)
    if forward not in _PARAMETERS:
        _PARAMETERS[forward] = inspect.signature(hf.forward).parameters
    return _PARAMETERS[forward]


_PARAMETERS: WeakKeyDictionary[Any, Mapping[str, Any]] = WeakKeyDictionary()


@contextlib.contextmanager
def _observed(out: Record, stack: list[Call]) -> Iterator[None]:
    """This notes the modules that call the AttentionInterface, and those that take an attention-shaped softmax."""

    class Softmaxes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if (func in attention.SOFTMAX or func is attention.SDPA) and stack:
                x = args[0] if args else (kwargs or {}).get("input")
                if func is attention.SDPA or _shaped_like_scores(x):
                    stack[-1].attends += 1
                    if stack[-1].module not in out.formula:
                        out.formula.append(stack[-1].module)
            return func(*args, **(kwargs or {}))

    def seen(module, query, key, value):
        call = next((c for c in reversed(stack) if c.module is module), None)
        if call is not None:
            by_interface[id(call)] = by_interface.get(id(call), 0) + 1
        if module not in out.interface:
            out.interface.append(module)
            out.shapes[id(module)] = (query.shape, key.shape)

    by_interface: dict[int, int] = {}
    with attention.observed(seen), Softmaxes():
        yield
    out.formula = [m for m in out.formula if m not in out.interface]
    for call in out.calls:  # a softmax inside the interface's own function is not another attention
        call.attends = by_interface.get(id(call), 0 if call.module in out.interface else call.attends)
        if call.attends > 1:
            out.twice.append(call.module)


def _shaped_like_scores(x: object) -> bool:
    lengths = (PROBE_LENGTH, ENCODER_LENGTH)
    return isinstance(x, Tensor) and x.dim() in (3, 4) and x.shape[-2] in lengths and x.shape[-1] in lengths
