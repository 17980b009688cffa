"""One layer of a BERT-like encoder as an ONNX graph, made from its matrices.

    EncoderFile (model.safetensors, memory-mapped) -> layer_graph() -> bytes -> InferenceSession

The graph is written node by node and not traced: that takes 20 ms a layer and no torch, and the
matrices that a version has changed can be inputs of the graph instead of constants in it. So the
sessions of untouched layers, and those of touched ones too, serve all versions alike.

Shape suffixes: N = texts, T = tokens, d = width of the encoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

OPSET = 20  # has Gelu and LayerNormalization
IR_VERSION = 10
_MODEL_TYPES = ("bert", "roberta", "xlm-roberta")


class UnsupportedEncoderError(Exception):
    """Encoders of this kind run with torch only."""


class EncoderFile:
    """The configuration and the matrices of an encoder's folder, read as they are needed.

    Raises:
      UnsupportedEncoderError: It is not of BERT's or RoBERTa's kind, in single precision.
    """

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        kind = {
            "model_type": self.config.get("model_type") in _MODEL_TYPES,
            "hidden_act": self.config.get("hidden_act") == "gelu",
            "position_embedding_type": self.config.get("position_embedding_type", "absolute")
            == "absolute",
            "is_decoder": not self.config.get("is_decoder"),
        }
        if not all(kind.values()):
            wrong = {key: self.config.get(key) for key, fits in kind.items() if not fits}
            raise UnsupportedEncoderError(f"the encoder in {folder} has {wrong}")
        self._path = folder / "model.safetensors"
        with self._path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header: dict[str, Any] = json.loads(file.read(size))
        self._start = 8 + size
        word = "embeddings.word_embeddings.weight"
        names = [name for name in self._header if name.endswith(word)]
        if len(names) != 1:
            raise UnsupportedEncoderError(f"{self._path} has {len(names)} of {word}")
        self._prefix = names[0].removesuffix(word)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def width(self) -> int:
        """Width d of the encoder."""
        return int(self.config["hidden_size"])

    @property
    def first_position(self) -> int:
        """Row of the position table that belongs to a text's first token."""
        if self.config["model_type"] == "bert":
            return 0
        return int(self.config.get("pad_token_id", 1)) + 1

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Returns a tensor by its name in the encoder, memory-mapped.

        Raises:
          UnsupportedEncoderError: There is none, or not in single precision.
        """
        entry = self._header.get(self._prefix + name)
        if entry is None or entry["dtype"] != "F32":
            raise UnsupportedEncoderError(f"{self._path} has no {name} in single precision")
        begin, _ = entry["data_offsets"]
        return np.memmap(
            self._path, np.float32, "r", offset=self._start + begin, shape=tuple(entry["shape"])
        )


class _Graph:
    """Nodes and constants of a graph that grows."""

    def __init__(self, file: EncoderFile, inputs: Collection[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self._file = file
        self._input_names = inputs

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def linear(self, x: str, module: str) -> str:
        weight = self._file.tensor(f"{module}.weight")  # (d_out, d_in)
        if module in self._input_names:
            shape = list(weight.shape)
            value = helper.make_tensor_value_info(module, onnx.TensorProto.FLOAT, shape)
            self.inputs.append(value)
            matrix = self.op("Transpose", module, perm=[1, 0])
        else:
            matrix = self.constant(f"{module}.weight", weight.T)
        bias = self.constant(f"{module}.bias", self._file.tensor(f"{module}.bias"))
        return self.op("Add", self.op("MatMul", x, matrix), bias)

    def norm(self, x: str, module: str) -> str:
        weight, bias = (
            self.constant(f"{module}.{part}", self._file.tensor(f"{module}.{part}"))
            for part in ("weight", "bias")
        )
        epsilon = self._file.config["layer_norm_eps"]
        return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)


def layer_graph(file: EncoderFile, index: int, inputs: Collection[str] = ()) -> bytes:
    """Returns a model `(hidden, attention_bias, *inputs) -> hidden`.

    `hidden` is (N, T, d), `attention_bias` (N, 1, 1, T): 0, or very negative where a token is
    padding. Each of `inputs`, full names of linear modules, is a matrix (d_out, d_in).

    Raises:
      UnsupportedEncoderError: The layer lacks a matrix.
    """
    graph, layer = _Graph(file, inputs), f"encoder.layer.{index}"
    attended = _attention(graph, "hidden", f"{layer}.attention", file)
    inner = graph.op("Gelu", graph.linear(attended, f"{layer}.intermediate.dense"))
    outer = graph.op("Add", graph.linear(inner, f"{layer}.output.dense"), attended)
    out = graph.norm(outer, f"{layer}.output.LayerNorm")
    return _model(graph, ["texts", "tokens", file.width], out)


def _attention(graph: _Graph, x: str, module: str, file: EncoderFile) -> str:
    num_heads = int(file.config["num_attention_heads"])
    size = file.width // num_heads
    by_head = graph.constant("by_head", np.array([0, 0, num_heads, size], np.int64))
    flat = graph.constant("flat", np.array([0, 0, file.width], np.int64))
    scale = graph.constant("scale", np.array(1 / math.sqrt(size), np.float32))

    def heads(name: str, perm: list[int]) -> str:
        rows = graph.op("Reshape", graph.linear(x, f"{module}.self.{name}"), by_head)
        return graph.op("Transpose", rows, perm=perm)

    query, key = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1])
    scores = graph.op("Mul", graph.op("MatMul", query, key), scale)
    attention = graph.op("Softmax", graph.op("Add", scores, "attention_bias"), axis=-1)
    context = graph.op("MatMul", attention, heads("value", [0, 2, 1, 3]))
    joined = graph.op("Reshape", graph.op("Transpose", context, perm=[0, 2, 1, 3]), flat)
    out = graph.op("Add", graph.linear(joined, f"{module}.output.dense"), x)
    return graph.norm(out, f"{module}.output.LayerNorm")


def _model(graph: _Graph, hidden: list[str | int], out: str) -> bytes:
    def value(name: str, shape: list[str | int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    body = helper.make_graph(
        graph.nodes,
        "layer",
        [
            value("hidden", hidden),
            value("attention_bias", ["texts", 1, 1, "tokens"]),
            *graph.inputs,
        ],
        [value(out, hidden)],
        graph.constants,
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(body, opset_imports=[opset], ir_version=IR_VERSION)
    data: bytes = model.SerializeToString()
    return data


def by_layer(modules: Mapping[str, Any], depth: int) -> list[frozenset[str]]:
    """Returns, for each layer, which of the modules are in it.

    >>> by_layer({"encoder.layer.1.output.dense": ...}, 2)
    [frozenset(), frozenset({'encoder.layer.1.output.dense'})]
    """
    return [
        frozenset(name for name in modules if name.startswith(f"encoder.layer.{i}."))
        for i in range(depth)
    ]
