"""Bytes in RAM: budgets, counters, buffers, and the offloading of contexts to host memory."""
