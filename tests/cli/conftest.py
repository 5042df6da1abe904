from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "report"))  # synthetic_job: events and report of a job that never ran
sys.path.append(str(TESTS / "policy"))  # policy_requests: requests to the policy, built by hand
sys.path.append(str(TESTS / "client"))  # scripted_daemon: real sockets, scripted answers
