"""Programs of an exported model: graphs of torch's operators, or the machine code that was made of them.

A graph is run here operator by operator. torch's own loader would need its compiler (seconds to import), and it looks
up whatever function a file names; here a file can name operators of torch alone, and of these such that make tensors of
tensors: none that changes one, or opens a file.
"""

import json
import platform
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from operator import add, floordiv, mul, sub
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from schemas.errors import UserError
from schemas.programs import CompiledFor, Program
from schemas.served import REMEDY

RUNNERS = 8
"""Threads that can run compiled code at once."""

_TYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""Types of tensors by their numbers in an archive (`torch._export.serde.schema.ScalarType`)."""

_OF_SIZES: Mapping[str, Callable[..., Any]] = {
    "_operator.add": add,
    "_operator.sub": sub,
    "_operator.mul": mul,
    "_operator.floordiv": floordiv,
}
"""What a graph may compute of sizes, beside torch's operators."""

_NO_ARCHIVE = (zipfile.BadZipFile, EOFError)
_OUTSIDE = frozenset(("filename", "source", "storage"))
"""Names of arguments of torch's operators that reach beyond tensors."""


class Runs(Protocol):
    """A function of tensors."""

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Take the tensors of ``Program.inputs``, return those of ``Program.outputs``, in order."""


def this_machine() -> CompiledFor:
    """What compiled programs depend on, here."""
    return CompiledFor(
        torch=torch.__version__, processor=torch.backends.cpu.get_cpu_capability(), machine=platform.machine()
    )


def load_compiled(path: Path) -> Runs:
    """Load what AOTInductor has compiled: machine code, which is executed."""
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, RUNNERS, -1)
    # A list that is the caller's own: the loader takes its tensors out.
    return lambda tensors: loader.run(list(tensors))


class Graph:
    """A graph that runs operator by operator; many threads may run it at once.

    Args:
        path: what `torch.export.save` has written.
        program: what the manifest says of it.

    Raises:
        UserError: the archive is none, or has something that this program does not know.
    """

    def __init__(self, path: Path, program: Program) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                # All names begin with that of the file as it was written.
                names = {name.split("/", 1)[1]: name for name in archive.namelist()}

                def read(name: str) -> bytes:
                    return archive.read(names[name])

                module = json.loads(read("models/model.json"))["graph_module"]
                weights = json.loads(read("data/weights/model_weights_config.json"))["config"]
                constants = json.loads(read("data/constants/model_constants_config.json"))["config"]
                values = {
                    name: _tensor(entry, read(f"data/{folder}/{entry['path_name']}"))
                    for folder, config in (("weights", weights), ("constants", constants))
                    for name, entry in config.items()
                }
            self._read(module, values)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, zlib.error, *_NO_ARCHIVE) as error:
            raise UserError(f"{path}: not a program that this version knows ({error!r:.200}); {REMEDY}") from None
        if len(self._inputs) != len(program.inputs) or len(self._outputs) != len(program.outputs):
            raise UserError(f"{path}: not the program that the manifest describes; {REMEDY}")

    def _read(self, module: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
        self._fixed, self._inputs = dict[str, Any](), list[str]()
        for spec in module["signature"]["input_specs"]:
            ((kind, content),) = spec.items()
            if kind == "user_input":
                self._inputs.append(content["arg"]["as_tensor"]["name"])
            else:
                self._fixed[content["arg"]["name"]] = values[content[f"{kind}_name"]]
        graph = module["graph"]
        self._outputs = [output["as_tensor"]["name"] for output in graph["outputs"]]
        steps = [_Step(node) for node in graph["nodes"] if not node["target"].startswith("torch.ops.aten._assert")]
        # What nobody reads is not made, and what nobody reads any more is dropped.
        read, self._steps = set(self._outputs), list[tuple[_Step, list[str]]]()
        for step in reversed(steps):
            if read.isdisjoint(step.outputs):
                continue
            last = [name for name in step.inputs if name not in read and name not in self._fixed]
            read.update(step.inputs)
            self._steps.insert(0, (step, list(dict.fromkeys(last))))

    @torch.inference_mode()
    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run it; see `Runs`."""
        known = self._fixed | dict(zip(self._inputs, tensors, strict=True))
        for step, last in self._steps:
            step.run(known)
            for name in last:
                del known[name]
        return [known[name] for name in self._outputs]


class _Step:
    """A call of an operator."""

    def __init__(self, node: Mapping[str, Any]) -> None:
        self._function = _function(node["target"])
        self.inputs = list[str]()
        self.outputs = list[str]()
        self._several = False
        self._arguments, self._named = list[Callable[..., Any]](), dict[str, Callable[..., Any]]()
        for argument in node["inputs"]:
            value = self._argument(argument["arg"])
            if argument.get("kind") == 2:
                self._named[argument["name"]] = value
            else:
                self._arguments.append(value)
        for output in node["outputs"]:
            ((kind, content),) = output.items()
            if kind == "as_tensors":
                self._several = True
                self.outputs += [each["name"] for each in content]
            else:
                self.outputs.append(content["name"] if kind == "as_tensor" else content["as_name"])
        self._several |= len(self.outputs) > 1

    def run(self, known: dict[str, Any]) -> None:
        """Add what it makes to the values that are known."""
        named = {name: value(known) for name, value in self._named.items()}
        result = self._function(*[value(known) for value in self._arguments], **named)
        known.update(zip(self.outputs, result if self._several else (result,), strict=True))

    def _argument(self, argument: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
        ((kind, content),) = argument.items()
        if kind in ("as_tensor", "as_sym_int"):
            name = content.get("name", content.get("as_name"))
            if name is None:
                return _constant(content["as_int"])
            self.inputs.append(name)
            return lambda known: known[name]
        if kind in ("as_tensors", "as_sym_ints"):
            parts = [self._argument({kind[:-1]: each}) for each in content]
            return lambda known: [part(known) for part in parts]
        if kind == "as_float":
            # JSON has no infinity: it is written as text.
            return _constant(float(content))
        if kind in ("as_int", "as_ints", "as_bool", "as_string"):
            return _constant(content)
        if kind == "as_none":
            return _constant(None)
        if kind == "as_scalar_type":
            return _constant(_TYPES[content])
        raise ValueError(f"argument {kind}")


def _constant(value: Any) -> Callable[[Mapping[str, Any]], Any]:
    return lambda _: value


def _function(target: str) -> Callable[..., Any]:
    if target in _OF_SIZES:
        return _OF_SIZES[target]
    *place, operator, overload = target.split(".")
    if place != ["torch", "ops", "aten"]:
        raise ValueError(f"{target} is no operator of torch")
    found: torch._ops.OpOverload = getattr(getattr(torch.ops.aten, operator), overload)
    arguments = {argument.name for argument in found._schema.arguments}
    # torch has operators that map, make and write files, and some that trust their arguments with its memory.
    private = operator.startswith("_") and not operator.startswith("__")
    if private or found._schema.is_mutable or not arguments.isdisjoint(_OUTSIDE):
        raise ValueError(f"{target} is no function of tensors alone")
    return found


def _tensor(entry: Mapping[str, Any], content: bytes) -> Tensor:
    meta = entry["tensor_meta"]
    if entry["use_pickle"]:
        raise ValueError("a pickled weight")
    sizes, strides = ([each["as_int"] for each in meta[name]] for name in ("sizes", "strides"))
    flat = torch.frombuffer(bytearray(content), dtype=_TYPES[meta["dtype"]])
    return torch.as_strided(flat, sizes, strides, meta["storage_offset"]["as_int"]).clone()
