"""What the chart and docs/metrics.md say of metrics and is made from code: the dashboard, and the tables of series."""
