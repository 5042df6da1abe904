"""Renders a finished job for people: tables, the verdict on growth, an HTML page. Torch-free."""
