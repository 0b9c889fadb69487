"""Measuring, comparing, printing and drawing of rows, for every suite."""
