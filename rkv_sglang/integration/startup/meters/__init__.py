"""Meters: measures of the queries that a calibration shows."""
