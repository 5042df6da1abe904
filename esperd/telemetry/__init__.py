"""The watching actor: the event log, its publication, metrics. No torch."""
