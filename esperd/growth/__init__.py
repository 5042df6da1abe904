"""Growing itself, as a plain torch library: usable from a notebook, without a daemon."""
