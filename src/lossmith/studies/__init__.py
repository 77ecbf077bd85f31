"""Runnable comparisons: arms, a baseline, a metric and claims, over seeds and scales."""
