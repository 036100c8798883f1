"""Recipes that travel with the package; ``core/config.py`` finds them from any working directory."""
