"""The loader reads hostile bytes without running anything, and a kernel behaves as a module."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esperd.errors import KernelRejected
from esperd.execution import KernelModule, load_kernel
from esperd.execution.graph import MAX_OPERATIONS, TRAINING

GRAPH = {
    "format": 1,
    "inputs": ["%x"],
    "parameters": {
        "conv.weight": [[4, 4, 3, 3], "float32"],
        "norm.weight": [[4], "float32"],
        "norm.bias": [[4], "float32"],
        "scale": [[1], "float32"],
    },
    "buffers": {
        "norm.running_mean": [[4], "float32"],
        "norm.running_var": [[4], "float32"],
        "norm.num_batches_tracked": [[], "int64"],
    },
    "ops": [
        ["%0", "aten.conv2d.default", ["%x", "conv.weight", None, [1, 1], [1, 1]], {}],
        [
            "%1",
            "aten.batch_norm.default",
            ["%0", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", TRAINING, 0.1, 1e-05, False],
            {},
        ],
        ["%2", "aten.relu.default", ["%1"], {}],
        ["%3", "aten.mul.Tensor", ["%2", "scale"], {}],
        ["%4", "aten.add.Tensor", ["%x", "%3"], {"alpha": 2}],
    ],
    "output": "%4",
    "mutations": {"norm.num_batches_tracked": 1},
}


class Eager(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((1,), 0.5))
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.add(x, torch.relu(self.norm(self.conv(x))) * self.scale, alpha=2)


def encode(graph):
    return json.dumps(graph).encode()


def weights_of(module):
    return safetensors.torch.save(module.state_dict())


@pytest.fixture
def eager():
    torch.manual_seed(0)
    return Eager()


@pytest.fixture
def kernel(eager):
    return load_kernel(encode(GRAPH), weights_of(eager))


def run(module, x, training):
    module.train(training).zero_grad()
    x = x.clone().requires_grad_()
    output = module(x)
    output.square().sum().backward()
    return [output, x.grad, *(module.get_parameter(name).grad for name in GRAPH["parameters"]), *module.buffers()]


# --- a kernel is a module


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_kernel_equals_its_eager_module_to_the_bit(eager, kernel, batch, training):
    x = torch.randn(batch, 4, 5, 5)
    for ours, theirs in zip(run(kernel, x, training), run(eager, x, training), strict=True):
        assert torch.equal(ours, theirs)


def test_a_kernel_stays_equal_while_it_trains_and_switches_modes(eager, kernel):
    optimizers = [torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9) for module in (eager, kernel)]
    for step in range(6):
        x = torch.randn(3, 4, 5, 5)
        for ours, theirs in zip(run(kernel, x, step % 3 != 2), run(eager, x, step % 3 != 2), strict=True):
            assert torch.equal(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()
    assert kernel.norm.num_batches_tracked.item() == 4


def test_state_dicts_are_interchangeable(eager, kernel):
    assert kernel.state_dict().keys() == eager.state_dict().keys()
    assert {name for name, _ in kernel.named_modules()} == {name for name, _ in eager.named_modules()}
    fresh = Eager()
    kernel.load_state_dict(fresh.state_dict())
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(kernel(x), fresh(x))


def test_parameters_come_in_the_order_of_the_graph():
    names = list(reversed(GRAPH["parameters"]))
    graph = {**GRAPH, "parameters": {name: GRAPH["parameters"][name] for name in names}}
    found = [name for name, _ in load_kernel(encode(graph), None).named_parameters()]
    assert found == ["scale", "norm.bias", "norm.weight", "conv.weight"]


def test_a_deep_copy_is_independent(kernel):
    copied = copy.deepcopy(kernel)
    x = torch.randn(2, 4, 3, 3)
    expected = copied(x)
    with torch.no_grad():
        kernel.conv.weight.add_(1.0)
        copied.norm.running_mean.zero_()
    assert torch.equal(copied(x), expected)
    assert not torch.equal(kernel(x), expected)
    assert copied.norm.num_batches_tracked.item() == 2
    assert kernel.norm.num_batches_tracked.item() == 1


def test_a_kernel_moves_to_another_dtype(eager, kernel):
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(kernel.to(torch.float64)(x), eager.to(torch.float64)(x))


def test_functional_call_replaces_parameters(kernel):
    x = torch.randn(2, 4, 3, 3)
    output = torch.func.functional_call(kernel.eval(), {"scale": torch.zeros(1)}, (x,))
    assert torch.equal(output, x)


def test_without_weights_a_kernel_yields_nan_until_they_are_loaded(eager):
    kernel = load_kernel(encode(GRAPH), None)
    x = torch.randn(2, 4, 3, 3)
    assert kernel(x).isnan().all()
    kernel.load_state_dict(eager.state_dict())
    assert torch.equal(kernel(x), eager(x))


def test_registers_are_used_again_once_nothing_reads_them():
    relus = [[f"%{index}", "aten.relu.default", [f"%{index - 1}" if index else "%x"], {}] for index in range(100)]
    graph = {**GRAPH, "parameters": {}, "buffers": {}, "mutations": {}, "ops": relus, "output": "%99"}
    kernel = load_kernel(encode(graph), None)
    assert kernel._program._results == 1
    x = torch.randn(2, 3)
    assert torch.equal(kernel(x), torch.relu(x))


def test_a_result_nobody_reads_changes_nothing(eager, kernel):
    graph = copy.deepcopy(GRAPH)
    graph["ops"].insert(2, ["%dead", "aten.tanh.default", ["%0"], {}])
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(load_kernel(encode(graph), weights_of(eager))(x), kernel(x))


def test_the_modules_inside_a_kernel_refuse_to_be_called(kernel):
    with pytest.raises(NotImplementedError, match="call the kernel"):
        kernel.conv()


def test_a_graph_may_return_its_input():
    kernel = load_kernel(encode({**GRAPH, "ops": [], "output": "%x"}), None)
    x = torch.randn(2, 4, 3, 3)
    assert kernel(x) is x


# --- hostile and damaged files


def changed(**fields):
    return {**copy.deepcopy(GRAPH), **fields}


def with_argument(op, position, value):
    graph = copy.deepcopy(GRAPH)
    graph["ops"][op][2][position] = value
    return graph


def with_op(op):
    graph = copy.deepcopy(GRAPH)
    graph["ops"].append(op)
    return graph


HOSTILE = {
    "another format": changed(format=2),
    "an unknown field": changed(hook="os.system"),
    "no input": changed(inputs=[]),
    "two inputs": changed(inputs=["%x", "%y"]),
    "code as the input's name": changed(inputs=["%x=__import__('os').system('true')"]),
    "code as the output": changed(output="__import__('os').system('true')"),
    "a parameter as the output": changed(output="scale"),
    "an undefined output": changed(output="%9"),
    "the mode as the output": changed(output=TRAINING),
    "an operation outside the table": with_op(["%5", "aten.save.default", ["%4"], {}]),
    "an operation that is a python path": with_op(["%5", "os.system", ["%4"], {}]),
    "a dunder as an operation": with_op(["%5", "__class__", ["%4"], {}]),
    "code as a result's name": with_op(["%5;import os", "aten.relu.default", ["%4"], {}]),
    "a newline after a result's name": with_op(["%5\n", "aten.relu.default", ["%4"], {}]),
    "a result defined twice": with_op(["%4", "aten.relu.default", ["%4"], {}]),
    "a result that shadows the mode": with_op([TRAINING, "aten.relu.default", ["%4"], {}]),
    "a result that shadows the input": with_op(["%x", "aten.relu.default", ["%4"], {}]),
    "a reference to itself": with_op(["%5", "aten.relu.default", ["%5"], {}]),
    "a reference to a later result": with_argument(0, 0, "%3"),
    "too few arguments": with_op(["%5", "aten.add.Tensor", ["%4"], {}]),
    "too many arguments": with_op(["%5", "aten.relu.default", ["%4", "%4"], {}]),
    "an unknown keyword": with_op(["%5", "aten.relu.default", ["%4"], {"out": 1}]),
    "a string as a keyword's value": with_op(["%5", "aten.add.Tensor", ["%4", 1], {"alpha": "%4"}]),
    "a list of references": with_op(["%5", "aten.relu.default", [["%4"]], {}]),
    "an object among the arguments": with_op(["%5", "aten.relu.default", [{"a": 1}], {}]),
    "a string where a list belongs": with_argument(0, 3, "%x"),
    "a float in a list": with_argument(0, 3, [1.5, 1]),
    "a float where an integer belongs": with_op(["%5", "aten.unsqueeze.default", ["%4", 1.0], {}]),
    "a boolean where an integer belongs": with_op(["%5", "aten.unsqueeze.default", ["%4", True], {}]),
    "an integer beyond 32 bits": with_op(["%5", "aten.unsqueeze.default", ["%4", 2**40], {}]),
    "a huge integer": with_op(["%5", "aten.add.Tensor", ["%4", 10**400], {}]),
    "a number where a tensor belongs": with_argument(0, 0, 1),
    "none where a tensor belongs": with_argument(0, 0, None),
    "the mode where a tensor belongs": with_argument(0, 0, TRAINING),
    "a tensor where the mode belongs": with_argument(1, 5, "%x"),
    "the mode where a flag belongs": with_argument(1, 8, TRAINING),
    "the input as running statistics": with_argument(1, 3, "%x"),
    "a parameter as running statistics": with_argument(1, 3, "norm.weight"),
    "a parameter as a counter": changed(mutations={"scale": 1}),
    "a float buffer as a counter": changed(mutations={"norm.running_mean": 1}),
    "an unknown counter": changed(mutations={"nothing": 1}),
    "a counter that overflows": changed(mutations={"norm.num_batches_tracked": 2**40}),
    "a parameter that is not a name": changed(parameters={"a b": [[1], "float32"]}),
    "a parameter with a path": changed(parameters={"../scale": [[1], "float32"]}),
    "a parameter named as a method": changed(parameters={**GRAPH["parameters"], "forward": [[1], "float32"]}),
    "a module named as a dunder": changed(parameters={**GRAPH["parameters"], "__class__.w": [[1], "float32"]}),
    "a parameter named as our own state": changed(parameters={**GRAPH["parameters"], "_program": [[1], "float32"]}),
    "a tensor that is also a module": changed(parameters={**GRAPH["parameters"], "scale.x": [[1], "float32"]}),
    "one name for parameter and buffer": changed(buffers={**GRAPH["buffers"], "scale": [[1], "float32"]}),
    "an integer parameter": changed(parameters={**GRAPH["parameters"], "i": [[1], "int64"]}),
    "an unknown dtype": changed(parameters={**GRAPH["parameters"], "i": [[1], "object"]}),
    "a negative size": changed(parameters={**GRAPH["parameters"], "i": [[-1], "float32"]}),
    "more elements than memory": changed(parameters={**GRAPH["parameters"], "i": [[2**20, 2**20], "float32"]}),
    "too many dimensions": changed(parameters={**GRAPH["parameters"], "i": [[1] * 99, "float32"]}),
    "attention without values": with_op(["%5", "aten.scaled_dot_product_attention.default", ["%4", "%4"], {}]),
    "attention over a number": with_op(["%5", "aten.scaled_dot_product_attention.default", ["%4", "%4", 1], {}]),
    "attention that drops weights": with_op(
        ["%5", "aten.scaled_dot_product_attention.default", ["%4", "%4", "%4", None, 0.5], {}]
    ),
    "attention that drops by the mode": with_op(
        ["%5", "aten.scaled_dot_product_attention.default", ["%4", "%4", "%4", None, TRAINING], {}]
    ),
    "attention that drops false": with_op(
        ["%5", "aten.scaled_dot_product_attention.default", ["%4", "%4", "%4", None, False], {}]
    ),
    "attention scaled by a tensor": with_op(
        ["%5", "aten.scaled_dot_product_attention.default", ["%4", "%4", "%4"], {"scale": "%4"}]
    ),
    "attention that is causal by the mode": with_op(
        ["%5", "aten.scaled_dot_product_attention.default", ["%4", "%4", "%4", None, 0.0, TRAINING], {}]
    ),
    "unflattening into a number": with_op(["%5", "aten.unflatten.int", ["%4", 1, 2], {}]),
    "unflattening into a tensor": with_op(["%5", "aten.unflatten.int", ["%4", 1, "%x"], {}]),
    "unflattening into nested sizes": with_op(["%5", "aten.unflatten.int", ["%4", 1, [[2, 2]]], {}]),
    "selecting by a tensor": with_op(["%5", "aten.select.int", ["%4", 0, "%x"], {}]),
    "ones of a size of its own": with_op(["%5", "aten.ones_like.default", [[2**30]], {}]),
    "ones in pinned memory": with_op(["%5", "aten.ones_like.default", ["%4"], {"pin_memory": True}]),
    "ones of another kind": with_op(["%5", "aten.ones_like.default", ["%4"], {"dtype": 1}]),
    "a diagonal that is no integer": with_op(["%5", "aten.tril.default", ["%4", 0.5], {}]),
    "a comparison with a tensor": with_op(["%5", "aten.gt.Scalar", ["%4", "%4"], {}]),
    "too many operations": changed(
        ops=[[f"%o{index}", "aten.relu.default", ["%x"], {}] for index in range(MAX_OPERATIONS + 1)], output="%o0"
    ),
    "too many tensors": changed(buffers={f"b{index}": [[1], "float32"] for index in range(2000)}),
}


@pytest.mark.parametrize("graph", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_graph_is_rejected(graph):
    with pytest.raises(KernelRejected):
        load_kernel(encode(graph), None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"{" * 100_000,
        b"[" * 1_000_000,
        b" " * 2_000_000,
        encode(GRAPH).replace(b"1e-05", b"NaN"),
        encode(GRAPH).replace(b"1e-05", b"Infinity"),
        encode(GRAPH).replace(b"1e-05", b"1e999"),
        encode(GRAPH)[:-1],
    ],
    ids=range(11),
)
def test_damaged_bytes_are_rejected(data):
    with pytest.raises(KernelRejected):
        load_kernel(data, None)


def test_weights_that_do_not_fit_are_rejected(eager):
    good = eager.state_dict()
    for state in (
        {name: tensor for name, tensor in good.items() if name != "scale"},
        {**good, "extra": torch.zeros(1)},
        {**good, "scale": torch.zeros(2)},
        {**good, "scale": torch.zeros(1, dtype=torch.float64)},
    ):
        with pytest.raises(KernelRejected):
            load_kernel(encode(GRAPH), safetensors.torch.save(state))


ATTENDS = {
    "format": 1,
    "inputs": ["%x"],
    "parameters": {"values": [[1, 1, 6, 8], "float32"], "mask": [[3, 3], "float32"]},
    "buffers": {},
    "ops": [["%0", "aten.scaled_dot_product_attention.default", ["%x", "%x", "values"], {}]],
    "output": "%0",
    "mutations": {},
}


@pytest.mark.parametrize("length", [1, 5, 7, 400])
@pytest.mark.parametrize("training", [True, False])
def test_attention_never_reads_beyond_its_keys_or_values(length, training):
    kernel = load_kernel(encode(ATTENDS), None).train(training)
    with pytest.raises(KernelRejected, match=rf"keys \(1, 1, {length}, 8\) that have values \(1, 1, 6, 8\)"):
        kernel(torch.randn(1, 1, length, 8, requires_grad=training))


def test_attention_with_a_mask_of_another_size_raises():
    ops = [["%0", "aten.scaled_dot_product_attention.default", ["%x", "%x", "%x", "mask"], {}]]
    kernel = load_kernel(encode({**ATTENDS, "ops": ops}), None)
    assert kernel(torch.randn(2, 1, 3, 8)).shape == (2, 1, 3, 8)
    for length in (2, 4, 400):
        with pytest.raises(RuntimeError, match="must match"):
            kernel(torch.randn(2, 1, length, 8))


# --- fuzzing

_FORBIDDEN = {
    "exec",
    "compile",
    "import",
    "open",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
    "ctypes.dlopen",
    "socket.connect",
}
_watching = False
_seen: list[str] = []


def _watch(event, arguments):
    if _watching and event in _FORBIDDEN:
        _seen.append(event)


sys.addaudithook(_watch)


def load_watched(graph, weights):
    """Load; fail on anything but a module or a rejection, and on code, files, processes or imports on the way."""
    global _watching
    _seen.clear()
    _watching = True
    try:
        loaded = load_kernel(graph, weights)
    except KernelRejected:
        loaded = None
    finally:
        _watching = False
    assert not _seen
    assert loaded is None or isinstance(loaded, KernelModule)
    return loaded


torch.manual_seed(0)
WEIGHTS = weights_of(Eager())
load_kernel(encode(GRAPH), WEIGHTS)  # lazy imports happen here, before anything is watched

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["%x", "%0", "%4", TRAINING, "scale", "norm", "norm.running_var", "aten.relu.default", "__class__"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(node, path=()):
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


PLACES = [path for path in places(GRAPH) if path]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(["put", "drop", "double"]), values), min_size=1, max_size=3))
def test_a_mutated_graph_loads_or_is_rejected_and_runs_nothing(mutations):
    graph = copy.deepcopy(GRAPH)
    for path, act, value in mutations:
        node = graph
        for key in path[:-1]:
            node = node[key] if isinstance(node, dict) and key in node else node[key] if _has(node, key) else None
            if node is None:
                break
        if node is None or not (isinstance(node, dict) or _has(node, path[-1])):
            continue
        if act == "put":
            node[path[-1]] = value
        elif act == "drop" and _has(node, path[-1]):
            del node[path[-1]]
        elif act == "double" and isinstance(node, list):
            node.append(copy.deepcopy(node[path[-1]]))
    load_watched(encode(graph), WEIGHTS)


def _has(node, key):
    return (isinstance(node, dict) and key in node) or (isinstance(node, list) and isinstance(key, int) and key < len(node))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_corrupted_bytes_load_or_are_rejected_and_run_nothing(data):
    graph, weights = bytearray(encode(GRAPH)), bytearray(WEIGHTS)
    for document in (graph, weights):
        for _ in range(data.draw(st.integers(0, 3))):
            document[data.draw(st.integers(0, len(document) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(weights)) | st.just(len(weights)))
    load_watched(bytes(graph), bytes(weights[:length]))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | values.map(encode))
def test_any_bytes_are_rejected_as_a_graph(document):
    assert load_watched(document, None) is None
