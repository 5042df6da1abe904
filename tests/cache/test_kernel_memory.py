from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from esperd.cache.memory import Kernel, KernelMemory
from esperd.messages.kernels import KernelKey, KernelManifest, Profile, SelfTest

MANIFEST = KernelManifest(
    key=KernelKey(blueprint="conv", source="s" * 64, shape=(8, 4, 4)),
    graph_sha256="a" * 64,
    weights_sha256="b" * 64,
    parameters=1,
    flops_per_sample=1.0,
    torch="2.13.0",
    self_test=SelfTest(batches=(1,), max_abs_error=0.0),
    profile=Profile(batch=1, forward_us=1.0, backward_us=1.0),
)


def kernel(size: int) -> Kernel:
    return Kernel(manifest_id="m", manifest=MANIFEST, graph=b"g" * size, weights=b"")


def test_the_least_recently_used_kernel_goes_first():
    memory = KernelMemory(capacity_bytes=10)
    memory.put("a", kernel(4))
    memory.put("b", kernel(4))
    assert memory.get("a") is not None
    memory.put("c", kernel(4))
    assert memory.get("b") is None
    assert memory.get("a") is not None
    assert memory.get("c") is not None


def test_a_kernel_larger_than_the_memory_is_not_kept_and_evicts_nothing_else():
    memory = KernelMemory(capacity_bytes=10)
    memory.put("a", kernel(4))
    memory.put("b", kernel(11))
    assert memory.get("a") is not None
    assert memory.get("b") is None


@given(steps=st.lists(st.tuples(st.sampled_from("abcd"), st.none() | st.integers(0, 8))), capacity=st.integers(0, 12))
def test_memory_never_exceeds_its_capacity_and_agrees_with_a_list_in_order_of_use(steps, capacity):
    memory, model = KernelMemory(capacity), []  # the model: (key, size), least recently used first
    for key, size in steps:
        held = [entry for entry in model if entry[0] == key]
        model = [entry for entry in model if entry[0] != key]
        if size is None:
            found = memory.get(key)
            assert (found and found.size_bytes) == (held[0][1] if held else None)
            model += held
        else:
            memory.put(key, kernel(size))
            if size <= capacity:
                model.append((key, size))
            while sum(entry[1] for entry in model) > capacity:
                model.pop(0)
        assert memory.size_bytes == sum(entry[1] for entry in model) <= capacity
        assert len(memory) == len(model)
