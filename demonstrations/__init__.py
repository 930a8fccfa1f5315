"""Scripted controllers. They make the `generated:` data of a task in seconds, at the start of a run."""
