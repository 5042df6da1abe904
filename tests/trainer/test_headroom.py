"""Free memory is what the system says, and the tightest limit on the way counts."""

from __future__ import annotations

import pytest
import torch

from esperd.messages.policy import Headroom
from esperd.trainer.headroom import headroom

CPU = torch.device("cpu")
MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    400 kB\nHugePages_Total:       0\n"


@pytest.fixture
def system(tmp_path):
    """A root of a file system, written file by file."""

    def write(**files):
        for name, text in files.items():
            file = tmp_path / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    write(proc__meminfo=MEMINFO)
    return write


def group(top, **files):
    return {f"sys__fs__cgroup__{top}{name.replace('_of_', '.')}": text for name, text in files.items()}


def test_without_limits_it_is_what_the_machine_has_available(system):
    root = system(proc__self__cgroup="0::/\n")
    assert headroom(CPU, root) == Headroom(where="machine", free_bytes=400 * 1024, total_bytes=1000 * 1024)


def test_a_control_group_that_leaves_less_counts(system):
    files = {"memory_of_max": "200000\n", "memory_of_current": "150000\n", "memory_of_stat": "anon 9\ninactive_file 30000\n"}
    root = system(proc__self__cgroup="0::/jobs/one\n", **group("jobs__one__", **files))
    assert headroom(CPU, root) == Headroom(where="cgroup", free_bytes=80_000, total_bytes=200_000)


def test_so_does_one_further_out(system):
    inner = group("jobs__one__", memory_of_max="max\n", memory_of_current="5\n")
    outer = group("jobs__", memory_of_max="1000\n", memory_of_current="990\n")
    root = system(proc__self__cgroup="0::/jobs/one\n", **inner, **outer)
    assert headroom(CPU, root) == Headroom(where="cgroup", free_bytes=10, total_bytes=1000)


def test_a_group_that_leaves_more_than_the_machine_does_not(system):
    root = system(proc__self__cgroup="0::/\n", **group("", memory_of_max="9000000\n", memory_of_current="0\n"))
    assert headroom(CPU, root).where == "machine"


def test_the_first_version_of_control_groups_is_read_too(system):
    files = {"memory_of_limit_in_bytes": "200000\n", "memory_of_usage_in_bytes": "150000\n"}
    stat = {"memory_of_stat": "total_inactive_file 10000\n"}
    root = system(proc__self__cgroup="4:memory:/a\n3:cpu:/\n0::/\n", **group("memory__a__", **files, **stat))
    assert headroom(CPU, root) == Headroom(where="cgroup", free_bytes=60_000, total_bytes=200_000)
    unlimited = {"memory_of_limit_in_bytes": "9223372036854771712\n", "memory_of_usage_in_bytes": "150000\n"}
    assert headroom(CPU, system(**group("memory__a__", **unlimited))).where == "machine"


def test_where_nothing_says_it_memory_is_unknown(tmp_path):
    assert headroom(CPU, tmp_path) is None


def test_on_this_machine_it_is_measured():
    measured = headroom(CPU)
    assert 0 < measured.free_bytes <= measured.total_bytes


@pytest.mark.gpu
def test_on_a_gpu_the_cache_counts_as_free():
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    before = headroom(device)
    assert before.where == "cuda"
    block = torch.zeros(64 * 2**20, dtype=torch.uint8, device=device)
    held = headroom(device)
    assert before.free_bytes - held.free_bytes >= 60 * 2**20
    del block
    assert headroom(device).free_bytes - held.free_bytes >= 60 * 2**20
