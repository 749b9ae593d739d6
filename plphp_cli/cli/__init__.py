"""The command line: parse, config, work, report. The only place that prints and that catches errors."""
