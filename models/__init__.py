"""Bars to features, features to forecasts, forecasts to evidence.

Pure code and files only: no Kafka, no database, no clock, no environment.
"""
