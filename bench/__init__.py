"""Benchmark substrate: published weights and data, plain training loops, and the methods to compare with."""
