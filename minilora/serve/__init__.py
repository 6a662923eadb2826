"""A model and its adapters behind an HTTP endpoint, and a page to talk with them and to watch runs."""
