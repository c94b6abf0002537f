"""Measuring samples: feature networks, statistics, references, sampling jobs that survive, sweeps and their report."""
