"""Models and adapters on disk: load, save, merge, convert, prove."""
