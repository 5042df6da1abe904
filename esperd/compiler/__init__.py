"""The compiling actor: a blueprint becomes a validated, profiled kernel."""
