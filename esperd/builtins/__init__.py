"""What ships with esperd, registered through the same door as third-party plugins."""
