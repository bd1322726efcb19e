"""Noise schedules and samplers: tensor code that needs no server."""
