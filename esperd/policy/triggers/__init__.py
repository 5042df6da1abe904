"""When to grow: what the built-in triggers say, each a pure function of the request."""
