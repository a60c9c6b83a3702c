"""Readers of files from strangers: nothing executes, no claimed size is believed."""
