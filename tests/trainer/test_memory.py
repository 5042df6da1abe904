"""A worker whose memory runs out says so, and a batch in pieces teaches what the whole one does."""

from __future__ import annotations

import desks
import pytest
import torch

from esperd.messages.leases import EXIT_OUT_OF_MEMORY
from esperd.store.blobs import Blobs
from esperd.trainer import memory
from esperd.trainer.session import Session


def test_a_worker_that_holds_more_than_its_job_may_leaves_with_the_status_that_says_so():
    left = []
    thread_over = memory.watch(1, left.append)
    while not left:
        thread_over.wait(0.01)
    assert left == [EXIT_OUT_OF_MEMORY]


def test_what_torch_and_python_raise_when_memory_runs_out_is_one_typed_error():
    assert "smaller_retry" in str(memory.as_out_of_memory(MemoryError()))
    assert memory.as_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) is not None
    wrapped = ValueError("the model failed")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert memory.as_out_of_memory(wrapped) is not None
    with pytest.raises(RuntimeError, match="memory") as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.as_out_of_memory(refused.value) is not None
    assert memory.as_out_of_memory(ValueError("something else")) is None
    assert memory.peak().memory_bytes > 2**20


def test_a_batch_in_pieces_teaches_what_the_whole_one_does_and_the_job_names_it(tmp_path):
    job = desks.growing_job(host="desks:Plain", host_options={}, growth={"enabled": False}, budget={"epochs": 2})
    weights, desk = [], None
    for pieces in (1, 3):
        desk = desks.InProcessDesk()
        session = Session(job, desks.PLUGINS, desk, Blobs(tmp_path), pieces=pieces)
        ended = desks.Ended(session, session.train())
        weights.append(ended.report.grown.loss)
    assert abs(weights[0] - weights[1]) < 1e-5
    assert "trained in 3 pieces" in desk.events[0].inexact_because
