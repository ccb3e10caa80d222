"""Sweeps: many trainings that differ in a few keys of one configuration."""
