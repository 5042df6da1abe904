"""The deciding actor. No torch."""
