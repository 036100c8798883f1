"""Sounds measured: distances of sets of sounds, how well a sound fits its caption, and what happens in it when."""
