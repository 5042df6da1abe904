"""The daemon process: start, signals, the job store, the front door for clients, the HTTP side port."""
