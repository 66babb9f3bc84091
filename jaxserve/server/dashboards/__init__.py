"""Grafana dashboards, made by `scripts/make_dashboard.py`."""
