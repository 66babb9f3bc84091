"""Prometheus metrics: counted while serving, put into words when scraped."""
