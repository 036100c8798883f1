"""How good a completed scene is. Published definitions, with their faults where the published numbers depend on them, and what
they should have been."""
