"""The job that proves an installation in a few seconds."""
