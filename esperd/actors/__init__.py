"""The actor runtime: actors, mailboxes, supervision, transport. Knows nothing of networks."""
