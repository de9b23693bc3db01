"""Former places of modules, kept for scripts that import them."""
