"""The training actor: its worker process, the loop, data, checkpoints, the report."""
