"""The storing actor: the kernel index and its tiers. No torch."""
