"""The commands: esperd (the daemon) and esper (the client). Imports no torch."""
